// Which expert's tokens a block of threads works on: found from group_sizes inside the kernel, so that a product is one
// launch however many experts there are.

#pragma once

#include <cstdint>

namespace qmoe {

constexpr int kThreads = 128;  // of every block
constexpr int kWarps = kThreads / 32;

// The experts' tokens, cut into items of at most 2^log2_block tokens, in order.
struct Groups {
  const int32_t* sizes;        // [experts], tokens of each; below zero counts as none, beyond `tokens` is nobody's
  const int32_t* word_counts;  // [experts]
  int experts;
  int tokens;  // rows of lhs, below 2^30
  int log2_block;
  int items;   // blocks of threads there are for items; those beyond the last find no tokens
};

struct Item {
  int expert;
  int start, size;  // tokens
  uint32_t first_word;
  int assigned;  // tokens that have an expert, of all items
};

// Shared memory of FindItem, at the beginning of a block's.
struct alignas(16) ItemSpace {
  uint32_t totals[3][kWarps];
  Item found;
};

// Sum of what the threads before this one hold, at most `most`. All threads of the block take part.
__device__ __forceinline__ uint32_t SumBefore(uint32_t value, uint32_t most, uint32_t* totals) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum = min(sum + other, most);
  }
  if (lane == 31) totals[warp] = sum;
  __syncthreads();
  uint32_t before = __shfl_up_sync(0xffffffffu, sum, 1);
  if (lane == 0) before = 0;
#pragma unroll
  for (int w = 0; w < kWarps - 1; ++w) {
    if (w < warp) before = min(before + totals[w], most);
  }
  return before;
}

// Item number `index`, for all threads of the block, and what is left of its shared memory. Each thread sums up
// consecutive experts.
__device__ __forceinline__ Item FindItem(const Groups& g, int index, uint4*& shared) {
  auto& [totals, found] = *reinterpret_cast<ItemSpace*>(shared);
  shared += sizeof(ItemSpace) / sizeof(uint4);
  constexpr uint32_t kAny = 0xffffffffu;
  const int each = (g.experts + kThreads - 1) / kThreads;
  const int first = min(static_cast<int>(threadIdx.x) * each, g.experts), last = min(first + each, g.experts);
  const auto size = [&](int expert) { return max(0, min(g.sizes[expert], g.tokens)); };
  const auto items = [&](int tokens) { return (tokens + (1 << g.log2_block) - 1) >> g.log2_block; };

  int tokens = 0;
  uint32_t words = 0;
#pragma unroll 4
  for (int e = first; e < last; ++e) {
    tokens = min(tokens + size(e), g.tokens);
    words += static_cast<uint32_t>(g.word_counts[e]);
  }
  const int start = SumBefore(tokens, g.tokens, totals[0]);
  const uint32_t first_word = SumBefore(words, kAny, totals[1]);
  int own = 0, begin = start;
#pragma unroll 4
  for (int e = first; e < last; ++e) {
    const int end = min(begin + size(e), g.tokens);
    own += items(end - begin);
    begin = end;
  }
  if (threadIdx.x == 0) found = {};
  int before = SumBefore(own, kAny, totals[2]);  // its barrier is also between the lines around it
  if (threadIdx.x == kThreads - 1) found.assigned = begin;
  if (index >= before && index < before + own) {
    int from = start;
    uint32_t word = first_word;
    for (int e = first;; ++e) {
      const int end = min(from + size(e), g.tokens), here = items(end - from);
      if (index < before + here) {
        found.expert = e;
        found.start = from + ((index - before) << g.log2_block);
        found.size = min(end - found.start, 1 << g.log2_block);
        found.first_word = word;
        break;
      }
      before += here;
      from = end;
      word += static_cast<uint32_t>(g.word_counts[e]);
    }
  }
  __syncthreads();
  return found;
}

// Tokens without an expert get zeros, in parts [parts, tokens, length]: places first to first + count of part `part`. As
// items share the tokens, every block has some.
__device__ __forceinline__ void ClearUnassigned(const Groups& g, float* parts, const Item& item, int index, int part,
                                                int first, int count, int length) {
  for (int token = item.assigned + index; token < g.tokens; token += g.items) {
    float* y = parts + (static_cast<int64_t>(part) * g.tokens + token) * length + first;
    for (int i = threadIdx.x; i < count; i += kThreads) y[i] = 0;
  }
}

}  // namespace qmoe
