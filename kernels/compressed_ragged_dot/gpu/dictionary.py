"""What the GPU kernels for the codec `dictionary` share: the table, block sizes.

A warp takes several rows, and several consecutive codewords of each: one codeword a lane. A table gives a
codeword's length and its non-zeros, at most three; a prefix sum over the lengths gives the columns where codewords
start; then every lane gathers the tokens' values at its non-zeros. Zeros cost nothing, and nobody searches for set
bits. The loop is 70 to 90 machine instructions a codeword for one token, some 160 for eight: about 4 and 8 a weight. In
the time of reading a bfloat16 weight an H200 issues 12.3, but 6.2 on the integer pipe, which most of them take.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qmoe_jax.codecs import dictionary
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot.gpu.shared import Config, dense_tokens

# The table's entries, see `table`.
MAX_NONZEROS = 3
FIELD_BITS = 7
PLACE, EXISTS, MAXIMUM = 31, 32, 64
LENGTH_SHIFT = 27


def streams(rhs: CompressedExperts) -> jax.Array:
    """Where each expert's codewords start, and the row of the table, of which there is one: int32 [experts, 2]."""
    counts = rhs.data["row_offsets"][:, -1]
    first = jnp.cumsum(counts) - counts
    return jnp.stack([first, jnp.zeros_like(first)], axis=1)


def arrays(rhs: CompressedExperts) -> tuple[jax.Array, ...]:
    """codewords [n], row_offsets [experts, out + 1], levels [experts, out, 2], table [65536]."""
    return rhs.data["codewords"], rhs.data["row_offsets"], rhs.levels, jnp.asarray(table())


def heuristic(tokens: int, shape: tuple[int, int, int], dtype: DTypeLike) -> Config:
    """Block sizes for [tokens, in] and experts of `shape` (experts, out, in): untuned, reasoned for an H200."""
    experts, out, _ = shape
    # Latency is hidden by about 1000 lanes a multiprocessor; beyond that, few codewords a row waste the least.
    rows = out * max(1, min(tokens, experts))
    codewords = next((c for c in (8, 16) if rows * c >= 132 * 1024), 32)
    warps = 4
    block = 1 if tokens == 1 else 16 // jnp.dtype(dtype).itemsize
    return Config(
        rows=32 * warps // codewords,
        codewords=codewords,
        warps=warps,
        tokens=block,
        dense_tokens=dense_tokens(tokens, shape, dtype),
    )


@functools.cache
def table() -> np.ndarray:
    """What the kernels know about each codeword: uint32 [65536], read-only.

    Bits 27 to 31: how many trits. Bits 7 k to 7 k + 6, k = 0, 1, 2: non-zero number k, its place among the trits
    (5 bits), whether it exists (1 bit) and whether it is the maximum (1 bit). 0 would be a codeword without trits.
    """
    words = dictionary.decode_table().astype(np.uint64)
    pairs = (words[:, 0] & 15).astype(np.int64)
    shifts = np.arange(4, 32, 2, dtype=np.uint64)
    trits = (words[:, :, None] >> shifts & 3).reshape(dictionary.ENTRIES, 2 * dictionary.MAX_PAIRS)

    entries = (2 * pairs << LENGTH_SHIFT).astype(np.uint32)
    nonzero = np.cumsum(trits != 0, axis=1)
    if nonzero.max() > MAX_NONZEROS:
        raise AssertionError(f"A codeword holds {nonzero.max()} non-zeros; the table has room for {MAX_NONZEROS}.")
    codeword, place = np.nonzero(trits)
    number = nonzero[codeword, place] - 1
    field = place | EXISTS | np.where(trits[codeword, place] == 2, MAXIMUM, 0)
    np.bitwise_or.at(entries, codeword, (field << FIELD_BITS * number).astype(np.uint32))
    entries.setflags(write=False)
    return entries
