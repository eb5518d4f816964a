// Tokens sorted by expert, times experts compressed by the dictionary codec: an XLA FFI custom call for CPU.
// Loaded by ctypes from ../__init__.py; ../dictionary.py says what the arguments are.

#include "shared/compressed_ragged_dot.h"
#include "shared/transposed.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// How many codewords ahead memory is fetched: 2 KB, or about 10 us.
constexpr int64_t kPrefetch = 1024;
constexpr int64_t kSymbolsPerByte = 2;
constexpr int kSymbolBits = 2;
constexpr int64_t kMostLevels = 2;

// The dictionary: 14 pairs of symbols of four bits each (two for the first, two for the second), in the last byte
// how many of them there are. Filled once by QmoeSetDictionary.
struct alignas(64) Table {
  uint64_t entries[65'536];
};
Table table;

inline int64_t Length(const uint64_t* entry) { return reinterpret_cast<const uint8_t*>(entry)[7]; }

struct Block {
  const uint16_t* begin;
  const uint16_t* end;
};

#define QMOE_DECODE "../dictionary_decode.h"
#include "shared/instruction_sets.h"

struct Dictionary {
  using Block = ::Block;
  static constexpr int64_t kSymbolsPerByte = ::kSymbolsPerByte;
  static constexpr int64_t kBytesFewTokens = 12 << 10;  // Within the first-level cache.
  static constexpr int64_t kSlack = 128;                // Four codewords, and whole vectors.

  const uint16_t* codewords;
  int64_t codewords_size;
  const int32_t* row_offsets;  // [experts, out + 1]
  int64_t out;

  static constexpr int64_t kStreams = 1;

  // All rows are one stream; whole tiles of four rows.
  static int64_t RowsPerBlock(int64_t most) { return std::max<int64_t>(4, most / 4 * 4); }
  static int64_t Log2RowsPerStream(int64_t) { return 62; }

  int64_t MostLevels() const { return kMostLevels; }
  int64_t Parts() const { return 1; }
  int64_t Size(int64_t expert) const { return row_offsets[expert * (out + 1) + out]; }

  Block At(int64_t expert, int64_t, int64_t first, int64_t row, int64_t rows) const {
    const int32_t* offsets = row_offsets + expert * (out + 1) + row;
    // Without effect on streams that were checked; with others, results are wrong but nothing else is touched.
    const auto codeword = [&](int64_t offset) {
      return codewords + std::clamp<int64_t>(first + offset, 0, codewords_size);
    };
    return {codeword(offsets[0]), codeword(offsets[rows])};
  }
};

// The codec's own arrays, or an error where they don't fit the others.
ffi::ErrorOr<Dictionary> Checked(ffi::Buffer<ffi::U16> codewords, ffi::Buffer<ffi::S32> row_offsets,
                                 ffi::Buffer<ffi::BF16> levels, ffi::Buffer<ffi::S32> group_sizes, int64_t out) {
  const auto shape = row_offsets.dimensions();
  const auto experts = static_cast<int64_t>(group_sizes.element_count());
  if (shape.size() != 2 || shape[0] != experts || shape[1] != out + 1 || levels.dimensions().back() != kMostLevels) {
    return ffi::Unexpected(
        ffi::Error::InvalidArgument("expected row_offsets [experts, out + 1] and levels [experts, out, 2]"));
  }
  return Dictionary{codewords.typed_data(), static_cast<int64_t>(codewords.element_count()), row_offsets.typed_data(),
                    out};
}

ffi::Error DictionaryDot(ffi::ThreadPool pool, std::string_view isa, ffi::AnyBuffer lhs,
                         ffi::Buffer<ffi::U16> codewords, ffi::Buffer<ffi::S32> row_offsets,
                         ffi::Buffer<ffi::BF16> levels, ffi::Buffer<ffi::S32> group_sizes,
                         ffi::Result<ffi::AnyBuffer> result, ffi::ResultBuffer<ffi::U8> scratch) {
  const auto codec = Checked(codewords, row_offsets, levels, group_sizes, result->dimensions().back());
  if (codec.has_error()) return codec.error();
  return CompressedRaggedDot(pool, FindInstructionSet(isa), codec.value(), lhs, levels, group_sizes, result, scratch);
}

ffi::Error DictionaryDotTransposed(ffi::ThreadPool pool, std::string_view isa, ffi::AnyBuffer g,
                                   ffi::Buffer<ffi::U16> codewords, ffi::Buffer<ffi::S32> row_offsets,
                                   ffi::Buffer<ffi::BF16> levels, ffi::Buffer<ffi::S32> group_sizes,
                                   ffi::Result<ffi::AnyBuffer> result) {
  const auto codec = Checked(codewords, row_offsets, levels, group_sizes, g.dimensions().back());
  if (codec.has_error()) return codec.error();
  return CompressedRaggedDotTransposed(pool, FindInstructionSet(isa), codec.value(), g, levels, group_sizes, result);
}

}  // namespace

extern "C" void QmoeSetDictionary(const uint64_t* entries) { std::memcpy(table.entries, entries, sizeof(table)); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(QmoeDictionaryDot, DictionaryDot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Arg<ffi::AnyBuffer>()           // lhs
                                  .Arg<ffi::Buffer<ffi::U16>>()    // codewords
                                  .Arg<ffi::Buffer<ffi::S32>>()    // row_offsets
                                  .Arg<ffi::Buffer<ffi::BF16>>()   // levels
                                  .Arg<ffi::Buffer<ffi::S32>>()    // group_sizes
                                  .Ret<ffi::AnyBuffer>()           // [tokens, out]
                                  .Ret<ffi::Buffer<ffi::U8>>());   // scratch

XLA_FFI_DEFINE_HANDLER_SYMBOL(QmoeDictionaryDotTransposed, DictionaryDotTransposed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Arg<ffi::AnyBuffer>()           // g
                                  .Arg<ffi::Buffer<ffi::U16>>()    // codewords
                                  .Arg<ffi::Buffer<ffi::S32>>()    // row_offsets
                                  .Arg<ffi::Buffer<ffi::BF16>>()   // levels
                                  .Arg<ffi::Buffer<ffi::S32>>()    // group_sizes
                                  .Ret<ffi::AnyBuffer>());         // [tokens, in]
