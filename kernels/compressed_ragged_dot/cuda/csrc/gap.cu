// Tokens sorted by expert, times experts compressed by the codec `gap`: XLA FFI custom calls for CUDA, one launch each.
// Built and called by ../gap.py, which says what the arguments are.

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "transposed.cuh"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using qmoe::kThreads;

enum Kernel : int32_t { kFew, kTiles, kTransposed };

struct Launch {
  qmoe::Matrices a;
  const void* lhs;
  float* parts;
  int num_levels;
  int split_pieces;    // of a part of the sum: segments, or blocks of rows
  int passes;          // few tokens: rows of a thread
  int splits, row_blocks;
  int64_t blocks;
  cudaStream_t stream;
  bool load_only;  // the kernel, instead of running it
};

ffi::Error Checked(cudaError_t error) {
  if (error != cudaSuccess) return ffi::Error::Internal(cudaGetErrorString(error));
  return ffi::Error::Success();
}

template <typename F>
ffi::Error Load(F* kernel) {
  cudaFuncAttributes attributes;
  return Checked(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
}

template <typename X, bool kSeveral, int kLevels>
ffi::Error FewTokens(const Launch& l) {
  constexpr int kBytes =
      sizeof(qmoe::ItemSpace) + (kSeveral ? qmoe::kFewBytes<qmoe::Several<X>, kLevels> : qmoe::kFewBytes<qmoe::One<X>, kLevels>);
  static_assert(kBytes <= 48 << 10, "more has to be allowed by an attribute, which a call must not set");
  if (l.load_only) return Load(qmoe::FewTokens<X, kSeveral, kLevels>);
  qmoe::FewTokens<X, kSeveral, kLevels><<<static_cast<unsigned>(l.blocks), kThreads, kBytes, l.stream>>>(
      l.a, static_cast<const X*>(l.lhs), l.parts, l.row_blocks, l.passes, l.num_levels);
  return Checked(cudaGetLastError());
}

template <typename X, int kTokens, int kLevels>
ffi::Error Tiles(const Launch& l) {
  constexpr int kBytes = sizeof(qmoe::ItemSpace) + qmoe::kTilesBytes<X, kTokens, kLevels>;
  static_assert(kBytes <= 48 << 10, "more has to be allowed by an attribute, which a call must not set");
  if (l.load_only) return Load(qmoe::Tiles<X, kTokens, kLevels>);
  qmoe::Tiles<X, kTokens, kLevels><<<static_cast<unsigned>(l.blocks), kThreads, kBytes, l.stream>>>(
      l.a, static_cast<const X*>(l.lhs), l.parts, l.row_blocks, l.splits, l.split_pieces, l.num_levels);
  return Checked(cudaGetLastError());
}

template <typename X, int kLevels>
ffi::Error Transposed(const Launch& l) {
  constexpr int kBytes = sizeof(qmoe::ItemSpace) + qmoe::kTransposedBytes<X, kLevels>;
  static_assert(kBytes <= 48 << 10, "more has to be allowed by an attribute, which a call must not set");
  if (l.load_only) return Load(qmoe::Transposed<X, kLevels>);
  qmoe::Transposed<X, kLevels><<<static_cast<unsigned>(l.blocks), kThreads, kBytes, l.stream>>>(
      l.a, static_cast<const X*>(l.lhs), l.parts, l.splits, l.split_pieces, l.num_levels);
  return Checked(cudaGetLastError());
}

template <typename X, int kLevels>
ffi::Error WithLevels(const Launch& l, Kernel kernel) {
  const int tokens = 1 << l.a.groups.log2_block;
  if (kernel == kTransposed) {
    if (tokens == qmoe::kGradients) return Transposed<X, kLevels>(l);
  } else if (kernel == kTiles) {
    if (tokens == 16) return Tiles<X, 16, kLevels>(l);
    if constexpr (sizeof(X) == 2) {
      if (tokens == 32) return Tiles<X, 32, kLevels>(l);
      if (tokens == 64) return Tiles<X, 64, kLevels>(l);
    }
  } else {
    if (tokens == 1) return FewTokens<X, false, kLevels>(l);
    if (tokens <= qmoe::kFewTokens) return FewTokens<X, true, kLevels>(l);
  }
  return ffi::Error::InvalidArgument("qmoe_gap_cuda: a block of tokens that cuda/gap.py does not ask for");
}

template <typename X>
ffi::Error WithType(const Launch& l, Kernel kernel) {
  if (l.num_levels == 2) return WithLevels<X, 2>(l, kernel);
  if (l.num_levels == 3) return WithLevels<X, 3>(l, kernel);
  return WithLevels<X, qmoe::kMostLevels>(l, kernel);
}

ffi::Error Run(cudaStream_t stream, ffi::AnyBuffer lhs, ffi::BufferR1<ffi::U32> words, ffi::BufferR1<ffi::S32> word_counts,
               ffi::BufferR3<ffi::U32> starts, ffi::BufferR3<ffi::U8> skips, ffi::Buffer<ffi::U8> parameters,
               ffi::BufferR3<ffi::BF16> levels, ffi::BufferR2<ffi::U32> tables, ffi::BufferR1<ffi::S32> group_sizes,
               ffi::ResultBufferR3<ffi::F32> parts, ffi::Span<const uint8_t> slots, int32_t segment_columns,
               int32_t log2_block, int32_t passes, int32_t kernel) {
  const int64_t tokens = lhs.dimensions()[0], width = kernel == kTransposed ? parts->dimensions()[2] : lhs.dimensions()[1];
  const int64_t experts = levels.dimensions()[0], out = levels.dimensions()[1], num_levels = levels.dimensions()[2];
  const int64_t num_words = words.dimensions()[0], segments = starts.dimensions()[2], splits = parts->dimensions()[0];
  const int64_t classes = experts < 1 ? 1 : static_cast<int64_t>(parameters.element_count()) / experts;
  const int64_t length = kernel == kTransposed ? width : out;  // of a row of parts
  const bool is_float = lhs.element_type() == ffi::F32;
  constexpr int64_t kMost = INT32_MAX;
  const auto covers = [](int64_t parts, int64_t each, int64_t whole) {
    return parts >= 1 && each >= 1 && (parts - 1) * each < whole && parts * each >= whole;
  };
  bool good = covers(segments, segment_columns, width) && segment_columns <= qmoe::kSegment && segment_columns % 16 == 0;
  good = good && tokens < 1 << 30 && num_words >= 2 && num_words <= kMost && out <= kMost && width <= kMost;
  good = good && num_levels >= 2 && num_levels <= qmoe::kMostLevels && tables.dimensions()[1] == qmoe::kEntries;
  good = good && (is_float || lhs.element_type() == ffi::BF16) && slots.size() == 256;
  good = good && group_sizes.dimensions()[0] == experts && word_counts.dimensions()[0] == experts;
  good = good && static_cast<int64_t>(parameters.element_count()) == experts * classes && classes >= 1;
  good = good && segments % classes == 0 && (classes == 1 || segments * segment_columns == width);
  good = good && log2_block >= 0 && log2_block <= 6 && passes >= 1 && passes <= 1 << 16;
  good = good && kernel >= kFew && kernel <= kTransposed && parts->dimensions()[1] == tokens;
  good = good && parts->dimensions()[2] == length && lhs.dimensions()[1] == (kernel == kTransposed ? out : width);
  if (!good) return ffi::Error::InvalidArgument("qmoe_gap_cuda: arguments that cuda/gap.py does not pass");

  const int64_t rows = int64_t{kThreads} * (kernel == kFew ? passes : 1), row_blocks = (out + rows - 1) / rows;
  const int64_t pieces = kernel == kTransposed ? row_blocks : segments;  // of the sum
  const int64_t split_pieces = splits < 1 ? 0 : (pieces + splits - 1) / splits;
  const int64_t active = tokens < experts ? tokens : experts;
  const int64_t items = active + ((tokens - active) >> log2_block);
  const int64_t blocks = items * splits * (kernel == kTransposed ? segments : row_blocks);
  const bool one_class = kernel != kTiles || classes == 1 || (split_pieces > 0 && segments / classes % split_pieces == 0);
  if (!covers(splits, split_pieces, pieces) || (kernel == kFew && splits != segments) || !one_class || blocks > kMost) {
    return ffi::Error::InvalidArgument("qmoe_gap_cuda: parts of the sum that cuda/gap.py does not ask for");
  }
  if (blocks == 0) return ffi::Error::Success();
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };

  Launch l = {};
  l.a.groups = {group_sizes.typed_data(), word_counts.typed_data(), narrow(experts), narrow(tokens), log2_block,
                narrow(items)};
  l.a.words = words.typed_data();
  l.a.starts = starts.typed_data();
  l.a.skips = skips.typed_data();
  l.a.parameters = parameters.typed_data();
  l.a.levels = reinterpret_cast<const uint16_t*>(levels.typed_data());
  l.a.tables = tables.typed_data();
  l.a.num_words = narrow(num_words);
  l.a.out = narrow(out);
  l.a.width = narrow(width);
  l.a.segments = narrow(segments);
  l.a.segment_columns = segment_columns;
  l.a.classes = narrow(classes);
  l.a.class_segments = narrow(segments / classes);
  std::memcpy(l.a.slots, slots.begin(), sizeof(l.a.slots));
  l.lhs = lhs.untyped_data();
  l.parts = parts->typed_data();
  l.num_levels = narrow(num_levels);
  l.split_pieces = narrow(split_pieces);
  l.passes = passes;
  l.splits = narrow(splits);
  l.row_blocks = narrow(row_blocks);
  l.blocks = blocks;
  l.stream = stream;
  return is_float ? WithType<float>(l, Kernel(kernel)) : WithType<uint16_t>(l, Kernel(kernel));
}

}  // namespace

// Loads all kernels on all GPUs, so that no call has to, which might be one that is captured in a graph: "", or the error.
extern "C" const char* QmoeGapWarmUp() {
  static std::string text;
  int devices = 0, current = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess) error = cudaGetDevice(&current);
  for (int device = 0; device < devices && error == cudaSuccess; ++device) {
    error = cudaSetDevice(device);
    for (int i = 0; i < 3 * 6 * 2 && error == cudaSuccess; ++i) {
      constexpr struct { Kernel kernel; int log2_block; } kVariants[] = {{kFew, 0},   {kFew, 3},   {kTransposed, 4},
                                                                         {kTiles, 4}, {kTiles, 5}, {kTiles, 6}};
      const auto [kernel, log2_block] = kVariants[i / 3 % 6];
      const bool is_float = i / 18;
      if (is_float && log2_block > 4) continue;
      Launch l = {};
      l.load_only = true;
      l.num_levels = 2 + i % 3;
      l.a.groups.log2_block = log2_block;
      const ffi::Error failed = is_float ? WithType<float>(l, kernel) : WithType<uint16_t>(l, kernel);
      if (failed.failure()) {
        text = failed.message();
        return text.c_str();
      }
    }
  }
  if (error == cudaSuccess) error = cudaSetDevice(current);
  text = error == cudaSuccess ? "" : cudaGetErrorString(error);
  return text.c_str();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(QmoeGapCuda, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::U32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR3<ffi::U32>>()
                                  .Arg<ffi::BufferR3<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::BufferR3<ffi::BF16>>()
                                  .Arg<ffi::BufferR2<ffi::U32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR3<ffi::F32>>()
                                  .Attr<ffi::Span<const uint8_t>>("slots")
                                  .Attr<int32_t>("segment_columns")
                                  .Attr<int32_t>("log2_block")
                                  .Attr<int32_t>("passes")
                                  .Attr<int32_t>("kernel"),
                              {ffi::Traits::kCmdBufferCompatible});
