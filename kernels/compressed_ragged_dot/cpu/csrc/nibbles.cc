// Tokens sorted by expert, times experts with four bits a weight: an XLA FFI custom call for CPU.
// Loaded by ctypes from ../__init__.py; ../nibbles.py says what the arguments are.

#include "shared/compressed_ragged_dot.h"
#include "shared/transposed.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kSymbolsPerByte = 2;
constexpr int kSymbolBits = 4;
constexpr int64_t kMostLevels = 15;

struct Block {
  const uint8_t* symbols;  // [rows, row_bytes]
};

#define QMOE_DECODE "../nibbles_decode.h"
#include "shared/instruction_sets.h"

struct Nibbles {
  using Block = ::Block;
  static constexpr int64_t kSymbolsPerByte = ::kSymbolsPerByte;
  static constexpr int64_t kBytesFewTokens = 12 << 10;  // Within the first-level cache.
  static constexpr int64_t kSlack = 64;                 // Whole vectors.
  static constexpr int64_t kStreams = 1;

  const uint8_t* nibbles;  // [experts, out, row_bytes]
  int64_t out;
  int64_t row_bytes;

  // All rows are one stream; whole tiles of four rows.
  static int64_t RowsPerBlock(int64_t most) { return std::max<int64_t>(4, most / 4 * 4); }
  static int64_t Log2RowsPerStream(int64_t) { return 62; }

  int64_t MostLevels() const { return kMostLevels; }
  int64_t Parts() const { return 1; }
  int64_t Size(int64_t) const { return 0; }

  Block At(int64_t expert, int64_t, int64_t, int64_t row, int64_t) const {
    return {nibbles + (expert * out + row) * row_bytes};
  }
};

// The codec's own array, or an error where it doesn't fit the others.
ffi::ErrorOr<Nibbles> Checked(ffi::Buffer<ffi::U8> nibbles, ffi::Buffer<ffi::S32> group_sizes, int64_t out,
                              int64_t width) {
  const auto shape = nibbles.dimensions();
  const auto experts = static_cast<int64_t>(group_sizes.element_count());
  if (shape.size() != 3 || shape[0] != experts || shape[1] != out || shape[2] != (width + 1) / 2) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("expected nibbles [experts, out, ceil(in / 2)]"));
  }
  return Nibbles{nibbles.typed_data(), out, shape[2]};
}

ffi::Error NibblesDot(ffi::ThreadPool pool, std::string_view isa, ffi::AnyBuffer lhs, ffi::Buffer<ffi::U8> nibbles,
                      ffi::Buffer<ffi::BF16> levels, ffi::Buffer<ffi::S32> group_sizes,
                      ffi::Result<ffi::AnyBuffer> result, ffi::ResultBuffer<ffi::U8> scratch) {
  const auto codec = Checked(nibbles, group_sizes, result->dimensions().back(), lhs.dimensions().back());
  if (codec.has_error()) return codec.error();
  return CompressedRaggedDot(pool, FindInstructionSet(isa), codec.value(), lhs, levels, group_sizes, result, scratch);
}

ffi::Error NibblesDotTransposed(ffi::ThreadPool pool, std::string_view isa, ffi::AnyBuffer g,
                                ffi::Buffer<ffi::U8> nibbles, ffi::Buffer<ffi::BF16> levels,
                                ffi::Buffer<ffi::S32> group_sizes, ffi::Result<ffi::AnyBuffer> result) {
  const auto codec = Checked(nibbles, group_sizes, g.dimensions().back(), result->dimensions().back());
  if (codec.has_error()) return codec.error();
  return CompressedRaggedDotTransposed(pool, FindInstructionSet(isa), codec.value(), g, levels, group_sizes, result);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(QmoeNibblesDot, NibblesDot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Arg<ffi::AnyBuffer>()           // lhs
                                  .Arg<ffi::Buffer<ffi::U8>>()     // nibbles
                                  .Arg<ffi::Buffer<ffi::BF16>>()   // levels
                                  .Arg<ffi::Buffer<ffi::S32>>()    // group_sizes
                                  .Ret<ffi::AnyBuffer>()           // [tokens, out]
                                  .Ret<ffi::Buffer<ffi::U8>>());   // scratch

XLA_FFI_DEFINE_HANDLER_SYMBOL(QmoeNibblesDotTransposed, NibblesDotTransposed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Arg<ffi::AnyBuffer>()           // g
                                  .Arg<ffi::Buffer<ffi::U8>>()     // nibbles
                                  .Arg<ffi::Buffer<ffi::BF16>>()   // levels
                                  .Arg<ffi::Buffer<ffi::S32>>()    // group_sizes
                                  .Ret<ffi::AnyBuffer>());         // [tokens, in]
