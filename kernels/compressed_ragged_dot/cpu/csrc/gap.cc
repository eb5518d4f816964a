// Tokens sorted by expert, times experts compressed by the gap codec: an XLA FFI custom call for CPU.
// Loaded by ctypes from ../__init__.py; ../gap.py says what the arguments are.

#include "shared/compressed_ragged_dot.h"
#include "shared/transposed.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Bits of the stream that are decoded at once, by a table: whole tokens, as many as they hold. The longest token fits.
constexpr int kWindow = 11;
constexpr int64_t kEntries = 1 << kWindow;
// Levels of a row up to which a symbol takes two bits of an entry; for more it takes four.
constexpr int64_t kFewLevels = 3;
constexpr int64_t kMostLevels = 14;
constexpr int64_t kMostRun = 64;  // weights of a token
constexpr int kMostStep = 127;    // weights of a step
constexpr int kSteps = 5;         // for which 64 bits from any byte on suffice
// Streams of rows that are decoded in turns. A stream has 1, 2, 4 or 8 rows, so that none runs over the end of a block
// of the codec, which has 32; with classes of columns both have more.
constexpr int kStreams = 6;

// Bytes written before a row: weights of its first token that are the row's before. After: steps of an ended stream.
constexpr int64_t kSlack = (kSteps * kMostStep + 32 + 63) / 64 * 64;
constexpr int64_t kSymbolsPerByte = 1;
constexpr int kSymbolBits = 8;

// How the six bytes between an entry's first and its last say the symbols of its weights: all of them, in fields of two,
// four or eight bits, or, where tokens have more weights than that holds, the last one among zeros.
enum class Symbols { kPairs, kNibbles, kBytes, kLast };
constexpr int Width(Symbols symbols) {
  return symbols == Symbols::kPairs ? 2 : symbols == Symbols::kNibbles ? 4 : 8;
}

// Of a window of bits: in the first byte how many of them are used, in the last how many weights they stand for.
struct alignas(64) Table {
  uint64_t entries[kEntries];
  uint64_t after = 0;  // Spreading symbols reads it.
  Symbols symbols;
};

// What the codec's `window_table` says of each code of so many levels. Decoding tables are made when they are first
// wanted, and stay.
class CodeTables {
 public:
  static constexpr int64_t kWindows = 1 << 12;  // of window_table

  // numbers uint8 [count]; windows uint32 [count, kWindows].
  void Set(int64_t levels, int64_t count, const uint8_t* numbers, const uint32_t* windows) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (windows_.size() > 0) return;
    levels_ = levels;
    windows_.assign(windows, windows + count * kWindows);
    // Numbers that no code has are without effect on arrays that were checked.
    for (int64_t number = 0; number < 256; ++number) {
      rows_[number] = std::min<int64_t>(std::lower_bound(numbers, numbers + count, number) - numbers, count - 1);
    }
    is_set_.store(true, std::memory_order_release);
  }

  bool IsSet() const { return is_set_.load(std::memory_order_acquire); }

  const Table* Get(uint8_t number) {
    const int64_t row = rows_[number];
    if (const Table* table = tables_[row].load(std::memory_order_acquire)) return table;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (tables_[row].load(std::memory_order_relaxed) == nullptr) {
      tables_[row].store(MakeTable(&windows_[row * kWindows]), std::memory_order_release);
    }
    return tables_[row].load(std::memory_order_relaxed);
  }

 private:
  const Table* MakeTable(const uint32_t* windows) const {
    Table* table = new Table;
    const Symbols few = levels_ <= kFewLevels ? Symbols::kPairs : Symbols::kNibbles;
    int longest = 0;  // weights of a token
    for (int64_t window = 0; window < kWindows; ++window) {
      longest = std::max<int>(longest, windows[window] >> 4 & 127);
    }
    Fill(windows, longest > 48 / Width(few) ? Symbols::kLast : few, table);
    if (table->symbols == Symbols::kPairs) {
      // Few symbols, far apart: the window ends before a step of pairs does.
      Table* last = new Table;
      Fill(windows, Symbols::kLast, last);
      if (Weights(*last) > Weights(*table)) std::swap(table, last);
      delete last;
    }
    if (table->symbols == Symbols::kNibbles && longest <= 6) {
      // A step that copies bytes takes about two thirds of the time.
      Table* bytes = new Table;
      Fill(windows, Symbols::kBytes, bytes);
      if (2 * Weights(*table) < 3 * Weights(*bytes)) std::swap(table, bytes);
      delete bytes;
    }
    return table;
  }

  // Of all windows, which are about equally likely in a good code.
  static int64_t Weights(const Table& table) {
    int64_t weights = 0;
    for (uint64_t entry : table.entries) weights += entry >> 56;
    return weights;
  }

  static void Fill(const uint32_t* windows, Symbols kind, Table* table) {
    table->symbols = kind;
    const int width = Width(kind);
    for (uint32_t window = 0; window < kEntries; ++window) {
      uint64_t symbols = 0;
      int used = 0, weights = 0;
      while (used < kWindow) {
        const uint32_t token = windows[window >> used];
        const int bits = token & 15, more = token >> 4 & 127;
        const uint64_t symbol = token >> 11 & 15;
        if (used + bits > kWindow || weights + more > (kind == Symbols::kLast ? kMostStep : 48 / width)) break;
        used += bits;
        weights += more;
        if (kind != Symbols::kLast) {
          symbols |= symbol << (width * (weights - 1));
        } else if (symbol != 0) {
          symbols = symbol;
          break;
        }
      }
      table->entries[window] = used | symbols << 8 | static_cast<uint64_t>(weights) << 56;
    }
  }

  std::mutex mutex_;
  std::atomic<bool> is_set_{false};
  int64_t levels_ = 0;
  std::vector<uint32_t> windows_;
  int64_t rows_[256] = {};  // of windows_, by number
  std::atomic<const Table*> tables_[256] = {};
};

CodeTables code_tables[kMostLevels + 1];  // by levels

struct Block {
  const uint8_t* words;  // of all experts
  int64_t bytes;         // at least 8
  int64_t first_bit;     // of the expert
  const uint32_t* starts;
  const uint8_t* skips;
  int64_t segments;
  const uint64_t* entries;
  Symbols symbols;
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
  const uint8_t* parameters;   // [experts, classes], numbers of codes
  int64_t out, segments, levels, classes;

  // Streams of a piece are as long as they can be, up to eight rows; up to 32 where rows are those of a class.
  int64_t MostLog2() const { return classes >= 4 ? 5 : classes >= 2 ? 4 : 3; }
  int64_t Log2RowsPerStream(int64_t rows) const {
    int64_t log2 = MostLog2();
    while (log2 > 0 && rows < kStreams << log2) --log2;
    return log2;
  }
  int64_t RowsPerBlock(int64_t most) const {
    const int64_t log2 = Log2RowsPerStream(most), turn = kStreams << log2;
    return log2 == MostLog2() ? std::max<int64_t>(1, most / turn) * turn : turn;
  }

  int64_t MostLevels() const { return kMostLevels; }
  int64_t Parts() const { return classes; }
  int64_t Size(int64_t expert) const { return word_counts[expert]; }

  Block At(int64_t expert, int64_t part, int64_t first, int64_t row, int64_t) const {
    const Table* table = code_tables[levels].Get(parameters[expert * classes + part]);
    const int64_t at = (expert * out + row) * segments + part * (segments / classes);
    // Clamped for arrays that nobody checked; with them, results are wrong but nothing else is touched.
    const int64_t first_word = std::clamp<int64_t>(first, 0, words_size);
    return {reinterpret_cast<const uint8_t*>(words), 4 * words_size, 32 * first_word, starts + at, skips + at, segments,
            table->entries, table->symbols};
  }
};

// The codec's own arrays, or an error where they don't fit the others.
ffi::ErrorOr<Gap> Checked(ffi::Buffer<ffi::U32> words, ffi::Buffer<ffi::S32> word_counts, ffi::Buffer<ffi::U32> starts,
                          ffi::Buffer<ffi::U8> skips, ffi::Buffer<ffi::U8> parameters, ffi::Buffer<ffi::BF16> levels,
                          ffi::Buffer<ffi::S32> group_sizes, int64_t out) {
  const auto shape = starts.dimensions();
  const auto experts = word_counts.element_count();
  const int64_t classes = experts > 0 ? parameters.element_count() / experts : 1;
  if (shape.size() != 3 || shape[0] != static_cast<int64_t>(experts) || shape[1] != out || classes < 1 || classes > kMostParts ||
      shape[2] < classes || shape[2] % classes != 0 || skips.element_count() != starts.element_count() ||
      parameters.element_count() != experts * classes || group_sizes.element_count() != experts ||
      levels.dimensions().size() != 3 || levels.dimensions()[0] != shape[0]) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "expected starts and skips [experts, out, segments], word_counts and group_sizes [experts], parameters "
        "[experts, classes]"));
  }
  if (words.element_count() < 2) return ffi::Unexpected(ffi::Error::InvalidArgument("expected at least two words"));
  const int64_t levels_per_row = levels.dimensions()[2];
  if (levels_per_row < 2 || levels_per_row > kMostLevels || !code_tables[levels_per_row].IsSet()) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("expected codes to have been set for so many levels a row"));
  }
  return Gap{words.typed_data(),      static_cast<int64_t>(words.element_count()),
             word_counts.typed_data(), starts.typed_data(),
             skips.typed_data(),       parameters.typed_data(),
             shape[1],                 shape[2],
             levels_per_row,           classes};
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

// Of so many levels: how many codes there are, their numbers, rising, and the codec's window_table.
extern "C" void QmoeSetGapCodes(int64_t levels, int64_t count, const uint8_t* numbers, const uint32_t* windows) {
  code_tables[levels].Set(levels, count, numbers, windows);
}

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
