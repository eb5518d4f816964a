// Some rows of one expert, times its tokens. dictionary_cpu.cc includes this once per instruction set, inside a
// namespace that says what a vector is:
//
//   kLanes                  floats in a vector; divides kHalf
//   kMaxTokens              tokens multiplied at once
//   RowsAtOnce(tokens)      rows multiplied at once; as many accumulators have to fit the registers
//   Vector, Codes, Levels   floats; integers; a row's (0, minimum, maximum)
//   LoadLevels(levels)      from two bfloat16
//   LoadCodes(bytes)        one byte per lane
//   SecondTrits(codes)      moves the second trit of each pair to where the first one was
//   Weights(levels, codes)  chooses by the lowest two bits of each lane
//   Zero(), Load(floats), MultiplyAdd(a, b, c) = a * b + c, Sum(vector)
//   SpreadNibbles(word, to) writes the 16 nibbles of a word to 16 bytes, with anything in their upper halves
//
// A codeword becomes one byte per pair of trits. As all rows have equally many pairs, nothing here depends on
// where a row's codewords end: the bytes of all rows simply follow each other. They then meet the tokens in
// whole vectors, as tokens are stored with the first elements of kHalf pairs before the second ones.

// Writes the pairs of some codewords. Stays below pairs_end + kSlack whatever the codewords are.
inline void Decode(const uint16_t* codeword, const uint16_t* end, uint8_t* pairs, const uint8_t* pairs_end) {
  for (; end - codeword >= 4 && pairs < pairs_end; codeword += 4) {
    __builtin_prefetch(codeword + kPrefetch);  // Processors by themselves do not fetch across pages.
    // All that is read comes before all that is written, which the compiler takes for possibly the same.
    const uint64_t* a = &table.entries[codeword[0]];
    const uint64_t* b = &table.entries[codeword[1]];
    const uint64_t* c = &table.entries[codeword[2]];
    const uint64_t* d = &table.entries[codeword[3]];
    uint8_t* after_a = pairs + Length(a);
    uint8_t* after_b = after_a + Length(b);
    uint8_t* after_c = after_b + Length(c);
    uint8_t* after_d = after_c + Length(d);
    SpreadNibbles(a, pairs);
    SpreadNibbles(b, after_a);
    SpreadNibbles(c, after_b);
    SpreadNibbles(d, after_c);
    pairs = after_d;
  }
  for (; codeword < end && pairs < pairs_end; ++codeword) {
    const uint64_t* entry = &table.entries[*codeword];
    uint8_t* after = pairs + Length(entry);
    SpreadNibbles(entry, pairs);
    pairs = after;
  }
}

// Rows [row, row + kRows) times tokens [token, token + kTokens). Where a row ends inside a vector, the next
// row's pairs meet the zeros that tokens are padded with.
template <int kRows, int kTokens, typename Output>
inline void MultiplyTile(const Rows& rows, int64_t row, int64_t token) {
  Levels levels[kRows];
  Vector sum[kRows][kTokens];
  const uint8_t* pairs[kRows];
  const float* x = rows.x + token * rows.x_stride;
  for (int r = 0; r < kRows; ++r) {
    levels[r] = LoadLevels(rows.levels + 2 * (row + r));
    pairs[r] = rows.pairs + (row + r) * rows.pairs_per_row;
    for (int t = 0; t < kTokens; ++t) sum[r][t] = Zero();
  }
  for (int64_t i = 0; i < rows.x_stride; i += 2 * kHalf) {
    for (int64_t j = i; j < i + kHalf; j += kLanes) {
      Codes codes[kRows];
      for (int r = 0; r < kRows; ++r) codes[r] = LoadCodes(pairs[r] + (i / 2 + j - i));
      for (int t = 0; t < kTokens; ++t) {
        const Vector first = Load(x + t * rows.x_stride + j);
        for (int r = 0; r < kRows; ++r) sum[r][t] = MultiplyAdd(Weights(levels[r], codes[r]), first, sum[r][t]);
      }
      for (int r = 0; r < kRows; ++r) codes[r] = SecondTrits(codes[r]);
      for (int t = 0; t < kTokens; ++t) {
        const Vector second = Load(x + t * rows.x_stride + j + kHalf);
        for (int r = 0; r < kRows; ++r) sum[r][t] = MultiplyAdd(Weights(levels[r], codes[r]), second, sum[r][t]);
      }
    }
  }
  Output* y = static_cast<Output*>(rows.y) + token * rows.y_stride + row;
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) Store(Sum(sum[r][t]), y + t * rows.y_stride + r);
  }
}

template <int kTokens, typename Output>
inline void MultiplyTokens(const Rows& rows, int64_t token) {
  constexpr int kRows = RowsAtOnce(kTokens);
  int64_t row = 0;
  for (; row + kRows <= rows.count; row += kRows) MultiplyTile<kRows, kTokens, Output>(rows, row, token);
  for (; row < rows.count; ++row) MultiplyTile<1, kTokens, Output>(rows, row, token);
}

template <typename Output>
void Multiply(const Rows& rows) {
  Decode(rows.codewords, rows.codewords_end, rows.pairs, rows.pairs + rows.count * rows.pairs_per_row);
  for (int64_t token = 0, left = rows.tokens; left > 0;) {
    // 5 tokens as 3 + 2 rather than 4 + 1.
    const int64_t passes = (left + kMaxTokens - 1) / kMaxTokens;
    const int64_t now = (left + passes - 1) / passes;
    static_assert(kMaxTokens == 4, "one case for each number of tokens");
    switch (now) {
      case 1: MultiplyTokens<1, Output>(rows, token); break;
      case 2: MultiplyTokens<2, Output>(rows, token); break;
      case 3: MultiplyTokens<3, Output>(rows, token); break;
      default: MultiplyTokens<4, Output>(rows, token); break;
    }
    token += now;
    left -= now;
  }
}
