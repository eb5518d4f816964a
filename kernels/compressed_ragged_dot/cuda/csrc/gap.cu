// Few tokens of each expert, times experts compressed by the codec `gap`: an XLA FFI custom call for CUDA.
//
// ../../gpu/gap.py says how it works and what the table holds. A block of threads takes a segment of 1024 columns, a
// thread a row of it. What threads gather from lies in shared memory: the table of the expert's parameter, 16 KB, and
// the tokens' values in the segment. Built and called by ../gap.py, which also says what the arguments are.
//
// What a thread does is plain C++. Compiled for the host, as tests do, the blocks and threads are loops.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include "xla/ffi/api/ffi.h"
#define QMOE_LANE __host__ __device__ __forceinline__
#else
#include <vector>
#define QMOE_LANE inline
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
#endif

namespace {

constexpr int kSegment = 1024;
constexpr int kWindow = 12;
constexpr int kLookups = 2;
constexpr int kEntries = 1 << kWindow;
constexpr int kWeightsShift = 25;
constexpr int kItemColumns = 6;  // expert, rank, start, size, first, table
// The most tokens of an item.
constexpr int kTokens = 8;

struct Arguments {
  const void* lhs;         // float32 or bfloat16 [tokens, width]
  const uint32_t* words;   // [num_words], aligned to 8 bytes
  const uint32_t* starts;  // [experts, out, segments]
  const uint8_t* skips;    // [experts, out, segments]
  const uint16_t* levels;  // bfloat16 [experts, out, levels]
  const uint32_t* table;   // [parameters, kEntries]
  const int32_t* items;    // [items, kItemColumns]
  float* parts;            // [segments, tokens, out]
  int64_t tokens;
  int64_t out;
  int64_t width;
  int num_words;
  int segments;
  int row_blocks;
};

// What a block of threads works on.
struct Place {
  int64_t expert;
  int64_t start;  // its tokens
  int size;
  int first;      // word
  int table;
  int segment;
  int end;        // columns of the segment
  int row_block;
};

QMOE_LANE Place PlaceOf(const Arguments& a, unsigned block) {
  const int row_block = block % a.row_blocks;
  const int segment = block / a.row_blocks % a.segments;
  const int32_t* item = a.items + static_cast<int64_t>(block / a.row_blocks / a.segments) * kItemColumns;
  const int64_t rest = a.width - static_cast<int64_t>(segment) * kSegment;
  return {item[0], item[2], item[3], item[4], item[5], segment, static_cast<int>(rest < kSegment ? rest : kSegment), row_block};
}

QMOE_LANE float AsFloat(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

QMOE_LANE float ToFloat(float value) { return value; }
QMOE_LANE float ToFloat(uint16_t bfloat16) { return AsFloat(static_cast<uint32_t>(bfloat16) << 16); }

// The low 32 bits of (high : low) >> (shift % 32).
QMOE_LANE uint32_t FunnelShift(uint32_t low, uint32_t high, uint32_t shift) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, shift);
#else
  return (low >> (shift & 31)) | (high << 1 << (~shift & 31));
#endif
}

// --- The tokens' values in a segment: kSegment + 1 columns, those from `end` on are zero ---------------------

// One token, as float32.
template <typename X>
struct OneToken {
  static constexpr int kTokens = 1;
  using Column = float;

  static QMOE_LANE Column Load(const X* x, int64_t, int) { return ToFloat(*x); }
  static QMOE_LANE void Add(float weight, const Column& x, float* sums) { sums[0] += weight * x; }
};

// Up to kTokens, side by side.
template <typename X>
struct SeveralTokens;

template <>
struct SeveralTokens<float> {
  static constexpr int kTokens = ::kTokens;
  struct alignas(16) Column { float values[kTokens]; };

  static QMOE_LANE Column Load(const float* x, int64_t stride, int size) {
    Column column;
    for (int t = 0; t < kTokens; ++t) column.values[t] = t < size ? x[t * stride] : 0;
    return column;
  }
  static QMOE_LANE void Add(float weight, const Column& x, float* sums) {
    for (int t = 0; t < kTokens; ++t) sums[t] += weight * x.values[t];
  }
};

template <>
struct SeveralTokens<uint16_t> {
  static constexpr int kTokens = ::kTokens;
  struct alignas(16) Column { uint32_t pairs[kTokens / 2]; };

  static QMOE_LANE Column Load(const uint16_t* x, int64_t stride, int size) {
    Column column;
    for (int t = 0; t < kTokens; t += 2) {
      const uint32_t low = t < size ? x[t * stride] : 0, high = t + 1 < size ? x[(t + 1) * stride] : 0;
      column.pairs[t / 2] = low | high << 16;
    }
    return column;
  }
  static QMOE_LANE void Add(float weight, const Column& x, float* sums) {
    for (int t = 0; t < kTokens; t += 2) {
      sums[t] += weight * AsFloat(x.pairs[t / 2] << 16);
      sums[t + 1] += weight * AsFloat(x.pairs[t / 2] & 0xffff0000u);
    }
  }
};

template <typename Values>
constexpr int SharedBytes() {
  return kEntries * sizeof(uint32_t) + (kSegment + 1) * sizeof(typename Values::Column);
}

// --- What a thread does ----------------------------------------------------------------------------------------

// Before: its share of what is shared, the table and behind it the columns.
template <typename X, typename Values>
QMOE_LANE void Fill(const Arguments& a, const Place& place, int thread, int threads, uint4* shared) {
  const uint4* table = reinterpret_cast<const uint4*>(a.table + static_cast<int64_t>(place.table) * kEntries);
  for (int i = thread; i < kEntries / 4; i += threads) shared[i] = table[i];
  auto* columns = reinterpret_cast<typename Values::Column*>(shared + kEntries / 4);
  const X* x = static_cast<const X*>(a.lhs) + place.start * a.width + static_cast<int64_t>(place.segment) * kSegment;
  for (int c = thread; c <= kSegment; c += threads) {
    columns[c] = c < place.end ? Values::Load(x + c, a.width, place.size) : typename Values::Column{};
  }
}

// If `wanted`, the 64 bits of the stream at an index; one out of bounds, to which no valid stream leads, is another one.
QMOE_LANE void Fetch(const Arguments& a, uint32_t index, bool wanted, uint2& bits) {
  const uint32_t last = static_cast<uint32_t>(a.num_words) / 2 - 1;
  const uint2* from = reinterpret_cast<const uint2*>(a.words) + (index < last ? index : last);
#if defined(__CUDA_ARCH__)
  // Into the registers of `bits` themselves, so that nothing waits for them before the next step.
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.L2::128B.v2.u32 {%0, %1}, [%2];}"
      : "+r"(bits.x), "+r"(bits.y)
      : "l"(from), "r"(static_cast<uint32_t>(wanted)));
#else
  if (wanted) bits = *from;
#endif
}

// The column of a non-zero: of the segment, or kSegment where there is none or it belongs to the next segment.
QMOE_LANE uint32_t ColumnOf(uint32_t entry, int shift, uint32_t mask, int column) {
  const uint32_t own = column + (entry >> shift & mask);
  return own < kSegment ? own : kSegment;
}

template <int kLevels>
QMOE_LANE float WeightOf(uint32_t entry, int second, int third, const float* levels) {
  const float weight = entry >> second & 1 ? levels[1] : levels[0];
  return kLevels == 3 && (entry >> third & 1) ? levels[kLevels - 1] : weight;
}

// Where a thread is in the stream of its row.
template <int kLevels>
struct Lane {
  uint2 current, following;
  uint32_t index;     // of the 64 bits after these
  uint32_t position;  // in `current`
  int column;         // of the segment
  float levels[kLevels];
};

// At the start of the segment; a row beyond the last is at the end.
template <int kLevels>
QMOE_LANE Lane<kLevels> LaneOf(const Arguments& a, const Place& place, int64_t row) {
  Lane<kLevels> lane = {};
  lane.column = kSegment;
  if (row >= a.out) return lane;
  const int64_t own = (place.expert * a.out + row) * a.segments + place.segment;
  const uint32_t start = a.starts[own];
  const uint32_t word = place.first + (start >> 5);
  lane.position = (word & 1) << 5 | (start & 31);
  lane.index = (word >> 1) + 2;
  Fetch(a, lane.index - 2, true, lane.current);
  Fetch(a, lane.index - 1, true, lane.following);
  lane.column = -static_cast<int>(a.skips[own]);
  for (int i = 0; i < kLevels; ++i) lane.levels[i] = ToFloat(a.levels[(place.expert * a.out + row) * kLevels + i]);
  return lane;
}

// After: a row.
template <typename Values, int kLevels>
QMOE_LANE void Multiply(const Arguments& a, const Place& place, int64_t row, const Lane<kLevels>& lane,
                        const uint4* shared) {
  const uint32_t* table = reinterpret_cast<const uint32_t*>(shared);
  const auto* columns = reinterpret_cast<const typename Values::Column*>(shared + kEntries / 4);
  auto [current, following, index, position, column, levels] = lane;
  float sums[Values::kTokens] = {};
  while (column < place.end) {
    const bool second_word = position & 32;
    uint32_t window =
        FunnelShift(second_word ? current.y : current.x, second_word ? following.x : current.y, position);
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < kLookups; ++i) {
      const uint32_t entry = table[window & (kEntries - 1)];
      const uint32_t used = entry & 31;
      window >>= used;
      position += used;
      Values::Add(WeightOf<kLevels>(entry, 12, 21, levels), columns[ColumnOf(entry, 5, 0x807f, column)], sums);
      Values::Add(WeightOf<kLevels>(entry, 22, 23, levels), columns[ColumnOf(entry, 13, 0x087f, column)], sums);
      column += entry >> kWeightsShift;
    }
    const bool next = position >= 64;
    position &= 63;
    current.x = next ? following.x : current.x;
    current.y = next ? following.y : current.y;
    Fetch(a, index, next, following);
    index += next;
  }
  if (row >= a.out) return;
  float* y = a.parts + (place.segment * a.tokens + place.start) * a.out + row;
  for (int t = 0; t < Values::kTokens; ++t) {
    if (t < place.size) y[t * a.out] = sums[t];
  }
}

#if defined(__CUDACC__)

namespace ffi = xla::ffi;

template <typename X, typename Values, int kLevels>
__device__ void Block(const Arguments& a, const Place& place, uint4* shared) {
  const int64_t row = static_cast<int64_t>(place.row_block) * blockDim.x + threadIdx.x;
  const Lane<kLevels> lane = LaneOf<kLevels>(a, place, row);  // Memory is slow: it works while the block fills.
  Fill<X, Values>(a, place, threadIdx.x, blockDim.x, shared);
  __syncthreads();
  Multiply<Values, kLevels>(a, place, row, lane, shared);
}

template <typename X, bool kSeveral, int kLevels>
__global__ void __launch_bounds__(256) MultiplyFew(const Arguments a) {
  extern __shared__ uint4 shared[];
  const Place place = PlaceOf(a, blockIdx.x);
  if (place.size == 1) {
    Block<X, OneToken<X>, kLevels>(a, place, shared);
  } else if (kSeveral && place.size > 1) {
    Block<X, SeveralTokens<X>, kLevels>(a, place, shared);
  }
}

template <typename X, bool kSeveral, int kLevels>
ffi::Error Launch(cudaStream_t stream, const Arguments& a, int64_t blocks, int32_t threads) {
  const auto kernel = MultiplyFew<X, kSeveral, kLevels>;
  const int bytes = kSeveral ? SharedBytes<SeveralTokens<X>>() : SharedBytes<OneToken<X>>();
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(a);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) return ffi::Error::Internal(cudaGetErrorString(error));
  return ffi::Error::Success();
}

ffi::Error Run(cudaStream_t stream, ffi::AnyBuffer lhs, ffi::BufferR1<ffi::U32> words, ffi::BufferR3<ffi::U32> starts,
               ffi::BufferR3<ffi::U8> skips, ffi::BufferR3<ffi::BF16> levels, ffi::BufferR2<ffi::U32> table,
               ffi::BufferR2<ffi::S32> items, ffi::ResultBufferR3<ffi::F32> parts, int32_t threads, int32_t block) {
  Arguments a;
  a.lhs = lhs.untyped_data();
  a.words = words.typed_data();
  a.starts = starts.typed_data();
  a.skips = skips.typed_data();
  a.levels = reinterpret_cast<const uint16_t*>(levels.typed_data());
  a.table = table.typed_data();
  a.items = items.typed_data();
  a.parts = parts->typed_data();
  a.tokens = lhs.dimensions()[0];
  a.out = levels.dimensions()[1];
  a.width = lhs.dimensions()[1];
  a.segments = static_cast<int>(starts.dimensions()[2]);
  a.row_blocks = static_cast<int>((a.out + threads - 1) / threads);
  const int64_t num_words = words.dimensions()[0];
  const int64_t blocks = items.dimensions()[0] * a.segments * a.row_blocks;
  const int64_t num_levels = levels.dimensions()[2];
  const bool is_float = lhs.element_type() == ffi::F32, is_bfloat16 = lhs.element_type() == ffi::BF16;
  if (num_words < 2 || num_words > INT32_MAX || blocks > INT32_MAX || threads < 32 || threads > 256 || block < 1 ||
      block > kTokens || items.dimensions()[1] != kItemColumns || table.dimensions()[1] != kEntries ||
      a.segments != (a.width + kSegment - 1) / kSegment || (num_levels != 2 && num_levels != 3) ||
      (!is_float && !is_bfloat16)) {
    return ffi::Error::InvalidArgument("qmoe_gap_cuda: arguments that cuda/gap.py does not pass");
  }
  a.num_words = static_cast<int>(num_words);
  if (blocks == 0) return ffi::Error::Success();
  const bool several = block > 1;
  if (is_float) {
    if (num_levels == 2) {
      return several ? Launch<float, true, 2>(stream, a, blocks, threads)
                     : Launch<float, false, 2>(stream, a, blocks, threads);
    }
    return several ? Launch<float, true, 3>(stream, a, blocks, threads)
                   : Launch<float, false, 3>(stream, a, blocks, threads);
  }
  if (num_levels == 2) {
    return several ? Launch<uint16_t, true, 2>(stream, a, blocks, threads)
                   : Launch<uint16_t, false, 2>(stream, a, blocks, threads);
  }
  return several ? Launch<uint16_t, true, 3>(stream, a, blocks, threads)
                 : Launch<uint16_t, false, 3>(stream, a, blocks, threads);
}

#else

template <typename X, typename Values, int kLevels>
void Block(const Arguments& a, const Place& place, int threads, uint4* shared) {
  for (int thread = 0; thread < threads; ++thread) Fill<X, Values>(a, place, thread, threads, shared);
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t row = static_cast<int64_t>(place.row_block) * threads + thread;
    Multiply<Values, kLevels>(a, place, row, LaneOf<kLevels>(a, place, row), shared);
  }
}

template <typename X, int kLevels>
void Blocks(const Arguments& a, int blocks, int threads) {
  std::vector<uint4> shared(SharedBytes<SeveralTokens<float>>() / sizeof(uint4));
  for (int block = 0; block < blocks; ++block) {
    const Place place = PlaceOf(a, block);
    if (place.size == 1) Block<X, OneToken<X>, kLevels>(a, place, threads, shared.data());
    if (place.size > 1) Block<X, SeveralTokens<X>, kLevels>(a, place, threads, shared.data());
  }
}

#endif

}  // namespace

#if defined(__CUDACC__)

XLA_FFI_DEFINE_HANDLER_SYMBOL(QmoeGapCuda, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::U32>>()
                                  .Arg<ffi::BufferR3<ffi::U32>>()
                                  .Arg<ffi::BufferR3<ffi::U8>>()
                                  .Arg<ffi::BufferR3<ffi::BF16>>()
                                  .Arg<ffi::BufferR2<ffi::U32>>()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .Ret<ffi::BufferR3<ffi::F32>>()
                                  .Attr<int32_t>("threads")
                                  .Attr<int32_t>("block"),
                              {ffi::Traits::kCmdBufferCompatible});

#else

// sizes: tokens, out, width, num_words, items, levels, threads; is_float: whether lhs is float32, otherwise bfloat16.
extern "C" void QmoeGapHost(const void* lhs, const uint32_t* words, const uint32_t* starts, const uint8_t* skips,
                            const uint16_t* levels, const uint32_t* table, const int32_t* items, float* parts,
                            const int64_t* sizes, bool is_float) {
  Arguments a{lhs, words, starts, skips, levels, table, items, parts, sizes[0], sizes[1], sizes[2]};
  const int threads = static_cast<int>(sizes[6]);
  a.num_words = static_cast<int>(sizes[3]);
  a.segments = static_cast<int>((a.width + kSegment - 1) / kSegment);
  a.row_blocks = static_cast<int>((a.out + threads - 1) / threads);
  const int blocks = static_cast<int>(sizes[4]) * a.segments * a.row_blocks;
  if (sizes[5] == 2) {
    is_float ? Blocks<float, 2>(a, blocks, threads) : Blocks<uint16_t, 2>(a, blocks, threads);
  } else {
    is_float ? Blocks<float, 3>(a, blocks, threads) : Blocks<uint16_t, 3>(a, blocks, threads);
  }
}

#endif
