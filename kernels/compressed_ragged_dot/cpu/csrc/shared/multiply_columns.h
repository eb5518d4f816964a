// Tokens times the rows of a matrix as they are. instruction_sets.h includes this once per instruction set.

inline void StoreVector(Vector v, float* to) { std::memcpy(to, &v, sizeof(v)); }

// Symbols to weights, columns in the order in which ArrangeToken has them. What follows a row's end within its last
// vectors is the next row's: nobody reads their sums.
template <typename Levels>
inline void Expand(const Rows& rows, float* weights) {
  constexpr int kSymbols = 4 * kSymbolsPerByte;  // of a lane
  for (int64_t row = 0; row < rows.count; ++row, weights += rows.x_stride) {
    Levels levels;
    LoadLevels(rows.levels + row * rows.levels_per_row, rows.levels_per_row, &levels);
    const uint8_t* symbols = rows.Row(row);
    for (int64_t i = 0; i < rows.x_stride; i += kSymbols * kLanesPerBlock) {
      for (int64_t lane = 0; lane < kLanesPerBlock; lane += kLanes) {
        Codes codes = LoadCodes(symbols + i / kSymbolsPerByte + 4 * lane);
#pragma GCC unroll 8
        for (int k = 0; k < kSymbols; ++k) {
          StoreVector(Weights(levels, codes), weights + i + k * kLanesPerBlock + lane);
          codes = ShiftRight(codes, kSymbolsPerByte == 1 ? 8 : k % 2 == 0 ? kSymbolBits : 8 - kSymbolBits);
        }
      }
    }
  }
}

// sums[t, :] += g[row, t] * weights[row, :], for tokens from `token` on.
template <int kTokens>
inline void AddTokens(const Columns& c, int64_t token) {
  constexpr int kVectors = 2;
  const int64_t stride = c.rows.x_stride;  // whole blocks
  float* sums = c.sums + token * stride;
  for (int64_t column = 0; column < stride; column += kVectors * kLanes) {
    Vector sum[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) sum[t][v] = Load(sums + t * stride + column + v * kLanes);
    }
    const float* weights = c.weights + column;
    const float* g = c.g + token;
    for (int64_t row = 0; row < c.rows.count; ++row, weights += stride, g += c.tokens) {
      Vector w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = Load(weights + v * kLanes);
      for (int t = 0; t < kTokens; ++t) {
        const Vector factor = Zero() + g[t];
        for (int v = 0; v < kVectors; ++v) sum[t][v] = MultiplyAdd(factor, w[v], sum[t][v]);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) StoreVector(sum[t][v], sums + t * stride + column + v * kLanes);
    }
  }
}

inline void AddTransposed(const Block& block, const Columns& c) {
  Decode(block, c.rows);
  if (kMostLevels <= 3 || c.rows.levels_per_row <= 3) {
    Expand<FewLevels>(c.rows, c.weights);
  } else {
    Expand<ManyLevels>(c.rows, c.weights);
  }
  int64_t token = 0;
  for (; token + 4 <= c.tokens; token += 4) AddTokens<4>(c, token);
  if (c.tokens - token >= 2) AddTokens<2>(c, token), token += 2;
  if (c.tokens - token >= 1) AddTokens<1>(c, token);
}
