// From a few tokens of an expert on: each warp decodes a tile of its rows to bfloat16, which is exact, in shared memory,
// and tensor cores multiply it. Nothing dense goes through global memory.

#pragma once

#include "few_tokens.cuh"

namespace qmoe {

constexpr int kTileColumns = 64;
constexpr int kTileStride = kTileColumns + 8;  // so that eight rows' 16 bytes lie in different banks

// Parts of an lhs value in bfloat16 whose sum it is: three times eight bits are float32's 24.
template <typename X>
constexpr int kParts = sizeof(X) == 4 ? 3 : 1;

__device__ __forceinline__ void Split(uint16_t x, uint16_t (&parts)[1]) { parts[0] = x; }
__device__ __forceinline__ void Split(float x, uint16_t (&parts)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const uint32_t high = __float_as_uint(x) & 0xffff0000u;
    parts[i] = high >> 16;
    x -= __uint_as_float(high);
  }
}

// Four 8 x 8 matrices of bfloat16; lane l gives the address of row l % 8 of matrix l / 8.
template <bool kTransposed>
__device__ __forceinline__ void LoadMatrices(const uint16_t* row, uint32_t (&out)[4]) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
}

// c [16, 8] += a [16, 16] b [16, 8], bfloat16 and float32.
__device__ __forceinline__ void MultiplyAdd(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A tile [rows, kTileColumns] of lhs in bfloat16 parts, on its way: in registers until the place is free.
template <typename X, int kRows>
struct TileOfLhs {
  static constexpr int kSize = Vector<X>::kSize;
  static constexpr int kVectors = kRows * kTileColumns / kSize / kThreads;
  static_assert(kVectors * kSize * kThreads == kRows * kTileColumns);
  Vector<X> vectors[kVectors];

  // x: the first row, at the tile's first column; values beyond `rows` and `columns` are zero.
  __device__ __forceinline__ void Load(const X* x, int64_t stride, int rows, int columns, bool aligned) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = (i * kThreads + threadIdx.x) * kSize, row = at / kTileColumns, column = at % kTileColumns;
      vectors[i] = LoadVector(x + row * stride, column, row < rows ? columns : 0, aligned);
    }
  }
  // to: [parts, rows, kTileStride].
  __device__ __forceinline__ void Store(uint16_t* to) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = (i * kThreads + threadIdx.x) * kSize, row = at / kTileColumns, column = at % kTileColumns;
      struct alignas(2 * kSize) Packed { uint16_t values[kSize]; } packed[kParts<X>];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        uint16_t parts[kParts<X>];
        Split(vectors[i].values[j], parts);
#pragma unroll
        for (int p = 0; p < kParts<X>; ++p) packed[p].values[j] = parts[p];
      }
#pragma unroll
      for (int p = 0; p < kParts<X>; ++p) {
        *reinterpret_cast<Packed*>(to + (p * kRows + row) * kTileStride + column) = packed[p];
      }
    }
  }
};

// The next kTileColumns weights of a thread's row, to its own row of a tile; `s.column` then counts from the next tile.
template <int kLevels>
__device__ __forceinline__ void DecodeTile(const Matrices& a, Stream& s, const uint32_t* table,
                                           const Levels<kLevels, uint16_t>& levels, uint16_t* row) {
#pragma unroll
  for (int i = 0; i < kTileColumns / 8; ++i) reinterpret_cast<uint4*>(row)[i] = {};
  while (s.column < kTileColumns) {
    const uint32_t entry = table[Window(NextBits(s))];
    const int next = s.column + Weights(entry);
    const uint32_t first = FirstColumn(entry, s.column), second = SecondColumn(entry, next);
    if (first < kTileColumns) row[first] = levels.template Of<kFirstShift>(entry);
    if (second < kTileColumns) row[second] = levels.template Of<kSecondShift>(entry);
    if (next > kTileColumns) break;  // It is the next tile's too, which comes back to it.
    s.position += Used(entry);
    s.column = next;
    Refill(a, s);
  }
  s.column -= kTileColumns;
}

// Shared memory, after FindItem's: the table; a tile of weights [kThreads, kTileStride]; one of lhs [parts, tokens, kTileStride]; levels.
template <typename X, int kTokens, int kLevels>
constexpr int kTilesBytes = kEntries * sizeof(uint32_t) +
                            (kThreads + kParts<X> * kTokens) * kTileStride * sizeof(uint16_t) +
                            Levels<kLevels, uint16_t>::kSharedBytes;

// parts float32 [splits, tokens, out]: split i is the sum over `split_segments` segments of the rows, all of a class. Blocks: items x
// splits x blocks of kThreads rows, the last fastest. Items have up to kTokens tokens, a multiple of 16.
template <typename X, int kTokens, int kLevels>
__global__ void __launch_bounds__(kThreads, kTokens == 16 ? 5 : 1)
    Tiles(const __grid_constant__ Matrices a, const X* lhs, float* parts, int row_blocks, int splits, int split_segments,
          int num_levels) {
  extern __shared__ uint4 all_shared[];
  uint4* shared = all_shared;
  const int index = blockIdx.x / row_blocks / splits;
  const int split = blockIdx.x / row_blocks % splits;
  const int first_row = blockIdx.x % row_blocks * kThreads;
  const Item item = FindItem(a.groups, index, shared);
  ClearUnassigned(a.groups, parts, item, index, split, first_row, min(kThreads, a.out - first_row), a.out);
  if (item.size == 0) return;

  uint32_t* table = reinterpret_cast<uint32_t*>(shared);
  uint16_t* weights = reinterpret_cast<uint16_t*>(table + kEntries);
  uint16_t* x_tile = weights + kThreads * kTileStride;
  uint16_t* levels_space = x_tile + kParts<X> * kTokens * kTileStride;

  const int segment = split * split_segments;
  const int first_column = segment * a.segment_columns;
  const int columns = min(split_segments * a.segment_columns, a.width - first_column);
  const int row = first_row + threadIdx.x;
  Stream s = Enter(a, item, min(row, a.out - 1), segment);
  CopyTable(a, item.expert, segment, table);
  const Levels<kLevels, uint16_t> levels(a, static_cast<int64_t>(item.expert) * a.out + min(row, a.out - 1), num_levels,
                                         levels_space);
  __syncthreads();

  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 32;
  uint16_t* own_row = weights + threadIdx.x * kTileStride;
  const X* x = lhs + static_cast<int64_t>(item.start) * a.width + first_column;
  float sums[2][kTokens / 8][4] = {};  // of the warp's rows, 16 at a time, and 8 tokens each
  for (int done = 0; done < columns; done += kTileColumns) {
    TileOfLhs<X, kTokens> next_x;
    next_x.Load(x + done, a.width, item.size, columns - done, a.width % TileOfLhs<X, kTokens>::kSize == 0);
    DecodeTile(a, s, table, levels, own_row);
    next_x.Store(x_tile);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTileColumns; k += 16) {
      uint32_t w[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        LoadMatrices<false>(weights + (warp_row + 16 * i + lane % 16) * kTileStride + k + lane / 16 * 8, w[i]);
      }
#pragma unroll
      for (int p = 0; p < kParts<X>; ++p) {
#pragma unroll
        for (int t = 0; t < kTokens; t += 16) {
          uint32_t b[4];  // tokens t to t + 7, columns k and k + 8 on; then the next 8 tokens
          LoadMatrices<false>(
              x_tile + (p * kTokens + t + lane / 16 * 8 + lane % 8) * kTileStride + k + lane / 8 % 2 * 8, b);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            MultiplyAdd(w[i], b[0], b[1], sums[i][t / 8]);
            MultiplyAdd(w[i], b[2], b[3], sums[i][t / 8 + 1]);
          }
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int y_row = first_row + warp_row + 16 * i + lane / 4 + k / 2 * 8, token = 8 * j + lane % 4 * 2 + k % 2;
        if (y_row < a.out && token < item.size) {
          parts[(static_cast<int64_t>(split) * a.groups.tokens + item.start + token) * a.out + y_row] = sums[i][j][k];
        }
      }
    }
  }
}

}  // namespace qmoe
