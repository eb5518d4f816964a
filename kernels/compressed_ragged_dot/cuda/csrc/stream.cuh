// The codec `gap` as a thread reads it: the stream of a row from a segment on, by a table. ../../gpu/gap.py says what the
// table's entries hold.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "work.cuh"

namespace qmoe {

constexpr int kWindow = 12;
constexpr int kEntries = 1 << kWindow;
constexpr int kSegment = 512;  // most columns of a segment; less than what kNone adds to a column
constexpr int kMostLevels = 14;

// Fields of an entry.
constexpr int kUsedMask = 31;
constexpr int kPlaceShift = 5;
constexpr uint32_t kPlaceMask = 0x807f;  // 7 bits, and far above them the bit that there is no non-zero
constexpr int kFirstShift = 12, kSecondShift = 16;  // of the non-zeros' levels, counted from 0
constexpr uint32_t kLevelMask = 15;
constexpr uint32_t kNoSecond = 1 << 24;
constexpr int kWeightsShift = 25;

// An entry's parts, and its non-zeros' columns after `column`: huge where there is none.
__device__ __forceinline__ int Used(uint32_t entry) { return entry & kUsedMask; }
__device__ __forceinline__ int Weights(uint32_t entry) { return entry >> kWeightsShift; }
__device__ __forceinline__ uint32_t FirstColumn(uint32_t entry, int column) {
  return column + (entry >> kPlaceShift & kPlaceMask);
}
// The second one is the last of the entry's weights; `next` is the column after them.
__device__ __forceinline__ uint32_t SecondColumn(uint32_t entry, int next) {
  return static_cast<uint32_t>(next - 1) | (entry & kNoSecond);
}

// What all kernels take.
struct Matrices {
  Groups groups;
  const uint32_t* words;      // [num_words], two at least
  const uint32_t* starts;     // [experts, out, segments]
  const uint8_t* skips;       // [experts, out, segments]
  const uint8_t* parameters;  // [experts, classes]
  const uint16_t* levels;     // bfloat16 [experts, out, L]
  const uint32_t* tables;     // [codes, kEntries]
  int num_words;
  int out, width;
  int segments;         // of a row
  int classes, class_segments;  // of columns; segments of each
  int segment_columns;  // all but the last segment have as many; a multiple of 16
  uint8_t slots[256];   // which table is whose: by what `parameters` says
};

// The table of an expert's segment, to shared memory.
__device__ __forceinline__ void CopyTable(const Matrices& a, int expert, int segment, uint32_t* to) {
  const int64_t own = static_cast<int64_t>(expert) * a.classes + segment / a.class_segments;
  const uint4* from = reinterpret_cast<const uint4*>(a.tables + static_cast<int64_t>(a.slots[a.parameters[own]]) * kEntries);
#pragma unroll
  for (int i = 0; i < kEntries / 4 / kThreads; ++i) {
    reinterpret_cast<uint4*>(to)[i * kThreads + threadIdx.x] = from[i * kThreads + threadIdx.x];
  }
}

// Two words of the stream. Beyond the last two, to which no valid stream leads, as it ends with a word of padding, they
// are those. (Four at once are fetched by fewer instructions, but choosing among them costs the integer pipe more.)
__device__ __forceinline__ void Fetch(const Matrices& a, uint32_t index, bool wanted, uint2& bits) {
  const uint32_t last = static_cast<uint32_t>(a.num_words) / 2 - 1;
  const uint2* from = reinterpret_cast<const uint2*>(a.words) + min(index, last);
  // Into the registers of `bits` themselves, so that nothing waits for them before they are needed.
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.L2::128B.v2.u32 {%0, %1}, [%2];}"
      : "+r"(bits.x), "+r"(bits.y)
      : "l"(from), "r"(static_cast<uint32_t>(wanted)));
}

// Where a thread is in the stream of its row.
struct Stream {
  uint2 current, following;
  uint32_t index;     // of the two words after these
  uint32_t position;  // in `current`
  int column;         // of the next weight, counted from where the stream was entered
};

// The stream of a row from the first weight of a segment on.
__device__ __forceinline__ Stream Enter(const Matrices& a, const Item& item, int row, int segment) {
  Stream s = {};
  const int64_t own = (static_cast<int64_t>(item.expert) * a.out + row) * a.segments + segment;
  const uint32_t start = a.starts[own];
  const uint32_t word = item.first_word + (start >> 5);
  s.position = (word & 1) << 5 | (start & 31);
  s.index = (word >> 1) + 2;
  Fetch(a, s.index - 2, true, s.current);
  Fetch(a, s.index - 1, true, s.following);
  s.column = -static_cast<int>(a.skips[own]);
  return s;
}

// The next 32 bits, the first of them highest.
__device__ __forceinline__ uint32_t NextBits(const Stream& s) {
  const bool second = s.position >= 32;
  return __brev(__funnelshift_r(second ? s.current.y : s.current.x, second ? s.following.x : s.current.y, s.position));
}

// Index of the table for what comes first among `bits`, and the bits after those that its entry uses.
__device__ __forceinline__ uint32_t Window(uint32_t bits) {
  uint32_t index;
  // The compiler would shift less, and mask, to get bytes.
  asm("shr.u32 %0, %1, %2;" : "=r"(index) : "r"(bits), "n"(32 - kWindow));
  return index;
}
__device__ __forceinline__ uint32_t Skip(uint32_t bits, uint32_t entry) { return __funnelshift_l(0, bits, entry); }

// After `position` has moved on by at most 32.
__device__ __forceinline__ void Refill(const Matrices& a, Stream& s) {
  const bool next = s.position >= 64;
  s.position &= 63;
  s.current.x = next ? s.following.x : s.current.x;
  s.current.y = next ? s.following.y : s.current.y;
  Fetch(a, s.index, next, s.following);
  s.index += next;
}

__device__ __forceinline__ float ToFloat(float value) { return value; }
__device__ __forceinline__ float ToFloat(uint16_t bfloat16) {
  return __uint_as_float(static_cast<uint32_t>(bfloat16) << 16);
}
__device__ __forceinline__ void Convert(uint16_t bfloat16, uint16_t& value) { value = bfloat16; }
__device__ __forceinline__ void Convert(uint16_t bfloat16, float& value) { value = ToFloat(bfloat16); }

// A row's levels, as V: float, or uint16_t for the bits of bfloat16. kLevels: 2, 3, or kMostLevels for any other number.
// Two and three are in registers, more in shared memory, where each thread has a column of its own.
template <int kLevels, typename V>
struct Levels {
  static constexpr int kSharedBytes = kLevels > 3 ? kLevels * kThreads * sizeof(V) : 0;
  V values[kLevels > 3 ? 1 : kLevels];
  const V* shared;

  // Row `row` of all experts' rows, of `count` levels.
  __device__ __forceinline__ Levels(const Matrices& a, int64_t row, int count, void* to) {
    if constexpr (kLevels > 3) {
      V* own = static_cast<V*>(to) + threadIdx.x;
      for (int i = 0; i < count; ++i) Convert(a.levels[row * count + i], own[i * kThreads]);
      shared = own;
    } else {
#pragma unroll
      for (int i = 0; i < kLevels; ++i) Convert(a.levels[row * kLevels + i], values[i]);
    }
  }
  template <int kShift>
  __device__ __forceinline__ V Of(uint32_t entry) const {
    if constexpr (kLevels > 3) {
      return shared[(entry >> kShift & kLevelMask) * kThreads];
    } else {
      const V level = entry >> kShift & 1 ? values[1] : values[0];
      return kLevels == 3 && (entry >> kShift & 2) ? values[kLevels - 1] : level;
    }
  }
};

}  // namespace qmoe
