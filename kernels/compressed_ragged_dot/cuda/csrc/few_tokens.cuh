// Few tokens of an expert: a thread takes a segment of a row, and gathers the tokens' values at its non-zeros from shared
// memory. A block of threads takes the same segment of `passes` times kThreads rows, so that what it shares, the table
// and the tokens' values, is copied once for them.

#pragma once

#include "stream.cuh"

namespace qmoe {

constexpr int kLookups = 2;  // of at most 12 bits each, before words are moved on
constexpr int kFewTokens = 8;  // the most of an item

// The tokens' values in a column: of one token, or of up to kFewTokens side by side.
template <typename X>
struct One {
  static constexpr int kTokens = 1;
  struct Column { float value; };

  static __device__ __forceinline__ Column Of(const X (&x)[1]) { return {ToFloat(x[0])}; }
  static __device__ __forceinline__ void Add(float weight, const Column& x, float* sums) { sums[0] += weight * x.value; }
};

template <typename X>
struct Several;

template <>
struct Several<float> {
  static constexpr int kTokens = kFewTokens;
  struct alignas(16) Column { float values[kTokens]; };

  static __device__ __forceinline__ Column Of(const float (&x)[kTokens]) {
    Column column;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) column.values[t] = x[t];
    return column;
  }
  static __device__ __forceinline__ void Add(float weight, const Column& x, float* sums) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sums[t] += weight * x.values[t];
  }
};

template <>
struct Several<uint16_t> {
  static constexpr int kTokens = kFewTokens;
  struct alignas(16) Column { uint32_t pairs[kTokens / 2]; };

  static __device__ __forceinline__ Column Of(const uint16_t (&x)[kTokens]) {
    Column column;
#pragma unroll
    for (int t = 0; t < kTokens; t += 2) column.pairs[t / 2] = x[t] | static_cast<uint32_t>(x[t + 1]) << 16;
    return column;
  }
  static __device__ __forceinline__ void Add(float weight, const Column& x, float* sums) {
#pragma unroll
    for (int t = 0; t < kTokens; t += 2) {
      sums[t] += weight * __uint_as_float(x.pairs[t / 2] << 16);
      sums[t + 1] += weight * __uint_as_float(x.pairs[t / 2] & 0xffff0000u);
    }
  }
};

// 16 bytes of a token's row.
template <typename X>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(X);
  X values[kSize];
};

// x[0 .. kSize) for the columns below `end`, zeros beyond. `aligned`: x is, to 16 bytes, and so is `end`.
template <typename X>
__device__ __forceinline__ Vector<X> LoadVector(const X* x, int column, int end, bool aligned) {
  Vector<X> v = {};
  if (aligned) {
    if (column < end) v = *reinterpret_cast<const Vector<X>*>(x + column);
  } else {
#pragma unroll
    for (int i = 0; i < Vector<X>::kSize; ++i) {
      if (column + i < end) v.values[i] = x[column + i];
    }
  }
  return v;
}

// Shared memory, after FindItem's: the table; kSegment + 1 columns, those from the segment's end on zero; levels.
template <typename Tokens, int kLevels>
constexpr int kFewBytes = (kEntries * sizeof(uint32_t) + (kSegment + 1) * sizeof(typename Tokens::Column) + 15) / 16 * 16 +
                          Levels<kLevels, float>::kSharedBytes;

template <typename X, typename Tokens, int kLevels>
__device__ __forceinline__ void MultiplyRows(const Matrices& a, const X* lhs, float* parts, const Item& item,
                                             int segment, int first_row, int passes, int num_levels, uint4* shared) {
  using Column = typename Tokens::Column;
  const uint32_t* table = reinterpret_cast<const uint32_t*>(shared);
  Column* columns = reinterpret_cast<Column*>(shared + kEntries / 4);
  void* levels_space = reinterpret_cast<char*>(shared) + kFewBytes<Tokens, kLevels> - Levels<kLevels, float>::kSharedBytes;
  const int first_column = segment * a.segment_columns;
  const int end = min(a.segment_columns, a.width - first_column);

  // --- What the block shares. Memory is slow, so the first rows' streams are asked for before.
  int row = first_row + threadIdx.x;
  const auto enter = [&](int row) { return Enter(a, item, min(row, a.out - 1), segment); };
  Stream s = enter(row);
  CopyTable(a, item.expert, segment, reinterpret_cast<uint32_t*>(shared));
  constexpr int kSize = Vector<X>::kSize;
  const X* x = lhs + static_cast<int64_t>(item.start) * a.width + first_column;
  for (int c = threadIdx.x * kSize; c < kSegment; c += kThreads * kSize) {
    Vector<X> v[Tokens::kTokens];
#pragma unroll
    for (int t = 0; t < Tokens::kTokens; ++t) {
      v[t] = LoadVector(x + static_cast<int64_t>(t) * a.width, c, t < item.size ? end : 0, a.width % kSize == 0);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      X column[Tokens::kTokens];
#pragma unroll
      for (int t = 0; t < Tokens::kTokens; ++t) column[t] = v[t].values[i];
      columns[c + i] = Tokens::Of(column);
    }
  }
  if (threadIdx.x == 0) columns[kSegment] = {};
  __syncthreads();

  // --- Rows.
  for (int pass = 0; pass < passes && row < a.out; ++pass, row += kThreads) {
    if (pass > 0) s = enter(row);
    const Levels<kLevels, float> levels(a, static_cast<int64_t>(item.expert) * a.out + row, num_levels, levels_space);
    const auto x_at = [&](uint32_t column) -> const Column& { return columns[min(column, static_cast<uint32_t>(kSegment))]; };
    float sums[Tokens::kTokens] = {};
    while (s.column < end) {
      uint32_t bits = NextBits(s);
#pragma unroll
      for (int i = 0; i < kLookups; ++i) {
        const uint32_t entry = table[Window(bits)];
        bits = Skip(bits, entry);
        s.position += Used(entry);
        const int next = s.column + Weights(entry);
        Tokens::Add(levels.template Of<kFirstShift>(entry), x_at(FirstColumn(entry, s.column)), sums);
        Tokens::Add(levels.template Of<kSecondShift>(entry), x_at(SecondColumn(entry, next)), sums);
        s.column = next;
      }
      Refill(a, s);
    }
    float* y = parts + (static_cast<int64_t>(segment) * a.groups.tokens + item.start) * a.out + row;
#pragma unroll
    for (int t = 0; t < Tokens::kTokens; ++t) {
      if (t < item.size) y[static_cast<int64_t>(t) * a.out] = sums[t];
    }
  }
}

// parts float32 [segments, tokens, out]. Blocks: items x segments x blocks of passes * kThreads rows, the last fastest.
template <typename X, bool kSeveral, int kLevels>
__global__ void __launch_bounds__(kThreads, kSeveral ? 5 : 8)
    FewTokens(const __grid_constant__ Matrices a, const X* lhs, float* parts, int row_blocks, int passes, int num_levels) {
  extern __shared__ uint4 all_shared[];
  uint4* shared = all_shared;
  const int index = blockIdx.x / row_blocks / a.segments;
  const int segment = blockIdx.x / row_blocks % a.segments;
  const int first_row = blockIdx.x % row_blocks * passes * kThreads;
  const Item item = FindItem(a.groups, index, shared);
  ClearUnassigned(a.groups, parts, item, index, segment, first_row, min(passes * kThreads, a.out - first_row), a.out);
  if (item.size == 1) {
    MultiplyRows<X, One<X>, kLevels>(a, lhs, parts, item, segment, first_row, passes, num_levels, shared);
  } else if (kSeveral && item.size > 1) {
    MultiplyRows<X, Several<X>, kLevels>(a, lhs, parts, item, segment, first_row, passes, num_levels, shared);
  }
}

}  // namespace qmoe
