"""What the GPU kernels for the codec `gap` share: the table, a lane's way through its segment.

A lane takes a segment of a row, at most 512 columns. It holds the words of its stream that come next: the 32 bits from
any bit on are its window. In every step it looks up LOOKUPS times what the next WINDOW bits stand for, and gathers the
tokens' values at the non-zeros found. Zeros cost nothing. Lanes side by side take the same segment of neighbouring
rows: their values lie in the same 2 KB, and they end at nearly the same time. A program writes the part of its rows'
products that one segment contributes; parts are added up in order.

    bits of an entry of the table   what they say
    0 to 4                          how many bits its tokens take; at most 12, but whoever shifts by it need not mask it
    5 to 11, and 20                 place of the first non-zero among the tokens' weights; that there is none
    12 to 15                        which of the row's levels that is, from 0
    16 to 19                        which one the second non-zero is, the last of the weights
    24                              that there is no second one
    25 to 31                        how many weights its tokens stand for

The bits for `none` make for a column far beyond the segment, and what lies beyond a segment belongs to the next one:
one comparison of columns, unsigned, serves for both, and for the bounds of arrays. Words are fetched from a clamped
index, and every entry stands for at least one weight: whatever the arrays hold, lanes end, and read what exists.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qmoe_jax.codecs import gap
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot.gpu.shared import Config, dense_tokens

WINDOW = gap.WINDOW
LOOKUPS = 2  # of 12 bits each: less than the 32 there are

# Fields of an entry.
USED_MASK = 31
PLACE_SHIFT, PLACE_MASK = 5, 0x807F
LEVEL_SHIFTS, LEVEL_MASK = (12, 16), 15
NO_SECOND = 1 << 24
WEIGHTS_SHIFT = 25
MAX_WEIGHTS = 127


def streams(rhs: CompressedExperts) -> jax.Array:
    """Where each expert's words start, and which row of `table` is that of each class: int32 [experts, 1 + classes]."""
    counts = rhs.data["word_counts"]
    # Whatever the number is, the result is a row of the table.
    slot = gap.table_rows(rhs.data["parameters"], rhs.levels.shape[2])
    return jnp.column_stack([jnp.cumsum(counts) - counts, slot])


def arrays(rhs: CompressedExperts) -> tuple[jax.Array, ...]:
    """words [n], starts and skips [experts, out, segments], levels [experts, out, L], table [parameters, 2^WINDOW]."""
    return (
        *(rhs.data[name] for name in ("words", "starts", "skips")),
        rhs.levels,
        jnp.asarray(table(rhs.levels.shape[2])),
    )


def heuristic(tokens: int, shape: tuple[int, int, int], dtype: DTypeLike) -> Config:
    """Block sizes for [tokens, in] and experts of `shape` (experts, out, in): untuned.

    A program is a warp, so that no warp waits for another at the end of a step.
    """
    block = 1 if tokens == 1 else 16 // jnp.dtype(dtype).itemsize
    return Config(rows=32, warps=1, tokens=block, dense_tokens=dense_tokens(tokens, shape, dtype))


def launches(config: Config, rhs: CompressedExperts, items: int) -> tuple[int, int, int]:
    """Segments of a row, blocks of rows, and programs in all: items x segments x blocks, the last one fastest."""
    segments, blocks = rhs.data["starts"].shape[2], -(-rhs.shape[1] // config.rows)
    return segments, blocks, items * segments * blocks


@functools.cache
def table(num_levels: int) -> np.ndarray:
    """What the kernels know about each window of bits, for each parameter: uint32 [parameters, 2^WINDOW], read-only."""
    single = gap.window_table(num_levels)
    length, weights, symbol = (single >> shift & mask for shift, mask in ((0, 15), (4, 127), (11, 15)))
    window = np.broadcast_to(np.arange(1 << WINDOW, dtype=np.uint32), single.shape)
    used, passed, found, place = (np.zeros_like(single) for _ in range(4))
    levels = np.zeros_like(single)
    open_ = np.ones(single.shape, bool)
    while open_.any():
        rest = window >> used
        more, further, value = (np.take_along_axis(a, rest, 1) for a in (length, weights, symbol))
        open_ &= (used + more <= WINDOW) & (passed + further <= MAX_WEIGHTS) & (found < 2)
        used, passed = used + np.where(open_, more, 0), passed + np.where(open_, further, 0)
        nonzero = open_ & (value > 0)
        for n, shift in enumerate(LEVEL_SHIFTS):
            levels |= np.where(nonzero & (found == n), (value - 1) << np.uint32(shift), 0).astype(np.uint32)
        place = np.where(nonzero & (found == 0), passed - 1, place)
        found += nonzero
    none = np.uint32((PLACE_MASK & ~127) << PLACE_SHIFT)
    first = np.where(found == 0, none, place << PLACE_SHIFT)
    entries = used | first | levels | np.where(found < 2, np.uint32(NO_SECOND), 0) | passed << WEIGHTS_SHIFT
    entries = entries.astype(np.uint32)
    entries.setflags(write=False)
    return entries
