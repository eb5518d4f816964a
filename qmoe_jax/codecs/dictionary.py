"""The paper's codec (QMoE, section 4): 16-bit codewords for sequences of 1 to 14 pairs of trits.

Each row is coded on its own. Two neighbouring trits of a row form a symbol 0..8, first + 3 * second; the last
trit of a row of odd width stands alone. The dictionary holds the 65 536 likeliest sequences of symbols, and
every prefix of an entry is an entry: a trie whose node numbers are the codewords. Encoding is greedy and
needs one gather per symbol; it runs as a scan over the symbols of many rows side by side.

Resident for [experts, out, in]: `codewords` uint16 [n], all rows of all experts one after another, and
`row_offsets` int32 [experts, out + 1], first codeword of each row, counted from the expert's own first. One
expert's share of both is, byte for byte, what the paper's implementation stores for its matrix. Stored are these
two and `levels`, as they are. Symbols are trits: two levels, no more.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import ArrayLike

LEVELS = (2,)
ENTRIES = 65_536
MAX_PAIRS = 14
SYMBOLS = 9
ZEROS = 0.885  # P(0) of the trits that the dictionary is made for

# Encoder states are 16 * node, with a flag above.
ROOT = ENTRIES
END = 1 << 21

# Weights encoded at once; working memory is about four bytes for each.
CHUNK_WEIGHTS = 16_000_000


# --- The dictionary -------------------------------------------------------------------------------


@functools.cache
def _sequences(entries: int = ENTRIES, max_pairs: int = MAX_PAIRS, zeros: float = ZEROS) -> list[bytes]:
    """The symbols of each codeword, likeliest first; all symbols are among them."""
    # Rounding decides between equal probabilities: write .0575 otherwise, and the numbering changes.
    p = (zeros, (1 - zeros) / 2, (1 - zeros) / 2)
    pair = [p[symbol % 3] * p[symbol // 3] for symbol in range(SYMBOLS)]
    queue = [(-1.0, b"")]
    sequences: list[bytes] = []
    while len(sequences) < entries and queue:
        negative_probability, sequence = heapq.heappop(queue)
        if sequence:
            sequences.append(sequence)
        if len(sequence) < max_pairs:
            for symbol in range(SYMBOLS):
                heapq.heappush(queue, (negative_probability * pair[symbol], sequence + bytes([symbol])))
    missing = [bytes([symbol]) for symbol in range(SYMBOLS) if bytes([symbol]) not in sequences]
    # In place of the unlikeliest, which nothing continues.
    return sequences[: len(sequences) - len(missing)] + missing


@functools.cache
def _slots() -> np.ndarray:
    """Symbols of each codeword and, in the last column, how many they are: uint8 [65536, 16]."""
    slots = np.zeros((ENTRIES, 16), np.uint8)
    for codeword, sequence in enumerate(_sequences()):
        slots[codeword, : len(sequence)] = list(sequence)
        slots[codeword, 15] = len(sequence)
    return slots


@functools.cache
def _steps(entries: int = ENTRIES, max_pairs: int = MAX_PAIRS, zeros: float = ZEROS) -> np.ndarray:
    """The trie as a table, int32 [65537 * 16]: 16 * node + symbol -> 16 * next node (+ END).

    Where a node has no child for a symbol, its codeword ends (END), and the walk goes on from the root.
    """
    number = {sequence: codeword for codeword, sequence in enumerate(_sequences(entries, max_pairs, zeros))}
    steps = np.zeros((ROOT + 1, 16), np.int32)
    for symbol in range(SYMBOLS):
        steps[:, symbol] = 16 * number[bytes([symbol])] + END
    for sequence, codeword in number.items():
        if len(sequence) > 1:
            steps[number[sequence[:-1]], sequence[-1]] = 16 * codeword
    return steps.reshape(-1)


@functools.cache
def decode_table() -> np.ndarray:
    """The dictionary as the paper's implementation stores it: uint32 [65536, 2], read-only.

    Word 0 holds pairs 0 to 6, word 1 pairs 7 to 13. In each word bits 0-3 are the total number of pairs; pair
    j of the word stands at bits 4 + 4j (first trit) and 6 + 4j (second trit).
    """
    slots = _slots().astype(np.uint32)
    bits = slots[:, :MAX_PAIRS] % 3 | slots[:, :MAX_PAIRS] // 3 << 2
    shifts = np.arange(4, 32, 4, dtype=np.uint32)
    words = np.bitwise_or.reduce(bits.reshape(ENTRIES, 2, 7) << shifts, axis=2)  # [65536, 2]
    table = words | slots[:, 15:]
    table.setflags(write=False)
    return table


# --- Encoding -------------------------------------------------------------------------------------


@jax.jit
def _parse(trits, steps):
    """Greedy parse of trits uint8 [rows, columns].

    Returns:
      node: uint16 [rows, pairs], where in the trie each symbol leads.
      is_end: bool [rows, pairs], a codeword ends here; it is the node.
      count: int32 [rows], codewords of each row.
    """
    rows, columns = trits.shape
    trits = jnp.pad(trits, ((0, 0), (0, columns % 2)))
    symbols = (trits[:, 0::2] + 3 * trits[:, 1::2]).T  # [pairs, rows]

    def step(state, symbol):
        following = steps[state % END | symbol]
        return following, ((state // 16).astype(jnp.uint16), following >= END)

    last, (node, is_end) = jax.lax.scan(step, steps[jnp.int32(16 * ROOT) | symbols[0]], symbols[1:])
    node = jnp.concatenate([node, (last // 16).astype(jnp.uint16)[None]])
    is_end = jnp.concatenate([is_end, jnp.ones((1, rows), bool)])
    return node.T, is_end.T, is_end.sum(0)


def _encode_rows(trits, *dictionary):
    """trits uint8 [rows, columns] -> codewords uint16 [n], how many of them each row has int [rows]."""
    rows, columns = trits.shape
    steps = jnp.asarray(_steps(*dictionary))
    chunk = max(1, CHUNK_WEIGHTS // columns)
    codewords, counts = [np.zeros(0, np.uint16)], [np.zeros(0, np.int64)]
    for i in range(0, rows, chunk):
        node, is_end, count = map(np.asarray, _parse(jnp.asarray(trits[i : i + chunk]), steps))
        codewords.append(node[is_end])
        counts.append(count)
    return np.concatenate(codewords), np.concatenate(counts)


def _check_trits(trits, axes: tuple[str, ...]) -> None:
    if trits.dtype != np.uint8:
        raise ValueError(f"trits: dtype {trits.dtype}, expected uint8.")
    if trits.ndim != len(axes) or trits.shape[-1] == 0:
        raise ValueError(f"trits: shape {list(trits.shape)}, expected [{', '.join(axes)}] with at least one column.")
    if trits.size and (largest := int(trits.max())) > 2:
        raise ValueError(f"trits: found the value {largest}, expected 0 (zero), 1 (minimum) or 2 (maximum).")


def encode_experts(trits: jax.Array | np.ndarray, num_levels: int = 2) -> dict[str, np.ndarray]:
    """Encodes all experts of a layer: trits uint8 [experts, out, in] -> `data` (see the module's docstring).

    Raises ValueError for another dtype, another number of axes, a value above 2, or more levels than two.
    """
    if num_levels != 2:
        raise ValueError(
            f"levels: {num_levels} in a row, but the dictionary holds trits, with 2 (minimum and maximum). "
            "Codec gap holds up to 14."
        )
    _check_trits(trits, ("experts", "out", "in"))
    experts, out, columns = trits.shape
    codewords, counts = _encode_rows(trits.reshape(experts * out, columns))
    row_offsets = np.zeros((experts, out + 1), np.int32)
    np.cumsum(counts.reshape(experts, out), axis=1, out=row_offsets[:, 1:])
    return {"codewords": codewords, "row_offsets": row_offsets}


def encode(trits: jax.Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encodes one matrix: trits uint8 [rows, columns] -> codewords uint16 [n], row_offsets int32 [rows + 1].

    These are the bytes of the paper's `w_comp` and `row_off`. Raises ValueError as `encode_experts`.
    """
    _check_trits(trits, ("rows", "columns"))
    codewords, counts = _encode_rows(trits)
    return codewords, np.append(0, np.cumsum(counts)).astype(np.int32)


def count_codewords(trits: jax.Array | np.ndarray, entries: int, max_pairs: int, zeros: float) -> np.ndarray:
    """How many codewords each row takes in a dictionary of another size: int [rows], for trits uint8 [rows, columns].

    The dictionary holds the likeliest `entries` (at most 65 536) sequences of up to `max_pairs` pairs of independent
    trits with P(0) = `zeros`, and all single pairs.
    """
    _check_trits(trits, ("rows", "columns"))
    return _encode_rows(trits, entries, max_pairs, zeros)[1]


# --- Decoding -------------------------------------------------------------------------------------


def decode(codewords: np.ndarray, row_offsets: np.ndarray, columns: int) -> np.ndarray:
    """Decodes one matrix: codewords uint16 [n], row_offsets int32 [rows + 1] -> trits uint8 [rows, columns].

    Raises ValueError that names the first malformed row.
    """
    data = {"codewords": np.asarray(codewords), "row_offsets": np.asarray(row_offsets)[None]}
    shape = (1, data["row_offsets"].size - 1, columns)
    _check(data, shape)
    return np.asarray(_decode_one(data, shape, static_bound(data)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _decode_one(data, shape, bound):
    return decode_expert(data, shape, 2, bound, 0)


def take(data: Mapping[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    """`data` of experts start:stop alone."""
    ends = np.append(0, np.cumsum(np.asarray(data["row_offsets"])[:, -1], dtype=np.int64))
    return {"codewords": data["codewords"][ends[start] : ends[stop]], "row_offsets": data["row_offsets"][start:stop]}


def static_bound(data: Mapping[str, np.ndarray]) -> int:
    """The most codewords an expert has."""
    return min(int(np.max(data["row_offsets"][:, -1], initial=0)), data["codewords"].size)


def decode_expert(
    data: Mapping[str, jax.Array], shape: tuple[int, int, int], num_levels: int, bound: int, expert: ArrayLike
) -> jax.Array:
    """Decodes one expert, inside `jit`: trits uint8 [out, in]. `expert` may be traced.

    All codewords' symbols, one after another, are the symbols of the matrix in row-major order. So symbol p
    of codeword c, which starts at symbol s, is entry 16 c + p - s of the table, and 16 c - s is constant
    along a codeword: its changes are scattered to where codewords start, and summed up along each row.
    """
    _, out, columns = shape
    pairs = (columns + 1) // 2
    slots = jnp.asarray(_slots().reshape(-1))
    codewords, row_offsets = data["codewords"], data["row_offsets"]

    # Near the end of the codewords the slice begins before the expert's first; others' are masked.
    counts = row_offsets[:, -1]
    first = jnp.sum(jnp.where(jnp.arange(counts.size) < expert, counts, 0))
    begin = jnp.clip(first, 0, codewords.size - bound)
    codeword = jax.lax.dynamic_slice(codewords, (begin,), (bound,)).astype(jnp.int32)
    slot = jnp.arange(bound) + begin - first
    own = (slot >= 0) & (slot < counts[expert])

    length = jnp.where(own, slots[16 * codeword + 15], 0).astype(jnp.int32)
    start = jnp.cumsum(length) - length  # [bound], in symbols of the matrix
    entry = 16 * codeword - start % pairs
    before = jnp.where(start % pairs == 0, 0, jnp.roll(entry, 1))
    changes = jnp.zeros((out * pairs,), jnp.int32)
    changes = changes.at[start].add(jnp.where(own, entry - before, 0), mode="drop", indices_are_sorted=True)
    entries = jnp.cumsum(changes.reshape(out, pairs), axis=1) + jnp.arange(pairs)
    symbols = slots.at[entries].get(mode="clip")  # [out, pairs]
    return jnp.stack([symbols % 3, symbols // 3], axis=-1).reshape(out, 2 * pairs)[:, :columns]


# --- What is stored -------------------------------------------------------------------------------


def pack(data: Mapping[str, jax.Array], levels: ArrayLike, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """What a checkpoint stores: `data` and levels bfloat16 [experts, out, 2], as they are."""
    return {"levels": np.asarray(levels), **{name: np.asarray(array) for name, array in data.items()}}


def stored_nbytes(data: Mapping[str, jax.Array], levels: jax.Array, shape: tuple[int, int, int]) -> int:
    """Bytes of all that `pack` returns."""
    return sum(a.size * a.dtype.itemsize for a in (*data.values(), levels))


def unpack(stored: Mapping[str, np.ndarray], shape: tuple[int, int, int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`data` and levels bfloat16 [experts, out, 2] of what `pack` returned.

    Raises ValueError: arrays missing or of another dtype or shape; offsets out of order or past the end; a row whose
    codewords hold more or fewer trits than `in`. Expert and row are named.
    """
    if set(stored) != {"codewords", "row_offsets", "levels"}:
        raise ValueError(
            f"dictionary codec: found arrays {sorted(stored)}, expected codewords, row_offsets and levels."
        )
    data = {name: np.asarray(stored[name]) for name in ("codewords", "row_offsets")}
    levels = np.asarray(stored["levels"])
    if levels.dtype != ml_dtypes.bfloat16 or levels.shape != (*shape[:2], 2):
        raise ValueError(f"levels: {levels.dtype} {list(levels.shape)}, expected bfloat16 {[*shape[:2], 2]}.")
    _check(data, shape)
    return data, levels


def _check(data: Mapping[str, np.ndarray], shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless every row of `data` decodes to exactly `in` trits; see `unpack`."""
    experts, out, columns = shape
    pairs = (columns + 1) // 2
    codewords, row_offsets = data["codewords"], data["row_offsets"]
    if codewords.dtype != np.uint16 or codewords.ndim != 1:
        raise ValueError(f"codewords: {codewords.dtype} {list(codewords.shape)}, expected uint16 [n].")
    if row_offsets.dtype != np.int32 or row_offsets.shape != (experts, out + 1):
        raise ValueError(
            f"row_offsets: {row_offsets.dtype} {list(row_offsets.shape)}, expected int32 {[experts, out + 1]}."
        )
    if codewords.size >= 2**31:
        raise ValueError(f"codewords: {codewords.size} of them, expected fewer than 2^31; split the experts.")

    for expert in np.flatnonzero(row_offsets[:, 0]):
        raise ValueError(f"row_offsets: expert {expert} begins at {row_offsets[expert, 0]}, expected 0.")
    for expert, row in np.argwhere(np.diff(row_offsets.astype(np.int64), axis=1) <= 0):
        raise ValueError(
            f"row_offsets: expert {expert}, row {row} goes from {row_offsets[expert, row]} to "
            f"{row_offsets[expert, row + 1]}, expected at least one codeword."
        )
    counts = row_offsets[:, -1].astype(np.int64)
    if counts.sum() != codewords.size:
        raise ValueError(f"codewords: found {codewords.size}, but row_offsets count {counts.sum()}.")
    if codewords.size == 0:
        return
    first = np.cumsum(counts) - counts  # [experts]
    starts = (first[:, None] + row_offsets[:, :-1]).reshape(-1)  # [experts * out]
    found = np.add.reduceat(_slots()[codewords, 15], starts, dtype=np.int64).reshape(experts, out)
    for expert, row in np.argwhere(found != pairs):
        raise ValueError(
            f"codewords: expert {expert}, row {row} holds {found[expert, row]} pairs of trits, "
            f"expected {pairs} for a width of {columns}."
        )
