// Codes of gaps to symbols, a byte each. shared/instruction_sets.h includes this once per instruction set.

// Where a stream of rows is being decoded.
struct Stream {
  const uint8_t* next;  // where `bits` were read
  uint64_t bits;        // what is left of 64 bits, the last of which is a one: as many are used as zeros follow it
  uint8_t* to;          // where the next symbol goes
  uint8_t* end;         // of the stream's rows
};

inline uint64_t LoadBits(const uint8_t* from) {
  uint64_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bits | uint64_t{1} << 63;
}

// At least 56 bits, enough for kSteps.
inline void Refill(Stream& s) {
  const int used = __builtin_clzll(s.bits);
  s.next += used >> 3;
  s.bits = LoadBits(s.next) >> (used & 7);
}
static_assert(kSteps * kWindow <= 56);

// At least one step, where there are more bits before limit + 8, beyond which nothing is read.
inline void RefillNearEnd(Stream& s, const uint8_t* limit) {
  const int used = __builtin_clzll(s.bits | 1);
  s.next += used >> 3;
  const int64_t beyond = std::max<int64_t>(0, s.next - limit);
  s.next -= beyond;
  s.bits = LoadBits(s.next) >> std::min<int64_t>(63, (used & 7) + 8 * beyond);
}

// Uses some bits, and writes their symbols.
template <Symbols kSymbols>
inline void Step(const uint64_t* entries, Stream& s) {
  const uint64_t* entry = &entries[s.bits & (kEntries - 1)];
  uint8_t* to = s.to;
  s.bits >>= *entry & 63;
  s.to += *entry >> 56;
  if constexpr (kSymbols == Symbols::kLast) {
    s.to[-1] = reinterpret_cast<const uint8_t*>(entry)[1];
  } else if constexpr (kSymbols == Symbols::kBytes) {
    const uint64_t bytes = *entry >> 8;
    std::memcpy(to, &bytes, sizeof(bytes));
  } else if constexpr (kSymbols == Symbols::kNibbles) {
    SpreadNibbles(reinterpret_cast<const uint8_t*>(entry) + 1, to);
  } else {
    SpreadSymbols(entry, to);
  }
}

// Streams take turns, since each step has to wait for the one before it in its own stream. All go on until all have
// ended: those that have write what no one reads.
template <Symbols kSymbols>
inline void DecodeStreams(const uint64_t* entries, const Stream* streams, const uint8_t* limit) {
  static_assert(kStreams == 6, "named one by one, as compilers keep only such in registers");
  Stream a = streams[0], b = streams[1], c = streams[2], d = streams[3], e = streams[4], f = streams[5];
  const auto all = [&](auto function) { function(a), function(b), function(c), function(d), function(e), function(f); };
  const auto going = [&] {
    return a.to < a.end || b.to < b.end || c.to < c.end || d.to < d.end || e.to < e.end || f.to < f.end;
  };
  const auto step = [&](Stream& s) { Step<kSymbols>(entries, s); };
  const auto back_to_end = [](Stream& s) { s.to = std::min(s.to, s.end); };
  // The next turn of all streams goes on where the last stream of this turn ends.
  const int64_t next_turn = kStreams * (b.next - a.next);
  const auto refill = [&](Stream& s) {
    Refill(s);
    __builtin_prefetch(s.next + next_turn);
  };
  const uint8_t* last = std::max({a.next, b.next, c.next, d.next, e.next, f.next});
  for (int64_t safe = (limit - last) / 8; safe > 0 && going(); --safe) {
    all(refill);
    for (int i = 0; i < kSteps; ++i) all(step);
    all(back_to_end);
  }
  while (going()) {
    all([&](Stream& s) { RefillNearEnd(s, limit); });
    all(step);
    all(back_to_end);
  }
}

// Stays within the rows and kSlack bytes around each stream whatever the arrays hold.
inline void Decode(const Block& block, const Rows& rows) {
  const uint8_t* limit = block.words + block.bytes - 8;
  const int64_t per_stream = int64_t{1} << rows.log2_rows_per_stream;
  for (int64_t first = 0; first < rows.count; first += kStreams * per_stream) {
    Stream streams[kStreams];
    for (int s = 0; s < kStreams; ++s) {
      const int64_t row = first + s * per_stream, count = std::min(per_stream, rows.count - row);
      uint8_t* to = rows.Row(row);
      if (count <= 0) {
        streams[s] = {block.words, uint64_t{1} << 63, to, to};
        continue;
      }
      const int64_t ahead = row + kStreams * per_stream;
      __builtin_prefetch(&block.starts[ahead * block.segments]);
      __builtin_prefetch(&block.skips[ahead * block.segments]);
      __builtin_prefetch(&rows.levels[ahead * rows.levels_per_row]);
      // Both minima are without effect on arrays that were checked.
      const int64_t bit = std::min(block.first_bit + block.starts[row * block.segments], 8 * block.bytes);
      const int64_t skip = std::min<int64_t>(block.skips[row * block.segments], kMostRun - 1);
      uint8_t* end = to + count * rows.row_bytes;
      if (block.symbols == Symbols::kLast) std::memset(to, 0, end - to);
      streams[s] = {block.words + bit / 8, uint64_t{1} << (63 - bit % 8), to - skip, end};
    }
    switch (block.symbols) {
      case Symbols::kPairs: DecodeStreams<Symbols::kPairs>(block.entries, streams, limit); break;
      case Symbols::kNibbles: DecodeStreams<Symbols::kNibbles>(block.entries, streams, limit); break;
      case Symbols::kBytes: DecodeStreams<Symbols::kBytes>(block.entries, streams, limit); break;
      case Symbols::kLast: DecodeStreams<Symbols::kLast>(block.entries, streams, limit); break;
    }
  }
}
