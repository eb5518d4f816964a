// The product with the matrices as they are, [tokens, out] x [out, in]: for derivatives. A block of threads takes a
// segment of the columns, keeps its sums in registers, and goes through rows, which are decoded to tiles as in tiles.cuh.

#pragma once

#include "tiles.cuh"

namespace qmoe {

constexpr int kGradients = 16;  // tokens of an item
constexpr int kGradientStride = kThreads + 8;

// Values (row, column) and (row, column + 1) of `from`, in bfloat16 parts.
template <typename X>
__device__ __forceinline__ void LoadPair(const X* from, uint32_t (&pair)[kParts<X>]) {
  uint16_t first[kParts<X>], second[kParts<X>];
  Split(from[0], first);
  Split(from[1], second);
#pragma unroll
  for (int p = 0; p < kParts<X>; ++p) pair[p] = first[p] | static_cast<uint32_t>(second[p]) << 16;
}

// Shared memory, after FindItem's: the table; a tile of weights; g of a block of rows, [tokens, kGradientStride]; levels.
template <typename X, int kLevels>
constexpr int kTransposedBytes = kEntries * sizeof(uint32_t) + kThreads * kTileStride * sizeof(uint16_t) +
                                 kGradients * kGradientStride * sizeof(X) + Levels<kLevels, uint16_t>::kSharedBytes;

// parts float32 [splits, tokens, width]: split i is the sum over `split_blocks` blocks of kThreads rows. Blocks: items x
// splits x segments, the last fastest.
template <typename X, int kLevels>
__global__ void __launch_bounds__(kThreads)
    Transposed(const __grid_constant__ Matrices a, const X* g, float* parts, int splits, int split_blocks, int num_levels) {
  extern __shared__ uint4 all_shared[];
  uint4* shared = all_shared;
  const int index = blockIdx.x / a.segments / splits;
  const int split = blockIdx.x / a.segments % splits;
  const int segment = blockIdx.x % a.segments;
  const int first_column = segment * a.segment_columns;
  const int columns = min(a.segment_columns, a.width - first_column);
  const Item item = FindItem(a.groups, index, shared);
  ClearUnassigned(a.groups, parts, item, index, split, first_column, columns, a.width);
  if (item.size == 0) return;

  uint32_t* table = reinterpret_cast<uint32_t*>(shared);
  uint16_t* weights = reinterpret_cast<uint16_t*>(table + kEntries);
  X* own_g = reinterpret_cast<X*>(weights + kThreads * kTileStride);
  X* levels_space = own_g + kGradients * kGradientStride;
  CopyTable(a, item.expert, segment, table);

  constexpr int kTiles = kSegment / kTileColumns;
  const int lane = threadIdx.x % 32, warp_column = threadIdx.x / 32 * 16;
  float sums[kTiles][2][4] = {};  // of each tile the warp's columns, 8 at a time
  const int end = min((split + 1) * split_blocks * kThreads, a.out);
  for (int first_row = split * split_blocks * kThreads; first_row < end; first_row += kThreads) {
    const int row = min(first_row + static_cast<int>(threadIdx.x), a.out - 1);
    Stream s = Enter(a, item, row, segment);
    const Levels<kLevels, uint16_t> levels(a, static_cast<int64_t>(item.expert) * a.out + row, num_levels, levels_space);
    // Rows that don't exist are copies of the last one, times zero.
    const bool exists = first_row + threadIdx.x < a.out;
#pragma unroll
    for (int t = 0; t < kGradients; ++t) {
      const int64_t at = static_cast<int64_t>(item.start + t) * a.out + row;
      own_g[t * kGradientStride + threadIdx.x] = exists && t < item.size ? g[at] : X{};
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile * kTileColumns < columns) {
        __syncthreads();  // The last tile has been read; at first, what is shared has been written.
        DecodeTile(a, s, table, levels, weights + threadIdx.x * kTileStride);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kThreads; k += 16) {
          uint32_t pairs[4][kParts<X>], b[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            LoadPair(own_g + (lane / 4 + i % 2 * 8) * kGradientStride + k + i / 2 * 8 + lane % 4 * 2, pairs[i]);
          }
          LoadMatrices<true>(weights + (k + lane % 16) * kTileStride + warp_column + lane / 16 * 8, b);
#pragma unroll
          for (int p = 0; p < kParts<X>; ++p) {
            const uint32_t part[4] = {pairs[0][p], pairs[1][p], pairs[2][p], pairs[3][p]};
            MultiplyAdd(part, b[0], b[1], sums[tile][0]);
            MultiplyAdd(part, b[2], b[3], sums[tile][1]);
          }
        }
      }
    }
    __syncthreads();  // before g and levels of the next rows
  }

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int token = lane / 4 + k / 2 * 8;
        const int column = tile * kTileColumns + warp_column + 8 * j + lane % 4 * 2 + k % 2;
        if (token < item.size && column < columns) {
          float* y = parts + (static_cast<int64_t>(split) * a.groups.tokens + item.start + token) * a.width;
          y[first_column + column] = sums[tile][j][k];
        }
      }
    }
  }
}

}  // namespace qmoe
