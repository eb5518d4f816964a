// Rows as they are, into memory that vectors may read beyond. shared/instruction_sets.h includes this once per instruction
// set.

inline void Decode(const Block& block, const Rows& rows) {
  __builtin_prefetch(block.symbols + rows.count * rows.row_bytes);
  std::memcpy(rows.symbols, block.symbols, rows.count * rows.row_bytes);
}
