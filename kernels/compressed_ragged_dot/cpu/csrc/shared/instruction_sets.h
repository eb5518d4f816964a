// Code for each instruction set. A codec's source includes this once, inside its unnamed namespace, where it has
// defined kSymbolsPerByte, kSymbolBits (of a byte's first symbol, where it holds two: 2 or 4), kMostLevels, Block, and the
// macro QMOE_DECODE: the file with `Decode(block, rows)`, as seen from here.
//
// That file, multiply_rows.h and multiply_columns.h are included inside a namespace per instruction set, which says
//
//   kLanes                       floats in a vector; divides kLanesPerBlock
//   kMaxTokens                   tokens multiplied at once
//   RowsAtOnce(tokens)           rows multiplied at once
//   SumsAtOnce(tokens)           sums of each row and token, as one has to wait for the one before it; all have to fit
//                                the registers
//   Vector, Codes                floats; integers
//   FewLevels, ManyLevels        what a row's symbols stand for: up to 3, up to 15
//   LoadLevels(levels, number, &to)  from bfloat16
//   LoadCodes(bytes)             four bytes per lane
//   ShiftRight(codes, bits)      in each lane
//   Weights(levels, codes)       chooses by the lowest two (ManyLevels: four) bits of each lane
//   Zero(), Load(floats), Add(a, b), MultiplyAdd(a, b, c) = a * b + c, Sum(vector)
//   SpreadNibbles(from, to)      writes 16 bytes, whose lowest four bits are the nibbles of eight bytes
//   SpreadSymbols(word, to)      writes bits 8 to 55 as the lowest two bits of 24 bytes, and at most 8 bytes more; may
//                                read one byte after the word

// What symbols 0 to 15 stand for.
struct LevelTable {
  alignas(64) float values[16] = {};

  LevelTable() = default;
  LevelTable(const uint16_t* levels, int64_t number) {
    for (int64_t k = 0; k < number; ++k) values[k + 1] = FromBfloat16(levels[k]);
  }
};

namespace portable {

constexpr int kLanes = 4;
constexpr int kMaxTokens = 4;
constexpr int RowsAtOnce(int) { return 2; }
constexpr int SumsAtOnce(int) { return 1; }

using Vector = float __attribute__((vector_size(16)));
using Codes = uint32_t __attribute__((vector_size(16)));
// Of symbol 3 here: what remains of it after the exclusive or of the other two.
struct FewLevels {
  Codes symbol1, symbol2, symbol3;
};
using ManyLevels = LevelTable;

inline void LoadLevels(const uint16_t* levels, int64_t number, FewLevels* to) {
  const uint32_t first = levels[0], second = levels[1], third = number == 3 ? first ^ second ^ levels[2] : 0;
  *to = {Codes{} + (first << 16), Codes{} + (second << 16), Codes{} + (third << 16)};
}
inline void LoadLevels(const uint16_t* levels, int64_t number, ManyLevels* to) { *to = LevelTable(levels, number); }
inline Codes LoadCodes(const uint8_t* bytes) {
  Codes codes;
  std::memcpy(&codes, bytes, sizeof(codes));
  return codes;
}
inline Codes ShiftRight(Codes codes, int bits) { return codes >> bits; }
inline Vector Weights(const FewLevels& levels, Codes codes) {
  const Codes low = Codes{} - (codes & 1), high = Codes{} - (codes >> 1 & 1);
  Codes weights = (low & levels.symbol1) ^ (high & levels.symbol2);
  if constexpr (kMostLevels >= 3) weights ^= low & high & levels.symbol3;
  return reinterpret_cast<Vector>(weights);
}
inline Vector Weights(const ManyLevels& levels, Codes codes) {
  const float* of = levels.values;
  return Vector{of[codes[0] & 15], of[codes[1] & 15], of[codes[2] & 15], of[codes[3] & 15]};
}
inline Vector Zero() { return Vector{}; }
inline Vector Load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline Vector Add(Vector a, Vector b) { return a + b; }
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) { return a * b + c; }
inline float Sum(Vector v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline void SpreadNibbles(const void* from, uint8_t* to) {
  for (int half = 0; half < 2; ++half) {
    uint32_t part;
    std::memcpy(&part, static_cast<const uint8_t*>(from) + 4 * half, sizeof(part));
    uint64_t v = part;
    v = (v | v << 16) & 0x0000ffff0000ffff;
    v = (v | v << 8) & 0x00ff00ff00ff00ff;
    v |= v << 4;
    std::memcpy(to + 8 * half, &v, sizeof(v));
  }
}
inline void SpreadSymbols(const uint64_t* word, uint8_t* to) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(word) + 1;
  for (int i = 0; i < 6; i += 2) {
    uint64_t v = bytes[i] | static_cast<uint64_t>(bytes[i + 1]) << 32;
    v |= v << 6;
    v |= v << 12;
    std::memcpy(to + 4 * i, &v, sizeof(v));
  }
}

#include QMOE_DECODE
#include "multiply_columns.h"
#include "multiply_rows.h"

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

QMOE_TARGET("avx2,fma,bmi,bmi2,lzcnt")
namespace avx2 {

constexpr int kLanes = 8;
constexpr int kMaxTokens = 4;
constexpr int RowsAtOnce(int tokens) { return tokens == 1 ? 4 : 2; }
constexpr int SumsAtOnce(int) { return 1; }

using Vector = __m256;
using Codes = __m256i;
using FewLevels = __m256;
struct ManyLevels {
  __m256 low, high;  // symbols 0 to 7, 8 to 15
};

inline void LoadLevels(const uint16_t* levels, int64_t number, FewLevels* to) {
  const __m128 row = _mm_setr_ps(0, FromBfloat16(levels[0]), FromBfloat16(levels[1]),
                                 number == 3 ? FromBfloat16(levels[2]) : 0);
  *to = _mm256_broadcast_ps(&row);
}
inline void LoadLevels(const uint16_t* levels, int64_t number, ManyLevels* to) {
  const LevelTable table(levels, number);
  *to = {_mm256_loadu_ps(table.values), _mm256_loadu_ps(table.values + 8)};
}
inline Codes LoadCodes(const uint8_t* bytes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
}
inline Codes ShiftRight(Codes codes, int bits) { return _mm256_srli_epi32(codes, bits); }
inline Vector Weights(FewLevels levels, Codes codes) { return _mm256_permutevar_ps(levels, codes); }
inline Vector Weights(const ManyLevels& levels, Codes codes) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(levels.low, codes), _mm256_permutevar8x32_ps(levels.high, codes),
                          _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
inline Vector Zero() { return _mm256_setzero_ps(); }
inline Vector Load(const float* from) { return _mm256_loadu_ps(from); }
inline Vector Add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline float Sum(Vector v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline void SpreadNibbles(const void* from, uint8_t* to) {
  const __m128i even = _mm_loadl_epi64(static_cast<const __m128i*>(from));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi8(even, _mm_srli_epi16(even, 4)));
}
inline void SpreadSymbols(const uint64_t* word, uint8_t* to) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(word) + 1;
  __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  v = _mm256_or_si256(v, _mm256_slli_epi32(v, 6));
  v = _mm256_or_si256(v, _mm256_slli_epi32(v, 12));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
}

#include QMOE_DECODE
#include "multiply_columns.h"
#include "multiply_rows.h"

}  // namespace avx2
QMOE_TARGET_END

QMOE_TARGET("avx512f,avx512vl,avx512vbmi,avx2,fma,bmi,bmi2,lzcnt")
namespace avx512 {

constexpr int kLanes = 16;
constexpr int kMaxTokens = 4;
constexpr int RowsAtOnce(int) { return 4; }
constexpr int SumsAtOnce(int tokens) { return tokens == 1 ? 2 : 1; }

using Vector = __m512;
using Codes = __m512i;
using FewLevels = __m512;
struct ManyLevels {
  __m512 values;
};

inline void LoadLevels(const uint16_t* levels, int64_t number, FewLevels* to) {
  *to = _mm512_broadcast_f32x4(_mm_setr_ps(0, FromBfloat16(levels[0]), FromBfloat16(levels[1]),
                                           number == 3 ? FromBfloat16(levels[2]) : 0));
}
inline void LoadLevels(const uint16_t* levels, int64_t number, ManyLevels* to) {
  to->values = _mm512_loadu_ps(LevelTable(levels, number).values);
}
inline Codes LoadCodes(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
inline Codes ShiftRight(Codes codes, int bits) { return _mm512_srli_epi32(codes, bits); }
inline Vector Weights(FewLevels levels, Codes codes) { return _mm512_permutevar_ps(levels, codes); }
inline Vector Weights(const ManyLevels& levels, Codes codes) {
  return _mm512_permutexvar_ps(codes, levels.values);
}
inline Vector Zero() { return _mm512_setzero_ps(); }
inline Vector Load(const float* from) { return _mm512_loadu_ps(from); }
inline Vector Add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline float Sum(Vector v) { return _mm512_reduce_add_ps(v); }
inline void SpreadNibbles(const void* from, uint8_t* to) { avx2::SpreadNibbles(from, to); }
inline void SpreadSymbols(const uint64_t* word, uint8_t* to) {
  const __m256i first_bits = _mm256_setr_epi64x(0x161412100e0c0a08, 0x262422201e1c1a18, 0x363432302e2c2a28, 0);
  const __m256i v = _mm256_multishift_epi64_epi8(first_bits, _mm256_set1_epi64x(*word));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
}

#include QMOE_DECODE
#include "multiply_columns.h"
#include "multiply_rows.h"

}  // namespace avx512
QMOE_TARGET_END

#endif  // __x86_64__

// The instruction set of that name, the best one for "auto"; null where this machine lacks it.
inline const InstructionSet<Block>* FindInstructionSet(std::string_view name) {
  const std::string_view chosen = ChooseInstructionSet(name);
#if defined(__x86_64__)
  if (chosen == "avx512") return &avx512::kSet;
  if (chosen == "avx2") return &avx2::kSet;
#endif
  return chosen == "portable" ? &portable::kSet : nullptr;
}
