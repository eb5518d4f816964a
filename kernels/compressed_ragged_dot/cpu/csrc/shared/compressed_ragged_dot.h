// What the CPU kernels of all codecs share: tokens sorted by expert, times the experts that have tokens, as pieces of
// work for the threads of XLA's pool. Everything is in an unnamed namespace, for the one source of a codec.
//
// A piece is a block of rows of an expert. It is decoded to symbols, two or four bits each, and multiplied in whole
// vectors.
// A codec is a file with `Decode(block, rows)`, see instruction_sets.h, and a struct with
//
//   Block                         where the codes of some rows are
//   kSymbolsPerByte               1 or 2
//   kBytesFewTokens               of a piece's symbols
//   kSlack                        bytes that Decode may write before a stream's first row and after its last
//   RowsPerBlock(most)            how many rows a piece has, where `most` or a few more do
//   kStreams                      that are decoded in turns: Decode may touch a multiple of so many
//   Log2RowsPerStream(rows)       see Rows
//   Parts()                       of an expert's columns, equal ones, at most kMostParts; each is decoded by itself
//   Size(expert)                  how many codes are stored for the expert
//   At(expert, part, first, row, rows)  some rows; `first` is the number of the codes of all experts before

#ifndef QMOE_COMPRESSED_RAGGED_DOT_H_
#define QMOE_COMPRESSED_RAGGED_DOT_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "processor.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Floats of the longest vector. A lane takes four bytes of symbols at a time, so tokens are stored in blocks: what
// meets the first symbol of each lane, then what meets the second one, and so on.
constexpr int64_t kLanesPerBlock = 16;
// Up to so many tokens of an expert, pieces are as large as is best for the codec. Every piece reads all tokens of its
// expert again, so for more they fill part of the second-level cache.
constexpr int64_t kFewTokens = 8;
constexpr int64_t kBytesManyTokens = 192 << 10;
// Weights times tokens below which waking another thread costs more than it saves.
constexpr int64_t kWorkPerThread = 100'000;
// Pieces that each thread has, at least.
constexpr int64_t kPiecesPerThread = 8;
constexpr int64_t kMostParts = 16;

// A block of rows of one expert, and that expert's tokens.
struct Rows {
  const uint16_t* levels;  // bfloat16 [count, levels_per_row], what symbols from 1 on stand for; 0 is zero
  int64_t levels_per_row;
  int64_t count;
  uint8_t* symbols;              // written here: streams of rows; within a stream, row follows row
  int64_t row_bytes;             // of a part
  int64_t log2_rows_per_stream;  // rows of a stream are a power of two
  int64_t stream_bytes;          // slack included
  int64_t parts;       // of a row
  int64_t part_bytes;  // from a part's symbols to those of the next
  const float* x;      // [tokens, parts, x_stride], each padded with zeros
  int64_t x_stride;    // whole blocks
  int64_t token_stride;  // from one token to the next
  int64_t tokens;
  void* y;  // [tokens, y_stride]
  int64_t y_stride;

  uint8_t* Row(int64_t row) const {
    const int64_t stream = row >> log2_rows_per_stream;
    return symbols + stream * stream_bytes + (row - (stream << log2_rows_per_stream)) * row_bytes;
  }
};

// A block of rows, and what is added to sums of its expert's tokens; see transposed.h.
struct Columns {
  Rows rows;       // without tokens and results
  float* weights;  // written here: [rows.count, rows.x_stride]
  const float* g;  // [rows.count, tokens]
  int64_t tokens;
  float* sums;  // [tokens, rows.x_stride], arranged as tokens are
};

template <typename Block>
struct InstructionSet {
  void (*multiply_float32)(const Block*, const Rows&);  // a block for each part
  void (*multiply_bfloat16)(const Block*, const Rows&);
  void (*add_transposed)(const Block&, const Columns&);
};

inline float FromBfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline void Store(float value, float* to) { *to = value; }

inline void Store(float value, uint16_t* to) {  // bfloat16, rounded to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  *to = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// An expert with tokens.
struct Active {
  int64_t expert;
  int64_t part;  // (transposed.h)
  int64_t first_code;
  int64_t first_token;
  int64_t tokens;
};

// What all threads of a call share.
template <typename Codec>
struct Call {
  Codec codec;
  const uint16_t* levels;  // bfloat16 [experts, out, levels_per_row]
  int64_t levels_per_row;
  int64_t out;
  int64_t width;  // of a part
  int64_t row_bytes;
  const char* lhs;  // [tokens, parts, width]
  bool is_bfloat16;
  int64_t assigned;  // parts of the tokens that have an expert
  float* x;          // [assigned, x_stride]
  int64_t x_stride;
  char* y;  // [tokens, out]
  const Active* active;
  int64_t rows_per_block;
  int64_t blocks;  // of an expert
  int64_t pieces;
  void (*multiply)(const typename Codec::Block*, const Rows&);
  std::atomic<int64_t> next_token{0};
  std::atomic<int64_t> arranged{0};
  std::atomic<int64_t> next_piece{0};
  std::atomic<int64_t> done{0};
};

// Memory for `size` bytes that stays with the thread, so that calls of equal size allocate it once.
inline uint8_t* ThreadBuffer(int64_t size) {
  thread_local std::unique_ptr<uint8_t[]> buffer;
  thread_local int64_t capacity = 0;
  if (capacity < size) {
    buffer.reset(new uint8_t[size]());
    capacity = size;
  }
  return buffer.get();
}

template <typename Codec>
void MultiplyPiece(const Call<Codec>& call, int64_t piece) {
  const Active& active = call.active[piece / call.blocks];
  const int64_t row = piece % call.blocks * call.rows_per_block;
  Rows rows;
  rows.count = std::min(call.rows_per_block, call.out - row);
  rows.levels = call.levels + call.levels_per_row * (active.expert * call.out + row);
  rows.levels_per_row = call.levels_per_row;
  rows.row_bytes = call.row_bytes;
  rows.log2_rows_per_stream = call.codec.Log2RowsPerStream(rows.count);
  const int64_t rows_per_stream = std::min(rows.count, int64_t{1} << rows.log2_rows_per_stream);
  rows.stream_bytes = rows_per_stream * call.row_bytes + 2 * Codec::kSlack;
  const int64_t turns = (rows.count - 1) / (Codec::kStreams * rows_per_stream) + 1;
  rows.parts = call.codec.Parts();
  rows.part_bytes = turns * Codec::kStreams * rows.stream_bytes;
  rows.symbols = ThreadBuffer(rows.parts * rows.part_bytes) + Codec::kSlack;
  rows.x_stride = call.x_stride;
  rows.token_stride = rows.parts * call.x_stride;
  rows.x = call.x + active.first_token * rows.token_stride;
  rows.tokens = active.tokens;
  rows.y = call.y + (active.first_token * call.out + row) * (call.is_bfloat16 ? 2 : 4);
  rows.y_stride = call.out;
  typename Codec::Block blocks[kMostParts];
  for (int64_t part = 0; part < rows.parts; ++part) {
    blocks[part] = call.codec.At(active.expert, part, active.first_code, row, rows.count);
  }
  call.multiply(blocks, rows);
}

// One token, float32 or bfloat16 [width], as blocks of [kSymbols, kLanesPerBlock].
template <int64_t kSymbols, typename Input>
void ArrangeToken(const Input* from, int64_t width, float* to, int64_t stride) {
  const auto value = [](Input x) {
    if constexpr (sizeof(Input) == 2) {
      return FromBfloat16(x);
    } else {
      return x;
    }
  };
  constexpr int64_t kBlock = kSymbols * kLanesPerBlock;
  const int64_t whole = width / kBlock * kBlock;
  for (int64_t i = 0; i < whole; i += kBlock) {
    for (int64_t k = 0; k < kSymbols; ++k) {
      for (int64_t lane = 0; lane < kLanesPerBlock; ++lane) {
        to[i + k * kLanesPerBlock + lane] = value(from[i + lane * kSymbols + k]);
      }
    }
  }
  std::fill(to + whole, to + stride, 0.0f);
  for (int64_t i = 0; i < width - whole; ++i) {
    to[whole + i % kSymbols * kLanesPerBlock + i / kSymbols] = value(from[whole + i]);
  }
}

// What a thread does in a call: it arranges tokens, and multiplies pieces when all tokens are arranged.
template <typename Codec>
void Work(Call<Codec>& call) {
  for (int64_t token; (token = call.next_token.fetch_add(1)) < call.assigned;) {
    float* to = call.x + token * call.x_stride;
    if (call.is_bfloat16) {
      const auto* from = reinterpret_cast<const uint16_t*>(call.lhs) + token * call.width;
      ArrangeToken<4 * Codec::kSymbolsPerByte>(from, call.width, to, call.x_stride);
    } else {
      const auto* from = reinterpret_cast<const float*>(call.lhs) + token * call.width;
      ArrangeToken<4 * Codec::kSymbolsPerByte>(from, call.width, to, call.x_stride);
    }
    call.arranged.fetch_add(1, std::memory_order_release);
  }
  while (call.arranged.load(std::memory_order_acquire) < call.assigned) std::this_thread::yield();
  for (int64_t piece; (piece = call.next_piece.fetch_add(1)) < call.pieces;) {
    MultiplyPiece(call, piece);
    call.done.fetch_add(1, std::memory_order_release);
  }
}

// Threads of the pool that have helped and stay awake for a moment: the next call, by the experts' next matrix, comes
// soon, and waking a thread takes about as long as the half of a small product.
template <typename Codec>
class Helpers {
 public:
  using Shared = std::shared_ptr<Call<Codec>>;

  static Helpers& Get() {
    static Helpers* helpers = new Helpers;  // Never destroyed: threads may outlive main.
    return *helpers;
  }

  // Hands the call to at most `wanted` waiting threads; returns to how many.
  int64_t Share(const Shared& call, int64_t wanted) {
    int64_t waiting = waiting_.load(), taken;
    do {
      taken = std::min(waiting, wanted);
    } while (taken > 0 && !waiting_.compare_exchange_weak(waiting, waiting - taken));
    if (taken > 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      shared_.insert(shared_.end(), taken, call);
      count_.store(shared_.size(), std::memory_order_release);
    }
    return taken;
  }

  void Help(Shared call) {
    for (; call != nullptr; call = Wait()) Work(*call);
  }

 private:
  // The next call, or null when none came.
  Shared Wait() {
    waiting_.fetch_add(1);
    const auto until = std::chrono::steady_clock::now() + kPatience;
    for (;;) {
      for (int i = 0; i < 64; ++i) {
        if (count_.load(std::memory_order_acquire) > 0) {
          if (Shared call = Take()) return call;
        }
        Pause();
      }
      if (std::chrono::steady_clock::now() < until) continue;
      // Whoever lowered the count meanwhile has a call for a thread, and this may be the last one.
      for (int64_t waiting = waiting_.load(); waiting > 0;) {
        if (waiting_.compare_exchange_weak(waiting, waiting - 1)) return nullptr;
      }
    }
  }

  Shared Take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (shared_.empty()) return nullptr;
    Shared call = std::move(shared_.back());
    shared_.pop_back();
    count_.store(shared_.size(), std::memory_order_release);
    return call;
  }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr std::chrono::microseconds kPatience{50};

  std::atomic<int64_t> waiting_{0};  // threads that wait and that no call was promised to
  std::atomic<size_t> count_{0};     // of shared_
  std::mutex mutex_;
  std::vector<Shared> shared_;
};

// Works on the calling thread and on the pool's. Does not wait for helpers that never got to run: those find
// no work left and touch nothing but `call`.
template <typename Codec>
void WorkTogether(const std::shared_ptr<Call<Codec>>& call, ffi::ThreadPool& pool, int64_t threads) {
  auto& helpers = Helpers<Codec>::Get();
  for (int64_t i = 1 + helpers.Share(call, threads - 1); i < threads; ++i) {
    pool.Schedule([call, &helpers] { helpers.Help(call); });
  }
  Work(*call);
  while (call->done.load(std::memory_order_acquire) < call->pieces) std::this_thread::yield();
}

// The custom call, once the codec's own arrays are known to fit `experts` and `out`.
template <typename Codec>
ffi::Error CompressedRaggedDot(ffi::ThreadPool& pool, const InstructionSet<typename Codec::Block>* set,
                               const Codec& codec, ffi::AnyBuffer lhs, ffi::Buffer<ffi::BF16> levels,
                               ffi::Buffer<ffi::S32> group_sizes, ffi::Result<ffi::AnyBuffer> result,
                               ffi::ResultBuffer<ffi::U8> scratch) {
  if (set == nullptr) return ffi::Error::InvalidArgument("this machine lacks the instruction set named");
  const auto x_shape = lhs.dimensions(), y_shape = result->dimensions(), levels_shape = levels.dimensions();
  if (x_shape.size() != 2 || y_shape.size() != 2 || levels_shape.size() != 3) {
    return ffi::Error::InvalidArgument("expected lhs [tokens, in], levels [experts, out, L] and a result "
                                       "[tokens, out]");
  }
  const int64_t tokens = x_shape[0], experts = levels_shape[0], out = y_shape[1];
  const int64_t parts = codec.Parts(), width = x_shape[1] / parts;
  const bool is_bfloat16 = lhs.element_type() == ffi::BF16;
  if (y_shape[0] != tokens || x_shape[1] != width * parts || levels_shape[1] != out || levels_shape[2] < 2 || levels_shape[2] > codec.MostLevels() ||
      static_cast<int64_t>(group_sizes.element_count()) != experts ||
      result->element_type() != lhs.element_type() || (!is_bfloat16 && lhs.element_type() != ffi::F32)) {
    return ffi::Error::InvalidArgument("shapes or dtypes of lhs, levels, group_sizes and the result differ");
  }

  auto call = std::make_shared<Call<Codec>>();
  call->codec = codec;
  call->levels = reinterpret_cast<const uint16_t*>(levels.typed_data());
  call->levels_per_row = levels_shape[2];
  call->out = out;
  call->width = width;
  call->row_bytes = (width + Codec::kSymbolsPerByte - 1) / Codec::kSymbolsPerByte;
  constexpr int64_t kBlock = 4 * Codec::kSymbolsPerByte * kLanesPerBlock;
  call->x_stride = (width + kBlock - 1) / kBlock * kBlock;
  call->lhs = static_cast<const char*>(lhs.untyped_data());
  call->is_bfloat16 = is_bfloat16;
  call->y = static_cast<char*>(result->untyped_data());
  call->multiply = is_bfloat16 ? set->multiply_bfloat16 : set->multiply_float32;

  // Scratch: first the tokens, then the active experts. ../../__init__.py allots it.
  const int64_t most_active = std::min(experts, tokens);
  const int64_t needed = most_active * static_cast<int64_t>(sizeof(Active)) + 4 * tokens * parts * call->x_stride + 64;
  if (static_cast<int64_t>(scratch->element_count()) < needed) {
    return ffi::Error::InvalidArgument("scratch is too small");
  }
  const auto aligned = (reinterpret_cast<uintptr_t>(scratch->typed_data()) + 63) / 64 * 64;
  call->x = reinterpret_cast<float*>(aligned);
  Active* active = reinterpret_cast<Active*>(call->x + tokens * parts * call->x_stride);
  call->active = active;

  // Sizes below zero count as none, and tokens that are not there are not promised to anyone.
  int64_t actives = 0, assigned = 0, first_code = 0, most_tokens = 0;
  for (int64_t e = 0; e < experts && assigned < tokens; ++e) {
    const int64_t own = std::clamp<int64_t>(group_sizes.typed_data()[e], 0, tokens - assigned);
    if (own > 0) {
      active[actives++] = {e, 0, first_code, assigned, own};
      assigned += own;
      most_tokens = std::max(most_tokens, own);
    }
    first_code += codec.Size(e);
  }
  call->assigned = assigned * parts;
  const int64_t itemsize = is_bfloat16 ? 2 : 4;
  const int64_t unassigned_bytes = (tokens - assigned) * out * itemsize;
  if (unassigned_bytes > 0) std::memset(call->y + assigned * out * itemsize, 0, unassigned_bytes);
  if (assigned == 0 || out == 0) return ffi::Error::Success();

  const int64_t work = assigned * out * parts * width;
  const int64_t threads = std::clamp<int64_t>(work / kWorkPerThread, 1, std::max<int64_t>(1, pool.num_threads()));
  // Enough blocks that all threads end at about the same time.
  const int64_t bytes = most_tokens <= kFewTokens ? Codec::kBytesFewTokens : kBytesManyTokens;
  const int64_t fitting = bytes / std::max<int64_t>(1, parts * call->row_bytes);
  const int64_t share = threads == 1 ? out : out * actives / (kPiecesPerThread * threads);
  call->rows_per_block = codec.RowsPerBlock(std::min(fitting, share));
  call->blocks = (out + call->rows_per_block - 1) / call->rows_per_block;
  call->pieces = actives * call->blocks;
  WorkTogether(call, pool, std::min(threads, call->pieces));
  return ffi::Error::Success();
}

}  // namespace

#endif  // QMOE_COMPRESSED_RAGGED_DOT_H_
