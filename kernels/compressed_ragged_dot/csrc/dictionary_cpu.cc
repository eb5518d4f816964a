// Tokens sorted by expert, times experts compressed by the dictionary codec: an XLA FFI custom call for CPU.
//
// Built without a particular machine in mind; the instruction set is chosen at run time. Loaded by ctypes from
// ../cpu.py, which also says what the arguments are.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <thread>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

namespace ffi = xla::ffi;

// Tokens are stored in blocks of 2 * kHalf elements: the first elements of kHalf pairs, then the second ones.
constexpr int64_t kHalf = 16;
// How far decoding, and reading whole vectors, may go past the last pair.
constexpr int64_t kSlack = 128;
// How many codewords ahead memory is fetched: 2 KB, or about 10 us.
constexpr int64_t kPrefetch = 1024;
// Decoded bytes of a block of rows: for few tokens within the first-level cache, for many within half of the
// second, because every block reads all tokens of its expert again.
constexpr int64_t kFewTokens = 8;
constexpr int64_t kPairsFewTokens = 12 << 10;
constexpr int64_t kPairsManyTokens = 192 << 10;
// Weights times tokens below which waking another thread costs more than it saves.
constexpr int64_t kWorkPerThread = 100'000;

// The dictionary: 14 pairs of trits of four bits each (two for the first, two for the second), in the last byte
// how many of them there are. Filled once by QmoeSetDictionary.
struct alignas(64) Table {
  uint64_t entries[65'536];
};
Table table;

inline int64_t Length(const uint64_t* entry) { return reinterpret_cast<const uint8_t*>(entry)[7]; }

// A block of rows of one expert, and that expert's tokens.
struct Rows {
  const uint16_t* codewords;
  const uint16_t* codewords_end;
  const uint16_t* levels;  // bfloat16 [count, 2]
  int64_t count;
  int64_t pairs_per_row;
  uint8_t* pairs;    // [count, pairs_per_row] and kSlack more bytes, written here
  const float* x;    // [tokens, x_stride], padded with zeros
  int64_t x_stride;  // a multiple of 2 * kHalf
  int64_t tokens;
  void* y;           // [tokens, y_stride]
  int64_t y_stride;
};

using MultiplyRows = void (*)(const Rows&);

struct InstructionSet {
  MultiplyRows multiply_float32;
  MultiplyRows multiply_bfloat16;
};

float FromBfloat16(uint16_t bits) {
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

// --- Instruction sets -------------------------------------------------------------------------------------

namespace portable {

constexpr int kLanes = 4;
constexpr int kMaxTokens = 4;
constexpr int RowsAtOnce(int) { return 2; }

using Vector = float __attribute__((vector_size(16)));
using Codes = uint32_t __attribute__((vector_size(16)));
struct Levels {
  Codes low, high;
};

inline Levels LoadLevels(const uint16_t* levels) {
  return {Codes{} + (static_cast<uint32_t>(levels[0]) << 16), Codes{} + (static_cast<uint32_t>(levels[1]) << 16)};
}
inline Codes LoadCodes(const uint8_t* bytes) { return Codes{bytes[0], bytes[1], bytes[2], bytes[3]}; }
inline Codes SecondTrits(Codes codes) { return codes >> 2; }
inline Vector Weights(Levels levels, Codes codes) {
  const Codes low = Codes{} - (codes & 1), high = Codes{} - (codes >> 1 & 1);
  return reinterpret_cast<Vector>((low & levels.low) | (high & levels.high));
}
inline Vector Zero() { return Vector{}; }
inline Vector Load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) { return a * b + c; }
inline float Sum(Vector v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline void SpreadNibbles(const uint64_t* word, uint8_t* to) {
  for (int half = 0; half < 2; ++half) {
    uint64_t v = *word >> (32 * half) & 0xffffffff;
    v = (v | v << 16) & 0x0000ffff0000ffff;
    v = (v | v << 8) & 0x00ff00ff00ff00ff;
    v |= v << 4;
    std::memcpy(to + 8 * half, &v, sizeof(v));
  }
}

#include "dictionary_rows.h"

constexpr InstructionSet kSet = {Multiply<float>, Multiply<uint16_t>};

}  // namespace portable

#if defined(__x86_64__)

// Functions up to QMOE_TARGET_END may use the instructions named.
#if defined(__clang__)
#define QMOE_PRAGMA(text) _Pragma(#text)
#define QMOE_TARGET(names) QMOE_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define QMOE_TARGET_END _Pragma("clang attribute pop")
#else
#define QMOE_PRAGMA(text) _Pragma(#text)
#define QMOE_TARGET(names) _Pragma("GCC push_options") QMOE_PRAGMA(GCC target(names))
#define QMOE_TARGET_END _Pragma("GCC pop_options")
#endif

QMOE_TARGET("avx2,fma")
namespace avx2 {

constexpr int kLanes = 8;
constexpr int kMaxTokens = 4;
constexpr int RowsAtOnce(int tokens) { return tokens == 1 ? 4 : 2; }

using Vector = __m256;
using Codes = __m256i;
using Levels = __m256;

inline Levels LoadLevels(const uint16_t* levels) {
  const __m128 row = _mm_setr_ps(0, FromBfloat16(levels[0]), FromBfloat16(levels[1]), 0);
  return _mm256_broadcast_ps(&row);
}
inline Codes LoadCodes(const uint8_t* bytes) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
}
inline Codes SecondTrits(Codes codes) { return _mm256_srli_epi32(codes, 2); }
inline Vector Weights(Levels levels, Codes codes) { return _mm256_permutevar_ps(levels, codes); }
inline Vector Zero() { return _mm256_setzero_ps(); }
inline Vector Load(const float* from) { return _mm256_loadu_ps(from); }
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline float Sum(Vector v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline void SpreadNibbles(const uint64_t* word, uint8_t* to) {
  const __m128i even = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(word));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi8(even, _mm_srli_epi16(even, 4)));
}

#include "dictionary_rows.h"

constexpr InstructionSet kSet = {Multiply<float>, Multiply<uint16_t>};

}  // namespace avx2
QMOE_TARGET_END

QMOE_TARGET("avx512f,avx2,fma")
namespace avx512 {

constexpr int kLanes = 16;
constexpr int kMaxTokens = 4;
constexpr int RowsAtOnce(int) { return 4; }

using Vector = __m512;
using Codes = __m512i;
using Levels = __m512;

inline Levels LoadLevels(const uint16_t* levels) {
  return _mm512_broadcast_f32x4(_mm_setr_ps(0, FromBfloat16(levels[0]), FromBfloat16(levels[1]), 0));
}
inline Codes LoadCodes(const uint8_t* bytes) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}
inline Codes SecondTrits(Codes codes) { return _mm512_srli_epi32(codes, 2); }
inline Vector Weights(Levels levels, Codes codes) { return _mm512_permutevar_ps(levels, codes); }
inline Vector Zero() { return _mm512_setzero_ps(); }
inline Vector Load(const float* from) { return _mm512_loadu_ps(from); }
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline float Sum(Vector v) { return _mm512_reduce_add_ps(v); }
inline void SpreadNibbles(const uint64_t* word, uint8_t* to) {
  const __m128i even = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(word));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi8(even, _mm_srli_epi16(even, 4)));
}

#include "dictionary_rows.h"

constexpr InstructionSet kSet = {Multiply<float>, Multiply<uint16_t>};

}  // namespace avx512
QMOE_TARGET_END

#endif  // __x86_64__

// The instruction set of that name, the best one for "auto"; null where this machine lacks it.
const InstructionSet* FindInstructionSet(std::string_view name) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f");
  if (has_avx512 && (name == "avx512" || name == "auto")) return &avx512::kSet;
  if (has_avx2 && (name == "avx2" || name == "auto")) return &avx2::kSet;
#endif
  return name == "portable" || name == "auto" ? &portable::kSet : nullptr;
}

// --- One call: all active experts -------------------------------------------------------------------------

// An expert with tokens.
struct Active {
  int64_t expert;
  int64_t first_codeword;
  int64_t first_token;
  int64_t tokens;
};

// What all threads of a call share. A block of rows of an active expert is one piece of work.
struct Call {
  const uint16_t* codewords;
  int64_t codewords_size;
  const int32_t* row_offsets;  // [experts, out + 1]
  const uint16_t* levels;      // bfloat16 [experts, out, 2]
  int64_t out;
  int64_t pairs_per_row;
  const float* x;  // [tokens, x_stride]
  int64_t x_stride;
  char* y;  // [tokens, out]
  int64_t y_itemsize;
  const Active* active;
  int64_t rows_per_block;
  int64_t blocks;  // of an expert
  int64_t pieces;
  MultiplyRows multiply;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
};

// Memory for `size` bytes that stays with the thread, so that calls of equal size allocate it once.
uint8_t* ThreadBuffer(int64_t size) {
  thread_local std::unique_ptr<uint8_t[]> buffer;
  thread_local int64_t capacity = 0;
  if (capacity < size) {
    buffer.reset(new uint8_t[size]());
    capacity = size;
  }
  return buffer.get();
}

void MultiplyPiece(const Call& call, int64_t piece) {
  const Active& active = call.active[piece / call.blocks];
  const int64_t row = piece % call.blocks * call.rows_per_block;
  const int64_t count = std::min(call.rows_per_block, call.out - row);
  const int32_t* offsets = call.row_offsets + active.expert * (call.out + 1) + row;
  // Without effect on streams that were checked; with others, results are wrong but nothing else is touched.
  const auto codeword = [&](int64_t offset) {
    return call.codewords + std::clamp<int64_t>(active.first_codeword + offset, 0, call.codewords_size);
  };
  Rows rows;
  rows.codewords = codeword(offsets[0]);
  rows.codewords_end = codeword(offsets[count]);
  rows.levels = call.levels + 2 * (active.expert * call.out + row);
  rows.count = count;
  rows.pairs_per_row = call.pairs_per_row;
  rows.pairs = ThreadBuffer(call.rows_per_block * call.pairs_per_row + kSlack);
  rows.x = call.x + active.first_token * call.x_stride;
  rows.x_stride = call.x_stride;
  rows.tokens = active.tokens;
  rows.y = call.y + (active.first_token * call.out + row) * call.y_itemsize;
  rows.y_stride = call.out;
  call.multiply(rows);
}

void Work(Call& call) {
  for (int64_t piece; (piece = call.next.fetch_add(1)) < call.pieces;) {
    MultiplyPiece(call, piece);
    call.done.fetch_add(1, std::memory_order_release);
  }
}

// Works on the calling thread and on the pool's. Does not wait for helpers that never got to run: those find
// no work left and touch nothing but `call`.
void WorkTogether(const std::shared_ptr<Call>& call, ffi::ThreadPool& pool, int64_t threads) {
  for (int64_t i = 1; i < threads; ++i) {
    pool.Schedule([call] { Work(*call); });
  }
  Work(*call);
  while (call->done.load(std::memory_order_acquire) < call->pieces) std::this_thread::yield();
}

// One token, float32 or bfloat16 [width], as blocks of first and second elements of pairs.
template <typename Input>
void ArrangeToken(const Input* from, int64_t width, float* to, int64_t stride) {
  const auto value = [](Input x) {
    if constexpr (sizeof(Input) == 2) {
      return FromBfloat16(x);
    } else {
      return x;
    }
  };
  const int64_t whole = width / (2 * kHalf) * (2 * kHalf);
  for (int64_t i = 0; i < whole; i += 2 * kHalf) {
    for (int64_t j = 0; j < kHalf; ++j) {
      to[i + j] = value(from[i + 2 * j]);
      to[i + kHalf + j] = value(from[i + 2 * j + 1]);
    }
  }
  std::fill(to + whole, to + stride, 0.0f);
  for (int64_t i = whole; i < width; ++i) to[whole + (i - whole) / 2 + i % 2 * kHalf] = value(from[i]);
}

ffi::Error CompressedRaggedDot(ffi::ThreadPool pool, std::string_view isa, ffi::AnyBuffer lhs,
                               ffi::Buffer<ffi::U16> codewords, ffi::Buffer<ffi::S32> row_offsets,
                               ffi::Buffer<ffi::BF16> levels, ffi::Buffer<ffi::S32> group_sizes,
                               ffi::Result<ffi::AnyBuffer> result, ffi::ResultBuffer<ffi::U8> scratch) {
  const auto x_shape = lhs.dimensions(), y_shape = result->dimensions(), rows_shape = row_offsets.dimensions(),
             levels_shape = levels.dimensions();
  if (x_shape.size() != 2 || y_shape.size() != 2 || rows_shape.size() != 2 || levels_shape.size() != 3) {
    return ffi::Error::InvalidArgument("expected lhs [tokens, in], row_offsets [experts, out + 1], "
                                       "levels [experts, out, 2] and a result [tokens, out]");
  }
  const int64_t tokens = x_shape[0], width = x_shape[1], experts = rows_shape[0], out = y_shape[1];
  const bool is_bfloat16 = lhs.element_type() == ffi::BF16;
  if (y_shape[0] != tokens || rows_shape[1] != out + 1 || levels_shape[0] != experts || levels_shape[1] != out ||
      levels_shape[2] != 2 || static_cast<int64_t>(group_sizes.element_count()) != experts ||
      result->element_type() != lhs.element_type() || (!is_bfloat16 && lhs.element_type() != ffi::F32)) {
    return ffi::Error::InvalidArgument("shapes or dtypes of lhs, row_offsets, levels, group_sizes and the result differ");
  }
  const InstructionSet* set = FindInstructionSet(isa);
  if (set == nullptr) return ffi::Error::InvalidArgument("this machine lacks instruction set " + std::string(isa));

  auto call = std::make_shared<Call>();
  call->codewords = codewords.typed_data();
  call->codewords_size = static_cast<int64_t>(codewords.element_count());
  call->row_offsets = row_offsets.typed_data();
  call->levels = reinterpret_cast<const uint16_t*>(levels.typed_data());
  call->out = out;
  call->pairs_per_row = (width + 1) / 2;
  call->x_stride = (width + 2 * kHalf - 1) / (2 * kHalf) * (2 * kHalf);
  call->y = static_cast<char*>(result->untyped_data());
  call->y_itemsize = is_bfloat16 ? 2 : 4;
  call->multiply = is_bfloat16 ? set->multiply_bfloat16 : set->multiply_float32;

  // Scratch: first the active experts, then the tokens. cpu.py allots it.
  const int64_t most_active = std::min(experts, tokens);
  const int64_t needed = most_active * static_cast<int64_t>(sizeof(Active)) + 4 * tokens * call->x_stride + 64;
  if (static_cast<int64_t>(scratch->element_count()) < needed) {
    return ffi::Error::InvalidArgument("scratch is too small");
  }
  const auto aligned = (reinterpret_cast<uintptr_t>(scratch->typed_data()) + 63) / 64 * 64;
  float* x = reinterpret_cast<float*>(aligned);
  Active* active = reinterpret_cast<Active*>(x + tokens * call->x_stride);
  call->x = x;
  call->active = active;

  // Sizes below zero count as none, and tokens that are not there are not promised to anyone.
  int64_t actives = 0, assigned = 0, first_codeword = 0, most_tokens = 0;
  for (int64_t e = 0; e < experts && assigned < tokens; ++e) {
    const int64_t own = std::clamp<int64_t>(group_sizes.typed_data()[e], 0, tokens - assigned);
    if (own > 0) {
      active[actives++] = {e, first_codeword, assigned, own};
      assigned += own;
      most_tokens = std::max(most_tokens, own);
    }
    first_codeword += call->row_offsets[e * (out + 1) + out];
  }
  const int64_t unassigned_bytes = (tokens - assigned) * out * call->y_itemsize;
  if (unassigned_bytes > 0) std::memset(call->y + assigned * out * call->y_itemsize, 0, unassigned_bytes);
  if (assigned == 0 || out == 0) return ffi::Error::Success();

  for (int64_t t = 0; t < assigned; ++t) {
    float* to = x + t * call->x_stride;
    if (is_bfloat16) {
      ArrangeToken(static_cast<const uint16_t*>(lhs.untyped_data()) + t * width, width, to, call->x_stride);
    } else {
      ArrangeToken(static_cast<const float*>(lhs.untyped_data()) + t * width, width, to, call->x_stride);
    }
  }

  const int64_t work = assigned * out * width;
  const int64_t threads = std::clamp<int64_t>(work / kWorkPerThread, 1, std::max<int64_t>(1, pool.num_threads()));
  // Whole tiles of four rows, and enough blocks that all threads end at about the same time.
  const int64_t bytes = most_tokens <= kFewTokens ? kPairsFewTokens : kPairsManyTokens;
  const int64_t fitting = std::max<int64_t>(4, bytes / std::max<int64_t>(1, call->pairs_per_row) / 4 * 4);
  const int64_t share = threads == 1 ? out : (out * actives / (8 * threads) + 4) / 4 * 4;
  call->rows_per_block = std::min(fitting, std::max<int64_t>(4, share));
  call->blocks = (out + call->rows_per_block - 1) / call->rows_per_block;
  call->pieces = actives * call->blocks;
  WorkTogether(call, pool, std::min(threads, call->pieces));
  return ffi::Error::Success();
}

}  // namespace

extern "C" void QmoeSetDictionary(const uint64_t* entries) { std::memcpy(table.entries, entries, sizeof(table)); }

extern "C" bool QmoeHasInstructionSet(const char* name) { return FindInstructionSet(name) != nullptr; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(QmoeCompressedRaggedDot, CompressedRaggedDot,
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
