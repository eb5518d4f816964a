// Codewords of the dictionary to pairs of symbols. shared/instruction_sets.h includes this once per instruction set.

// Stays below the end of the rows + kSlack whatever the codewords are.
inline void Decode(const Block& block, const Rows& rows) {
  const uint16_t* codeword = block.begin;
  const uint16_t* end = block.end;
  uint8_t* pairs = rows.symbols;
  const uint8_t* pairs_end = pairs + rows.count * rows.row_bytes;
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
