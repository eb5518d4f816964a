// The symbols of some rows, times tokens. instruction_sets.h includes this once per instruction set.

// Rows [row, row + kRows) times tokens [token, token + kTokens). Where a row ends inside a vector, what follows it
// meets the zeros that tokens are padded with.
template <int kRows, int kTokens, typename Output, typename Levels>
inline void MultiplyTile(const Rows& rows, int64_t row, int64_t token) {
  constexpr int kSums = SumsAtOnce(kTokens);
  Levels levels[kRows];
  Vector sum[kRows][kTokens][kSums];
  const uint8_t* symbols[kRows];
  const float* x = rows.x + token * rows.token_stride;
  for (int r = 0; r < kRows; ++r) {
    LoadLevels(rows.levels + (row + r) * rows.levels_per_row, rows.levels_per_row, &levels[r]);
    symbols[r] = rows.Row(row + r);
    for (int t = 0; t < kTokens; ++t) {
      for (int s = 0; s < kSums; ++s) sum[r][t][s] = Zero();
    }
  }
  constexpr int kSymbols = 4 * kSymbolsPerByte;  // of a lane
  for (int64_t part = 0; part < rows.parts; ++part) {
    for (int64_t i = 0; i < rows.x_stride; i += kSymbols * kLanesPerBlock) {
      for (int64_t lane = 0; lane < kLanesPerBlock; lane += kLanes) {
        Codes codes[kRows];
        for (int r = 0; r < kRows; ++r) codes[r] = LoadCodes(symbols[r] + i / kSymbolsPerByte + 4 * lane);
#pragma GCC unroll 8
        for (int k = 0; k < kSymbols; ++k) {
          for (int t = 0; t < kTokens; ++t) {
            const Vector v = Load(x + t * rows.token_stride + i + k * kLanesPerBlock + lane);
            for (int r = 0; r < kRows; ++r) {
              Vector& s = sum[r][t][k % kSums];
              s = MultiplyAdd(Weights(levels[r], codes[r]), v, s);
            }
          }
          const int bits = kSymbolsPerByte == 1 ? 8 : k % 2 == 0 ? kSymbolBits : 8 - kSymbolBits;
          for (int r = 0; r < kRows; ++r) codes[r] = ShiftRight(codes[r], bits);
        }
      }
    }
    x += rows.x_stride;
    for (int r = 0; r < kRows; ++r) symbols[r] += rows.part_bytes;
  }
  Output* y = static_cast<Output*>(rows.y) + token * rows.y_stride + row;
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) {
      for (int s = 1; s < kSums; ++s) sum[r][t][0] = Add(sum[r][t][0], sum[r][t][s]);
      Store(Sum(sum[r][t][0]), y + t * rows.y_stride + r);
    }
  }
}

template <int kTokens, typename Output, typename Levels>
inline void MultiplyTokens(const Rows& rows, int64_t token) {
  constexpr int kRows = RowsAtOnce(kTokens);
  int64_t row = 0;
  for (; row + kRows <= rows.count; row += kRows) MultiplyTile<kRows, kTokens, Output, Levels>(rows, row, token);
  for (; row < rows.count; ++row) MultiplyTile<1, kTokens, Output, Levels>(rows, row, token);
}

template <typename Output, typename Levels>
void MultiplyAll(const Rows& rows) {
  for (int64_t token = 0, left = rows.tokens; left > 0;) {
    // 5 tokens as 3 + 2 rather than 4 + 1.
    const int64_t passes = (left + kMaxTokens - 1) / kMaxTokens;
    const int64_t now = (left + passes - 1) / passes;
    static_assert(kMaxTokens == 4, "one case for each number of tokens");
    switch (now) {
      case 1: MultiplyTokens<1, Output, Levels>(rows, token); break;
      case 2: MultiplyTokens<2, Output, Levels>(rows, token); break;
      case 3: MultiplyTokens<3, Output, Levels>(rows, token); break;
      default: MultiplyTokens<4, Output, Levels>(rows, token); break;
    }
    token += now;
    left -= now;
  }
}

template <typename Output>
void Multiply(const Block* blocks, const Rows& rows) {
  Rows part = rows;
  for (int64_t p = 0; p < rows.parts; ++p, part.symbols += rows.part_bytes) Decode(blocks[p], part);
  if constexpr (kMostLevels > 3) {
    if (rows.levels_per_row > 3) return MultiplyAll<Output, ManyLevels>(rows);
  }
  MultiplyAll<Output, FewLevels>(rows);
}

constexpr InstructionSet<Block> kSet = {Multiply<float>, Multiply<uint16_t>, AddTransposed};
