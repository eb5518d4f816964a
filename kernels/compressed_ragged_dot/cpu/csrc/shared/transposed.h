// Tokens sorted by expert, times the experts' matrices as they are, [tokens, out] @ [out, in]: what the product of the
// other direction (compressed_ragged_dot.h) has as its gradient for tokens, from the same bytes.
//
// A piece is up to kTokensPerPiece tokens of an expert. Blocks of its rows are decoded one after the other to floats that
// stay in the second-level cache, and added up: sums[t, :] += g[t, row] * W[row, :]. No two pieces share a sum.

#ifndef QMOE_TRANSPOSED_H_
#define QMOE_TRANSPOSED_H_

#include "compressed_ragged_dot.h"

namespace {

constexpr int64_t kTokensPerPiece = 64;
constexpr int64_t kWeightsBytes = 256 << 10;  // of a block of rows, as floats

// What all threads of a call share.
template <typename Codec>
struct TransposedCall {
  Codec codec;
  const uint16_t* levels;  // bfloat16 [experts, out, levels_per_row]
  int64_t levels_per_row;
  int64_t out;
  int64_t width;  // of a part
  int64_t row_bytes, x_stride, rows_per_block;
  const char* g;  // [tokens, out]
  char* y;        // [tokens, parts, width]
  bool is_bfloat16;
  std::vector<Active> pieces;
  void (*add)(const typename Codec::Block&, const Columns&);
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
};

// The inverse of ArrangeToken.
template <int64_t kSymbols, typename Output>
void StoreArranged(const float* from, int64_t width, Output* to) {
  for (int64_t column = 0; column < width; ++column) {
    const int64_t within = column % (kSymbols * kLanesPerBlock);
    Store(from[column - within + within % kSymbols * kLanesPerBlock + within / kSymbols], to + column);
  }
}

// One token's part of g, float32 or bfloat16 [rows], into a column of float32 [rows, stride].
template <typename Input>
void CopyColumn(const Input* from, int64_t rows, float* to, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    if constexpr (sizeof(Input) == 2) {
      to[row * stride] = FromBfloat16(from[row]);
    } else {
      to[row * stride] = from[row];
    }
  }
}

template <typename Codec>
void MultiplyTransposedPiece(const TransposedCall<Codec>& call, const Active& piece) {
  Columns c;
  Rows& rows = c.rows;
  rows = Rows();
  rows.levels_per_row = call.levels_per_row;
  rows.row_bytes = call.row_bytes;
  rows.x_stride = call.x_stride;
  c.tokens = piece.tokens;

  // The largest block decides how much memory there is: symbols, weights, g, sums.
  const int64_t most = std::min(call.rows_per_block, call.out);
  const int64_t most_per_stream = std::min(most, int64_t{1} << call.codec.Log2RowsPerStream(most));
  const auto symbols_bytes = [&](int64_t count, int64_t per_stream) {
    const int64_t turns = (count - 1) / (Codec::kStreams * per_stream) + 1;
    return turns * Codec::kStreams * (per_stream * call.row_bytes + 2 * Codec::kSlack);
  };
  int64_t most_symbols = symbols_bytes(most, most_per_stream);
  if (const int64_t last = call.out % most; last > 0) {  // Fewer rows may be in other streams.
    most_symbols = std::max(most_symbols, symbols_bytes(last, std::min(last, int64_t{1} << call.codec.Log2RowsPerStream(last))));
  }
  most_symbols = (most_symbols + 63) / 64 * 64;
  const int64_t floats = most * call.x_stride + most * piece.tokens + piece.tokens * call.x_stride;
  uint8_t* buffer = ThreadBuffer(most_symbols + 64 + 4 * floats);
  const auto aligned = (reinterpret_cast<uintptr_t>(buffer) + most_symbols + 63) / 64 * 64;
  c.weights = reinterpret_cast<float*>(aligned);
  c.sums = c.weights + most * call.x_stride;
  float* g = c.sums + piece.tokens * call.x_stride;
  c.g = g;
  std::memset(c.sums, 0, 4 * piece.tokens * call.x_stride);

  for (int64_t row = 0; row < call.out; row += call.rows_per_block) {
    rows.count = std::min(call.rows_per_block, call.out - row);
    rows.levels = call.levels + call.levels_per_row * (piece.expert * call.out + row);
    rows.log2_rows_per_stream = call.codec.Log2RowsPerStream(rows.count);
    rows.stream_bytes = std::min(rows.count, int64_t{1} << rows.log2_rows_per_stream) * call.row_bytes + 2 * Codec::kSlack;
    rows.symbols = buffer + Codec::kSlack;
    for (int64_t t = 0; t < piece.tokens; ++t) {
      const int64_t at = (piece.first_token + t) * call.out + row;
      if (call.is_bfloat16) {
        CopyColumn(reinterpret_cast<const uint16_t*>(call.g) + at, rows.count, g + t, piece.tokens);
      } else {
        CopyColumn(reinterpret_cast<const float*>(call.g) + at, rows.count, g + t, piece.tokens);
      }
    }
    call.add(call.codec.At(piece.expert, piece.part, piece.first_code, row, rows.count), c);
  }

  constexpr int64_t kSymbols = 4 * Codec::kSymbolsPerByte;
  for (int64_t t = 0; t < piece.tokens; ++t) {
    const float* from = c.sums + t * call.x_stride;
    const int64_t at = ((piece.first_token + t) * call.codec.Parts() + piece.part) * call.width;
    if (call.is_bfloat16) {
      StoreArranged<kSymbols>(from, call.width, reinterpret_cast<uint16_t*>(call.y) + at);
    } else {
      StoreArranged<kSymbols>(from, call.width, reinterpret_cast<float*>(call.y) + at);
    }
  }
}

template <typename Codec>
void WorkTransposed(TransposedCall<Codec>& call) {
  const int64_t pieces = call.pieces.size();
  for (int64_t piece; (piece = call.next.fetch_add(1)) < pieces;) {
    MultiplyTransposedPiece(call, call.pieces[piece]);
    call.done.fetch_add(1, std::memory_order_release);
  }
}

// The custom call, once the codec's own arrays are known to fit `experts` and `out`.
template <typename Codec>
ffi::Error CompressedRaggedDotTransposed(ffi::ThreadPool& pool, const InstructionSet<typename Codec::Block>* set,
                                         const Codec& codec, ffi::AnyBuffer g, ffi::Buffer<ffi::BF16> levels,
                                         ffi::Buffer<ffi::S32> group_sizes, ffi::Result<ffi::AnyBuffer> result) {
  if (set == nullptr) return ffi::Error::InvalidArgument("this machine lacks the instruction set named");
  const auto g_shape = g.dimensions(), y_shape = result->dimensions(), levels_shape = levels.dimensions();
  const int64_t parts = codec.Parts(), width = y_shape.size() == 2 ? y_shape[1] / parts : 0;
  if (g_shape.size() != 2 || y_shape.size() != 2 || levels_shape.size() != 3 || y_shape[0] != g_shape[0] ||
      levels_shape[1] != g_shape[1] || y_shape[1] != width * parts || levels_shape[2] < 2 || levels_shape[2] > codec.MostLevels() ||
      static_cast<int64_t>(group_sizes.element_count()) != levels_shape[0] ||
      result->element_type() != g.element_type() ||
      (g.element_type() != ffi::BF16 && g.element_type() != ffi::F32)) {
    return ffi::Error::InvalidArgument("shapes or dtypes of g, levels, group_sizes and the result differ");
  }
  const int64_t tokens = g_shape[0], out = g_shape[1], experts = levels_shape[0];

  auto call = std::make_shared<TransposedCall<Codec>>();
  call->codec = codec;
  call->levels = reinterpret_cast<const uint16_t*>(levels.typed_data());
  call->levels_per_row = levels_shape[2];
  call->out = out;
  call->width = width;
  call->row_bytes = (width + Codec::kSymbolsPerByte - 1) / Codec::kSymbolsPerByte;
  constexpr int64_t kBlock = 4 * Codec::kSymbolsPerByte * kLanesPerBlock;
  call->x_stride = (width + kBlock - 1) / kBlock * kBlock;
  call->rows_per_block = codec.RowsPerBlock(std::min(out, kWeightsBytes / (4 * std::max<int64_t>(1, call->x_stride))));
  call->g = static_cast<const char*>(g.untyped_data());
  call->y = static_cast<char*>(result->untyped_data());
  call->is_bfloat16 = g.element_type() == ffi::BF16;
  call->add = set->add_transposed;

  // Sizes below zero count as none, and tokens that are not there are not promised to anyone.
  int64_t assigned = 0, first_code = 0;
  for (int64_t e = 0; e < experts && assigned < tokens; ++e) {
    const int64_t own = std::clamp<int64_t>(group_sizes.typed_data()[e], 0, tokens - assigned);
    for (int64_t t = 0; t < own; t += kTokensPerPiece) {
      for (int64_t part = 0; part < parts; ++part) {
        call->pieces.push_back({e, part, first_code, assigned + t, std::min(kTokensPerPiece, own - t)});
      }
    }
    assigned += own;
    first_code += codec.Size(e);
  }
  const int64_t itemsize = call->is_bfloat16 ? 2 : 4;
  std::memset(call->y + assigned * parts * width * itemsize, 0, (tokens - assigned) * parts * width * itemsize);
  if (width == 0 || out == 0) return ffi::Error::Success();

  const int64_t pieces = call->pieces.size(), work = assigned * out * parts * width;
  const int64_t threads = std::min(pieces, std::clamp<int64_t>(work / kWorkPerThread, 1, std::max<int64_t>(1, pool.num_threads())));
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([call] { WorkTransposed(*call); });
  WorkTransposed(*call);
  while (call->done.load(std::memory_order_acquire) < pieces) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

#endif  // QMOE_TRANSPOSED_H_
