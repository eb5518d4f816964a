// Tokens sorted by expert, times experts compressed by the gap codec: an XLA FFI custom call for CPU.
// Loaded by ctypes from ../__init__.py; ../gap.py says what the arguments are.

#include "shared/compressed_ragged_dot.h"
#include "shared/transposed.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Bits of the stream that are decoded at once, by a table: whole tokens, as many as they hold. The longest token but a
// run of ones, 0, r of six bits, v of two, fits.
constexpr int kWindow = 11;
constexpr int64_t kEntries = 1 << kWindow;
// Symbols of a step where every one is written, and the parameters up to which a token never has more.
constexpr int kFields = 24;
constexpr int kMostDense = 24;
constexpr int kMostParameter = 64;  // of a token: the largest parameter
constexpr int kMostStep = 127;  // weights of a step
constexpr int kSteps = 5;       // for which 64 bits from any byte on suffice
// Streams of rows that are decoded in turns. A stream has 1, 2, 4 or 8 rows, so that none runs over the end of a block
// of the codec, which has 32.
constexpr int kStreams = 6;

// Bytes written before a row: weights of its first token that are the row's before. After: steps of an ended stream.
constexpr int64_t kSlack = (kSteps * kMostStep + 32 + 63) / 64 * 64;
constexpr int64_t kSymbolsPerByte = 1;
constexpr int64_t kLevels = 3;

// Of a window of bits: in the first byte how many of them are used, in the last how many weights they stand for, and
// between, for parameters up to kMostDense, these weights' symbols, two bits each. For larger ones all weights but
// the last are zero, and the last one's symbol stands in the second byte.
struct alignas(64) Table {
  uint64_t entries[kEntries];
};

struct Token {
  int bits, weights, symbol;  // of the last weight
};

// The first token among some bits; none if it does not end there.
Token ReadToken(uint32_t window, int bits, int parameter, int levels) {
  int used = 0;
  bool missing = false;
  const auto read = [&] {
    missing |= used == bits;
    return static_cast<int>(window >> used++ & 1);
  };
  if (read() == 1) return missing ? Token{} : Token{1, parameter, 0};
  int width = 0, remainder = 0;
  while (1 << width < parameter) ++width;
  const int cut = (1 << width) - parameter;
  for (int i = 0; i < width - 1; ++i) remainder = 2 * remainder + read();
  if (width > 0 && remainder >= cut) remainder = 2 * remainder + read() - cut;
  int symbol = 1 + read();
  if (levels == 3) symbol = symbol == 1 ? 2 : 1 + 2 * read();
  return missing ? Token{} : Token{used, remainder + 1, symbol};
}

uint64_t Entry(uint32_t window, int parameter, int levels) {
  const bool sparse = parameter > kMostDense;
  uint64_t symbols = 0;
  int used = 0, weights = 0;
  while (true) {
    const Token token = ReadToken(window >> used, kWindow - used, parameter, levels);
    if (token.bits == 0 || weights + token.weights > (sparse ? kMostStep : kFields)) break;
    used += token.bits;
    weights += token.weights;
    if (sparse) {
      symbols = token.symbol;
      if (token.symbol != 0) break;
    } else {
      symbols |= static_cast<uint64_t>(token.symbol) << (2 * (weights - 1));
    }
  }
  return used | symbols << 8 | static_cast<uint64_t>(weights) << 56;
}

// [2 or 3 levels, parameter].
struct Tables {
  Table tables[2][kMostParameter + 1];
  uint64_t after = 0;  // SpreadSymbols reads it.

  Tables() {
    for (int levels = 2; levels <= 3; ++levels) {
      for (int parameter = 1; parameter <= kMostParameter; ++parameter) {
        for (uint32_t window = 0; window < kEntries; ++window) {
          tables[levels - 2][parameter].entries[window] = Entry(window, parameter, levels);
        }
      }
      tables[levels - 2][0] = tables[levels - 2][1];
    }
  }
};

struct Block {
  const uint8_t* words;  // of all experts
  int64_t bytes;         // at least 8
  int64_t first_bit;     // of the expert
  const uint32_t* starts;
  const uint8_t* skips;
  int64_t segments;
  const uint64_t* entries;
  bool sparse;
};

#define QMOE_DECODE "../gap_decode.h"
#include "shared/instruction_sets.h"

struct Gap {
  using Block = ::Block;
  static constexpr int64_t kSymbolsPerByte = ::kSymbolsPerByte;
  // In the second-level cache: the first one holds the table.
  static constexpr int64_t kBytesFewTokens = 256 << 10;
  static constexpr int64_t kSlack = ::kSlack;
  static constexpr int64_t kStreams = ::kStreams;

  const uint32_t* words;
  int64_t words_size;
  const int32_t* word_counts;  // [experts]
  const uint32_t* starts;      // [experts, out, segments]
  const uint8_t* skips;        // [experts, out, segments]
  const uint8_t* parameters;   // [experts]
  int64_t out, segments, levels;

  // Streams of a piece are as long as they can be, up to eight rows.
  static int64_t RowsPerBlock(int64_t most) {
    constexpr int64_t kLargest = 8 * kStreams;
    if (most >= kLargest) return most / kLargest * kLargest;
    return most >= 4 * kStreams ? 4 * kStreams : most >= 2 * kStreams ? 2 * kStreams : kStreams;
  }
  static int64_t Log2RowsPerStream(int64_t rows) {
    return rows >= 8 * kStreams ? 3 : rows >= 4 * kStreams ? 2 : rows >= 2 * kStreams ? 1 : 0;
  }

  int64_t MostLevels() const { return kLevels; }
  int64_t Size(int64_t expert) const { return word_counts[expert]; }

  Block At(int64_t expert, int64_t first, int64_t row, int64_t) const {
    static const Tables* tables = new Tables;
    const int parameter = std::min<int>(parameters[expert], kMostParameter);
    const int64_t at = (expert * out + row) * segments;
    // Clamped for arrays that nobody checked; with them, results are wrong but nothing else is touched.
    const int64_t first_word = std::clamp<int64_t>(first, 0, words_size);
    return {reinterpret_cast<const uint8_t*>(words), 4 * words_size, 32 * first_word, starts + at, skips + at, segments,
            tables->tables[levels - 2][parameter].entries, parameter > kMostDense};
  }
};

// The codec's own arrays, or an error where they don't fit the others.
ffi::ErrorOr<Gap> Checked(ffi::Buffer<ffi::U32> words, ffi::Buffer<ffi::S32> word_counts, ffi::Buffer<ffi::U32> starts,
                          ffi::Buffer<ffi::U8> skips, ffi::Buffer<ffi::U8> parameters, ffi::Buffer<ffi::BF16> levels,
                          ffi::Buffer<ffi::S32> group_sizes, int64_t out) {
  const auto shape = starts.dimensions();
  const auto experts = group_sizes.element_count();
  if (shape.size() != 3 || shape[0] != static_cast<int64_t>(experts) || shape[1] != out || shape[2] < 1 ||
      skips.element_count() != starts.element_count() || word_counts.element_count() != experts ||
      parameters.element_count() != experts || levels.dimensions().size() != 3) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "expected starts and skips [experts, out, segments], word_counts and parameters [experts]"));
  }
  if (words.element_count() < 2) return ffi::Unexpected(ffi::Error::InvalidArgument("expected at least two words"));
  return Gap{words.typed_data(),      static_cast<int64_t>(words.element_count()),
             word_counts.typed_data(), starts.typed_data(),
             skips.typed_data(),       parameters.typed_data(),
             shape[1],                 shape[2],
             levels.dimensions()[2]};
}

ffi::Error GapDot(ffi::ThreadPool pool, std::string_view isa, ffi::AnyBuffer lhs, ffi::Buffer<ffi::U32> words,
                  ffi::Buffer<ffi::S32> word_counts, ffi::Buffer<ffi::U32> starts, ffi::Buffer<ffi::U8> skips,
                  ffi::Buffer<ffi::U8> parameters, ffi::Buffer<ffi::BF16> levels, ffi::Buffer<ffi::S32> group_sizes,
                  ffi::Result<ffi::AnyBuffer> result, ffi::ResultBuffer<ffi::U8> scratch) {
  const int64_t out = result->dimensions().back();
  const auto codec = Checked(words, word_counts, starts, skips, parameters, levels, group_sizes, out);
  if (codec.has_error()) return codec.error();
  return CompressedRaggedDot(pool, FindInstructionSet(isa), codec.value(), lhs, levels, group_sizes, result, scratch);
}

ffi::Error GapDotTransposed(ffi::ThreadPool pool, std::string_view isa, ffi::AnyBuffer g, ffi::Buffer<ffi::U32> words,
                            ffi::Buffer<ffi::S32> word_counts, ffi::Buffer<ffi::U32> starts,
                            ffi::Buffer<ffi::U8> skips, ffi::Buffer<ffi::U8> parameters,
                            ffi::Buffer<ffi::BF16> levels, ffi::Buffer<ffi::S32> group_sizes,
                            ffi::Result<ffi::AnyBuffer> result) {
  const int64_t out = g.dimensions().back();
  const auto codec = Checked(words, word_counts, starts, skips, parameters, levels, group_sizes, out);
  if (codec.has_error()) return codec.error();
  return CompressedRaggedDotTransposed(pool, FindInstructionSet(isa), codec.value(), g, levels, group_sizes, result);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(QmoeGapDot, GapDot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Arg<ffi::AnyBuffer>()           // lhs
                                  .Arg<ffi::Buffer<ffi::U32>>()    // words
                                  .Arg<ffi::Buffer<ffi::S32>>()    // word_counts
                                  .Arg<ffi::Buffer<ffi::U32>>()    // starts
                                  .Arg<ffi::Buffer<ffi::U8>>()     // skips
                                  .Arg<ffi::Buffer<ffi::U8>>()     // parameters
                                  .Arg<ffi::Buffer<ffi::BF16>>()   // levels
                                  .Arg<ffi::Buffer<ffi::S32>>()    // group_sizes
                                  .Ret<ffi::AnyBuffer>()           // [tokens, out]
                                  .Ret<ffi::Buffer<ffi::U8>>());   // scratch

XLA_FFI_DEFINE_HANDLER_SYMBOL(QmoeGapDotTransposed, GapDotTransposed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("isa")
                                  .Arg<ffi::AnyBuffer>()           // g
                                  .Arg<ffi::Buffer<ffi::U32>>()    // words
                                  .Arg<ffi::Buffer<ffi::S32>>()    // word_counts
                                  .Arg<ffi::Buffer<ffi::U32>>()    // starts
                                  .Arg<ffi::Buffer<ffi::U8>>()     // skips
                                  .Arg<ffi::Buffer<ffi::U8>>()     // parameters
                                  .Arg<ffi::Buffer<ffi::BF16>>()   // levels
                                  .Arg<ffi::Buffer<ffi::S32>>()    // group_sizes
                                  .Ret<ffi::AnyBuffer>());         // [tokens, in]
