"""Prefix codes of the gaps between non-zeros and of what follows them: close to the entropy of independent symbols.

In independent symbols the run of zeros before a non-zero is geometric, and the optimal prefix code of a geometric
source is a Golomb code (Gallager and van Voorhis 1975). With many levels zeros are no longer the most of the weights,
and a run shares a Huffman code with the symbol that ends it.

An expert is one stream of bits over its weights in row-major order, in blocks of BLOCK_ROWS rows. Runs of zeros cross
the ends of rows, but not those of blocks. Where density changes along rows, columns are in several classes, equally
many in each, neighbours together: each class is coded as if it were an expert of so many columns, by a code of its own,
in blocks of BLOCK_ROWS * classes rows, and class follows class in the stream. The stream is a sequence of tokens, each
of which stands for at least one weight; there is no state, so any bits are tokens:

    run      the next m weights are zero
    (r, v)   the next r < m weights are zero, and then there is a non-zero with symbol v

so a gap g is g // m runs, then (g % m, v). At the end of a block the zeros that remain are runs; the last of them may
stand for weights that don't exist. m and the words of bits of tokens are those of one of the codes that `gap_codes`
knows by numbers, for each expert the one that costs least. Bits fill uint32 words from the least significant bit up.
Each expert ends with zero bits to a whole word and one more word of zeros, so that 32 bits can be read anywhere from
two words.

Resident (`data`), with segments = ceil(in / SEGMENT), all but the last one `segment_columns(in, segments)` long; with
several classes each has its own, all equally long:

    words        uint32 [n]                       all experts' words, one expert after another
    word_counts  int32 [experts]                  words of each expert
    starts       uint32 [experts, out, segments]  for each segment of a row, the bit of its expert's stream at which the
                                                  token begins that holds the segment's first weight
    skips        uint8 [experts, out, segments]   how many of that token's weights lie before the segment, below m
    parameters   uint8 [experts]                  number of the code; for two or three levels that is m. With several
                                                  classes uint8 [experts, classes]

Stored: words, word_counts and parameters as above, and

    block_starts   uint32 [experts, blocks]  bit at which each block begins, class by class
    level_words    uint32 [k]                all experts' levels as fields of bits, each expert's padded to whole words
    level_formats  uint8 [experts, 5]        base exponent, exponent bits, mantissa bits, sign bits, levels of a row

How levels are packed, and level_formats, `packed_levels` says.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qmoe_jax.codecs.checks import checked_arrays, checked_symbols
from qmoe_jax.codecs.gap_codes import LEVELS, PARAMETERS, WINDOW, Code, codes, numbers, window_table
from qmoe_jax.codecs.packed_levels import pack_levels, place, unpack_levels

__all__ = [
    "BLOCK_ROWS",
    "LEVELS",
    "PARAMETERS",
    "SEGMENT",
    "WINDOW",
    "decode_expert",
    "encode_experts",
    "may_have_classes",
    "number_of_classes",
    "pack",
    "segment_columns",
    "static_bound",
    "stored_nbytes",
    "table_rows",
    "take",
    "unpack",
    "window_table",
]

BLOCK_ROWS = 32
SEGMENT = 512
MOST_CLASSES = 16

# Weights encoded at once: small enough for the working memory, about two bytes for each, to stay in the cache.
CHUNK_WEIGHTS = 1_000_000
MOST_PADDING = 1 << 22  # words that are added where streams are checked, so that few sizes are compiled


def segment_columns(columns: int, segments: int | None = None) -> int:
    """Columns of each segment of a row but the last: as equal as multiples of 16 can be, none above SEGMENT."""
    segments = segments or -(-columns // SEGMENT)
    return -(-columns // (16 * segments)) * 16


def may_have_classes(columns: int, classes: int) -> bool:
    """Whether columns can be in so many classes: segments have to be equal, and multiples of 16."""
    return (
        classes == 1 or classes <= MOST_CLASSES and columns % (16 * classes * -(-columns // (SEGMENT * classes))) == 0
    )


def number_of_classes(data: Mapping[str, jax.Array | np.ndarray]) -> int:
    """Classes of columns."""
    return data["parameters"].shape[1] if data["parameters"].ndim == 2 else 1


# --- Encoding -------------------------------------------------------------------------------------------------------


def encode_experts(
    symbols: jax.Array | np.ndarray, num_levels: int, parameters: Sequence[int] | None = None, classes: int = 1
) -> dict[str, np.ndarray]:
    """Encodes all experts of a layer: symbols uint8 [experts, out, in] -> `data` (see the module's docstring).

    `parameters` are the numbers of codes to choose from; all without it. `classes`: of columns.

    Raises ValueError for another dtype, an empty axis, symbols above `num_levels`, a number of levels that is not in
    LEVELS, columns that can't be in so many classes, or a stream of more than 2^32 bits.
    """
    symbols = checked_symbols(symbols, num_levels, LEVELS)
    if classes < 1 or not may_have_classes(symbols.shape[2], classes):
        raise ValueError(f"classes: {symbols.shape[2]} columns can't be in {classes} classes of equal segments.")
    slots = np.arange(len(numbers(num_levels))) if parameters is None else table_rows(np.array(parameters), num_levels)
    encoded = [_encode(np.split(matrix, classes, axis=1), num_levels, slots) for matrix in symbols]
    words, starts, skips, parameters = zip(*encoded, strict=True)
    numbers_of_codes = np.array(parameters, np.uint8)
    return {
        "words": np.concatenate(words),
        "word_counts": np.array([w.size for w in words], np.int32),
        "starts": np.stack(starts),
        "skips": np.stack(skips),
        "parameters": numbers_of_codes if classes > 1 else numbers_of_codes[:, 0],
    }


def _encode(
    parts: list[np.ndarray], num_levels: int, slots: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """One expert: symbols [out, columns] of each class -> words [n], starts and skips [out, segments], codes' numbers.

    Each class has a code.
    """
    out, columns = parts[0].shape
    block_rows = BLOCK_ROWS * len(parts)
    rows = block_rows * max(1, CHUNK_WEIGHTS // (block_rows * columns))  # whole blocks
    chunks = [[part[i : i + rows] for i in range(0, out, rows)] for part in parts]
    chosen, costs = zip(*(_best_code(own, num_levels, slots, block_rows) for own in chunks), strict=True)
    if (bits := sum(costs)) >= 2**32:
        raise ValueError(
            f"symbols: a matrix of shape {[out, columns * len(parts)]} takes {bits} bits, expected fewer than 2^32."
        )

    words = np.full(-(-bits // 32) + 1, 0xFFFFFFFF, np.uint32)
    starts: list[np.ndarray] = []
    skips: list[np.ndarray] = []
    begin = 0
    for own, slot in zip(chunks, chosen, strict=True):
        placed = []
        for chunk in own:
            *where, begin = _place_chunk(chunk, codes(num_levels)[slot], num_levels, block_rows, begin, words)
            placed.append(where)
        for found, of_chunks in zip((starts, skips), zip(*placed, strict=True), strict=True):
            found.append(np.concatenate(of_chunks))
    words[bits // 32] &= (1 << bits % 32) - 1
    words[bits // 32 + 1 :] = 0
    of_codes = numbers(num_levels)[list(chosen)].tolist()
    return words, np.concatenate(starts, 1).astype(np.uint32), np.concatenate(skips, 1).astype(np.uint8), of_codes


def _place_chunk(
    chunk: np.ndarray, code: Code, num_levels: int, block_rows: int, begin: int, words: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Symbols [rows, columns] of whole blocks, from bit `begin` of `words` on, which are ones and are changed.

    Returns starts and skips [rows, segments], and the bit after the chunk's last.
    """
    columns = chunk.shape[1]
    m, run_bits, tail_bits = code.run, code.lengths[0], code.lengths[1:]  # tails: tokens with a non-zero
    holes = ((1 << tail_bits) - 1) & ~code.words[1:]  # A stream is ones but for the zeros of its tails.
    position, gap, first, rest = _runs(chunk, block_rows)
    # --- Where tokens are: `bit` counts from the chunk's first, without the ones at the ends of blocks.
    quotient = gap // m
    tail = (gap - quotient * m) * num_levels + chunk.reshape(-1)[position] - 1
    bit = np.append(0, np.cumsum(quotient * run_bits + tail_bits[tail]))
    block_ones = -(-rest // m) * run_bits
    ones_before = np.append(0, np.cumsum(block_ones)) + begin  # [blocks + 1]
    at = bit[1:] - tail_bits[tail] + np.repeat(ones_before[:-1], np.diff(first))
    word = begin // 32
    end = int(bit[-1] + ones_before[-1])
    words[word : -(-end // 32)] ^= place(holes[tail], at - 32 * word, -(-end // 32) - word)
    # --- Which of them hold the first weights of segments.
    weight = np.add.outer(np.arange(len(chunk)) * columns, np.arange(0, columns, segment_columns(columns)))
    block = np.arange(len(chunk))[:, None] // block_rows
    following = np.searchsorted(position, weight)  # the first non-zero that isn't before the segment
    previous = np.append(-1, position)[following]
    zeros = weight - np.maximum(previous + 1, block * block_rows * columns)
    return bit[following] + ones_before[block] + zeros // m * run_bits, zeros % m, end


def _runs(symbols: np.ndarray, block_rows: int) -> tuple[np.ndarray, ...]:
    """Where the non-zeros of symbols [rows, in] are, in row-major order.

    Returns:
      position: [n], place of each.
      gap: [n], zeros between it and the one before in its block.
      first: [blocks + 1], which is the first that isn't before each block.
      rest: [blocks], zeros after the last of each block.
    """
    position = np.flatnonzero(symbols.reshape(-1) != 0)
    borders = np.append(np.arange(0, symbols.size, block_rows * symbols.shape[1]), symbols.size)
    first = np.searchsorted(position, borders)
    gap = np.diff(position, prepend=-1) - 1
    full = np.flatnonzero(np.diff(first))  # blocks with a non-zero
    gap[first[full]] = position[first[full]] - borders[full]
    rest = np.diff(borders)
    rest[full] = borders[full + 1] - 1 - position[first[full + 1] - 1]
    return position, gap, first, rest


def _best_code(chunks: list[np.ndarray], num_levels: int, slots: np.ndarray, block_rows: int) -> tuple[int, int]:
    """Which of the codes at `slots` takes least bits for a class of an expert, and these."""
    histogram = np.zeros(0, np.int64)  # [gaps * L], of gaps and the symbols after them
    rests = []
    for chunk in chunks:
        position, gap, _, rest = _runs(chunk, block_rows)
        counts = np.bincount(gap * num_levels + chunk.reshape(-1)[position] - 1, minlength=histogram.size)
        counts[: histogram.size] += histogram
        histogram = counts
        rests.append(rest)
    rest = np.concatenate(rests)
    found = np.flatnonzero(histogram)
    gap, symbol, count = found // num_levels, found % num_levels, histogram[found]

    @functools.cache
    def tokens(m: int) -> np.ndarray:
        """How often each token is taken: int64 [1 + m * L]."""
        runs = int((count * (gap // m)).sum() + (-(-rest // m)).sum())
        return np.append(runs, np.bincount(gap % m * num_levels + symbol, count, m * num_levels).astype(np.int64))

    costs = [int(tokens(code.run) @ code.lengths) for code in map(codes(num_levels).__getitem__, slots)]
    best = int(np.argmin(costs))
    return int(slots[best]), costs[best]


# --- Decoding -------------------------------------------------------------------------------------------------------


def _window(words, first_word, bit):
    """The next WINDOW bits of each lane, int32; whatever the arguments are, nothing is read out of bounds."""
    index = first_word + (bit >> 5).astype(jnp.int32)
    low, high = (words.at[jnp.clip(index + i, 0, words.size - 1)].get(mode="promise_in_bounds") for i in (0, 1))
    shift = bit & 31
    window = (low >> shift) | (high << 1 << (31 - shift))
    return (window & ((1 << WINDOW) - 1)).astype(jnp.int32)


def table_rows(parameters: np.ndarray | jax.Array, num_levels: int) -> np.ndarray | jax.Array:
    """Rows of `window_table` for numbers of codes; always such as there are. Inside `jit` and outside."""
    known = numbers(num_levels)
    of_number = np.minimum(np.searchsorted(known, np.arange(256)), known.size - 1).astype(np.int32)
    return (jnp.asarray(of_number) if isinstance(parameters, jax.Array) else of_number)[parameters]


def take(data: Mapping[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    """`data` of experts start:stop alone."""
    ends = np.append(0, np.cumsum(np.asarray(data["word_counts"]), dtype=np.int64))
    own = {name: array[start:stop] for name, array in data.items() if name != "words"}
    return {"words": data["words"][ends[start] : ends[stop]], **own}


def static_bound(data: Mapping[str, np.ndarray]) -> int:
    """Nothing: loops end when all lanes have."""
    return 0


def decode_expert(
    data: Mapping[str, jax.Array], shape: tuple[int, int, int], num_levels: int, bound: int, expert: ArrayLike
) -> jax.Array:
    """Decodes one expert, inside `jit`: symbols uint8 [out, in]. `expert` may be traced.

    Each segment of a row is a lane; in every step each lane takes a token.
    """
    _, out, columns = shape
    counts = data["word_counts"]
    first_word = jnp.sum(jnp.where(jnp.arange(counts.size) < expert, counts, 0))
    classes, segments = number_of_classes(data), data["starts"].shape[2]
    slot = table_rows(data["parameters"][expert], num_levels)
    entries = jnp.asarray(window_table(num_levels))[slot].reshape(-1)  # [classes * 2^WINDOW]
    table = np.arange(segments) // (segments // classes) << WINDOW  # of each segment

    segment = segment_columns(columns, segments)
    begin = jnp.arange(0, columns, segment)
    end = jnp.minimum(begin + segment, columns)
    begin, end = (jnp.broadcast_to(a, (out, begin.size)) for a in (begin, end))  # [out, segments]
    row = jnp.arange(out)[:, None] * columns

    def step(state):
        bit, column, symbols = state
        entry = entries.at[table + _window(data["words"], first_word, bit)].get(mode="promise_in_bounds")
        entry = jax.lax.optimization_barrier(entry)  # Gathered once, not once for each use.
        last = column + (entry >> 4 & 127).astype(jnp.int32) - 1
        own = (last >= begin) & (last < end) & (column < end)
        index = jnp.where(own, row + last, symbols.size)
        symbols = symbols.at[index].set((entry >> 11 & 15).astype(jnp.uint8), mode="drop")
        return bit + (entry & 15), last + 1, symbols

    first = begin - data["skips"][expert].astype(jnp.int32)
    # Zeros, which `shard_map` takes for as different between devices as the streams are.
    symbols = jnp.zeros(out * columns, jnp.uint8) | data["parameters"][expert].max() & 0
    state = (data["starts"][expert], first, symbols)
    _, _, symbols = jax.lax.while_loop(lambda state: jnp.any(state[1] < end), step, state)
    return symbols.reshape(out, columns)


@functools.partial(jax.jit, static_argnames=("rows", "columns", "num_levels"))
def _walk(words, first_word, slot, bit, weights, *, rows, columns, num_levels):
    """Walks all blocks side by side, whatever the words hold; every argument but `words` has one entry for each.

    Args:
      words: uint32 [n].
      first_word: int32, at which the expert begins.
      slot: int32, row of `window_table`.
      bit: uint32, at which the block begins.
      weights: int32, of the block.
      rows, columns: of a whole block.

    Returns:
      starts: uint32 [rows * segments, blocks], see the module's docstring.
      skips: int32 [rows * segments, blocks].
      end: uint32 [blocks], the bit at which the block ends.
      fits: bool [blocks], whether no non-zero lies beyond the block's end.
    """
    table = jnp.asarray(window_table(num_levels).reshape(-1))

    def next_entry(bit):
        return table.at[(slot << WINDOW) + _window(words, first_word, bit)].get(mode="promise_in_bounds")

    def walk_to(border, bit, position):
        """Takes tokens up to the one that holds the weight `border`."""

        def step(state):
            bit, position, _ = state
            entry = jax.lax.optimization_barrier(next_entry(bit))
            whole = position + (entry >> 19).astype(jnp.int32) <= border
            length = jnp.where(whole, entry >> 15, entry) & 15
            passed = jnp.where(whole, entry >> 19, entry >> 4 & 127).astype(jnp.int32)
            goes_on = position + passed <= border
            return bit + jnp.where(goes_on, length, 0), position + jnp.where(goes_on, passed, 0), goes_on

        state = (bit, position, jnp.ones_like(bit, bool))
        return jax.lax.while_loop(lambda state: jnp.any(state[2]), step, state)[:2]

    def to_segment(state, first):
        first = jnp.minimum(first, weights)
        bit, position = walk_to(first, *state)
        return (bit, position), (bit, first - position)

    segments = np.add.outer(np.arange(rows) * columns, np.arange(0, columns, segment_columns(columns))).reshape(-1)
    state, (starts, skips) = jax.lax.scan(to_segment, (bit, jnp.zeros_like(weights)), jnp.asarray(segments, jnp.int32))
    bit, position = walk_to(weights, *state)
    more = position < weights  # One token more, which stands for weights that don't exist too: it has to be zeros.
    entry = next_entry(bit)
    return starts, skips, bit + jnp.where(more, entry & 15, 0), ~more | (entry >> 11 & 15 == 0)


# --- What is stored -------------------------------------------------------------------------------------------------


def pack(data: Mapping[str, jax.Array], levels: ArrayLike, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """What a checkpoint stores, of `data` and levels bfloat16 [experts, out, L]."""
    level_words, level_formats = pack_levels(np.asarray(levels))
    classes, (experts, _, segments) = number_of_classes(data), data["starts"].shape
    block_starts = np.asarray(data["starts"][:, :: BLOCK_ROWS * classes, :: segments // classes])
    return {
        **{name: np.asarray(data[name]) for name in ("words", "word_counts", "parameters")},
        "block_starts": block_starts.swapaxes(1, 2).reshape(experts, -1),
        "level_words": level_words,
        "level_formats": level_formats,
    }


def stored_nbytes(data: Mapping[str, jax.Array], levels: jax.Array, shape: tuple[int, int, int]) -> int:
    """Bytes of all that `pack` returns."""
    experts, out, _ = shape
    as_they_are = sum(data[name].size * data[name].dtype.itemsize for name in ("words", "word_counts", "parameters"))
    packed_levels = sum(array.nbytes for array in pack_levels(np.asarray(levels)))
    classes = number_of_classes(data)
    return as_they_are + 4 * experts * classes * -(-out // (BLOCK_ROWS * classes)) + packed_levels


def unpack(stored: Mapping[str, np.ndarray], shape: tuple[int, int, int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`data` and levels bfloat16 [experts, out, L] of what `pack` returned.

    Raises ValueError, naming the expert and the block or row: arrays missing or of another dtype or shape; unknown
    parameters; blocks that don't end where the next one begins; levels that don't decode to finite numbers.
    """
    experts, out, columns = shape
    of_codes = np.asarray(stored.get("parameters"))
    classes = of_codes.shape[1] if of_codes.ndim == 2 else 1
    if classes < 1 or not may_have_classes(columns, classes):
        raise ValueError(f"parameters: {classes} classes, in which {columns} columns can't be.")
    columns, block_rows = columns // classes, BLOCK_ROWS * classes
    blocks = -(-out // block_rows)  # of a class
    expected = {
        "words": (np.uint32, (None,)),
        "word_counts": (np.int32, (experts,)),
        "parameters": (np.uint8, (experts, classes) if of_codes.ndim == 2 else (experts,)),
        "block_starts": (np.uint32, (experts, classes * blocks)),
        "level_words": (np.uint32, (None,)),
        "level_formats": (np.uint8, (experts, 5)),
    }
    stored = checked_arrays("gap", stored, shape, expected)
    levels = unpack_levels(stored["level_words"], stored["level_formats"], out, LEVELS)
    words, counts, parameters = (stored[name] for name in ("words", "word_counts", "parameters"))
    if words.size >= 2**31:
        raise ValueError(f"words: {words.size} of them, expected fewer than 2^31; split the experts.")
    if np.any(counts < 2):
        expert = np.argmax(counts < 2)
        raise ValueError(f"word_counts: expert {expert} has {counts[expert]} words, expected at least 2.")
    if counts.sum(dtype=np.int64) != words.size:
        raise ValueError(f"words: found {words.size}, but word_counts count {counts.sum(dtype=np.int64)}.")
    slots, known = table_rows(parameters, levels.shape[-1]), numbers(levels.shape[-1])
    for expert in np.flatnonzero((known[slots] != parameters).reshape(experts, -1).any(1)):
        raise ValueError(f"parameters: expert {expert} has {parameters[expert]}, expected one of {known.tolist()}.")

    first_word = (np.cumsum(counts, dtype=np.int64) - counts).astype(np.int32)
    begin = stored["block_starts"]
    for expert in np.flatnonzero(begin[:, 0]):
        raise ValueError(f"block_starts: expert {expert} begins at bit {begin[expert, 0]}, expected 0.")
    block_weights = columns * np.minimum(block_rows, out - block_rows * np.arange(blocks))
    # Zeros after the last word, so that one program serves layers of about the same size.
    step = min(1 << (words.size - 1).bit_length(), MOST_PADDING)
    walked = _walk(
        np.pad(words, (0, -words.size % step)),
        np.repeat(first_word, classes * blocks),
        np.repeat(slots.astype(np.int32).reshape(-1), blocks),
        begin.reshape(-1),
        np.tile(block_weights.astype(np.int32), experts * classes),
        rows=block_rows,
        columns=columns,
        num_levels=levels.shape[-1],
    )
    starts, skips, end, fits = map(np.asarray, walked)
    _check_ends(words, first_word, counts, begin, end.reshape(begin.shape), fits.reshape(begin.shape), classes)

    def by_row(a):  # [rows * segments of a block, experts * classes * blocks] -> [experts, out, segments]
        a = a.reshape(block_rows, -1, experts, classes, blocks).transpose(2, 4, 0, 3, 1)
        return np.ascontiguousarray(a.reshape(experts, blocks * block_rows, -1)[:, :out])

    data = {
        "words": words,
        "word_counts": counts,
        "starts": by_row(starts),
        "skips": by_row(skips.astype(np.uint8)),
        "parameters": parameters,
    }
    return data, levels


def _check_ends(words, first_word, counts, begin, end, fits, classes) -> None:
    """Raises ValueError unless every block ends where the next begins, and the last one in its expert's last word."""
    blocks = begin.shape[1] // classes

    def name(expert, block):
        of_class = f"class {block // blocks}, " if classes > 1 else ""
        first_row = BLOCK_ROWS * classes * (block % blocks)
        return f"words: expert {expert}, {of_class}block {block % blocks} (from row {first_row} on)"

    for where in np.argwhere(~fits):
        raise ValueError(f"{name(*where)} has a non-zero beyond its end.")
    for expert, block in np.argwhere(end[:, :-1] != begin[:, 1:]):
        raise ValueError(
            f"{name(expert, block)} ends at bit {end[expert, block]}, but the next one begins at "
            f"{begin[expert, block + 1]}."
        )
    last = end[:, -1].astype(np.int64)
    needed = -(-last // 32) + 1
    for expert in np.flatnonzero(needed != counts):
        raise ValueError(
            f"words: expert {expert} ends at bit {last[expert]}, which takes {needed[expert]} words, but word_counts "
            f"says {counts[expert]}."
        )
    index = first_word + last // 32  # the first word with padding
    padding = words[index] >> (last % 32).astype(np.uint32) | words[first_word + counts - 1]
    for expert in np.flatnonzero(padding):
        raise ValueError(f"words: expert {expert} ends at bit {last[expert]}, but is not zero after it.")
