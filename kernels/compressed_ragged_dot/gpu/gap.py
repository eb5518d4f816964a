"""What the GPU kernels for the codec `gap` share: the table, a lane's way through its segment.

A lane takes a segment of a row, 1024 columns. It holds two words of its stream and the next one, which is under way:
the 32 bits from any bit of the first word on are its window. In every step it looks up LOOKUPS times what the next
WINDOW bits stand for, and gathers the tokens' values at the non-zeros found. Zeros cost nothing. Lanes side by side
take the same segment of neighbouring rows: their values lie in the same 4 KB, and they end at nearly the same time.
A program writes the part of its rows' products that one segment contributes; parts are added up in order.

At P(0) = .885 a step is 33 weights with 3.8 non-zeros. For one token it takes 64 machine instructions in CUDA C++ and
about 85 from Triton, for eight about 130 and 165: 2 to 5 a weight, where an H200 issues 12.3 in the time of reading a
bfloat16 weight.

    bits of an entry of the table   what they say
    0 to 4                          how many bits its tokens take; at most 12, but whoever shifts by it need not mask it
    5 to 11, and 20                 place of the first non-zero among the tokens' weights; that there is none
    13 to 19, and 24                the same of the second one
    12 and 22; 21 and 23            that the first and the second have symbol 2; that they have symbol 3
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

SEGMENT = gap.SEGMENT
WINDOW = gap.WINDOW
LOOKUPS = 2  # of 12 bits each: less than the 32 there are

# Fields of an entry. Of each non-zero: shift and mask of its place, shifts of the bits for symbols 2 and 3.
USED_MASK = 31
NONZEROS = ((5, 0x807F, 12, 21), (13, 0x087F, 22, 23))
WEIGHTS_SHIFT = 25
MAX_WEIGHTS = 127


def streams(rhs: CompressedExperts) -> jax.Array:
    """Where each expert's words start, and which row of `table` is its own: int32 [experts, 2]."""
    counts = rhs.data["word_counts"]
    # Whatever the number is, the result is a row of the table.
    slot = gap.table_rows(rhs.data["parameters"], rhs.levels.shape[2])
    return jnp.stack([jnp.cumsum(counts) - counts, slot], axis=1)


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


def launches(config: Config, shape: tuple[int, int, int], items: int) -> tuple[int, int, int]:
    """Segments of a row, blocks of rows, and programs in all: items x segments x blocks, the last one fastest."""
    segments, blocks = -(-shape[2] // SEGMENT), -(-shape[1] // config.rows)
    return segments, blocks, items * segments * blocks


@functools.cache
def table(num_levels: int) -> np.ndarray:
    """What the kernels know about each window of bits, for each parameter: uint32 [parameters, 2^WINDOW], read-only."""
    single = gap.window_table(num_levels)
    length, weights, symbol = (single >> shift & mask for shift, mask in ((0, 15), (4, 127), (11, 15)))
    window = np.broadcast_to(np.arange(1 << WINDOW, dtype=np.uint32), single.shape)
    used, passed, found = (np.zeros_like(single) for _ in range(3))
    entries = np.bitwise_or.reduce([np.uint32(mask & ~127) << shift for shift, mask, _, _ in NONZEROS])
    entries = np.full_like(single, entries)
    open_ = np.ones(single.shape, bool)
    while open_.any():
        rest = window >> used
        more, further, value = (np.take_along_axis(a, rest, 1) for a in (length, weights, symbol))
        open_ &= (used + more <= WINDOW) & (passed + further <= MAX_WEIGHTS) & ((value == 0) | (found < len(NONZEROS)))
        for n, (shift, mask, second, third) in enumerate(NONZEROS):
            own = open_ & (value > 0) & (found == n)
            field = passed + further - 1 << shift | (value == 2).astype(np.uint32) << second
            field |= (value == 3).astype(np.uint32) << third
            absent = np.uint32(mask & ~127) << shift
            entries = np.where(own, entries & ~absent | field, entries)
        found += open_ & (value > 0)
        used, passed = used + np.where(open_, more, 0), passed + np.where(open_, further, 0)
    entries |= used | passed << WEIGHTS_SHIFT
    entries.setflags(write=False)
    return entries
