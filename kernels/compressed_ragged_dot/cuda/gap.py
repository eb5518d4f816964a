"""CUDA C++ for the codec `gap`: csrc/. `gpu/gap.py` says how a thread reads its stream.

One launch for a product: a block of threads finds its expert and tokens in group_sizes itself. Three kernels:

    few_tokens.cuh   gathers the values of up to 8 tokens from shared memory
    tiles.cuh        decodes to bfloat16 tiles in shared memory, which tensor cores multiply by up to 64 tokens
    transposed.cuh   the same tiles, the other way round
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qmoe_jax.codecs import gap
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot.cuda import shared
from qmoe_jax.kernels.compressed_ragged_dot.gpu import gap as streams

SOURCE = pathlib.Path(__file__).with_name("csrc") / "gap.cu"
FUNCTION = "QmoeGapCuda"
TARGET = "qmoe_gap_cuda"
WARM_UP = "QmoeGapWarmUp"
FEW, TILES, TRANSPOSED = range(3)  # kernels, as csrc/gap.cu numbers them

ROWS = 128  # of a block of threads
TRANSPOSED_TOKENS = 16  # of an item
MULTIPROCESSORS = 132  # of an H100; others differ little in what blocks they need
BLOCKS = 4 * MULTIPROCESSORS


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is cut into blocks of threads.

    Attributes:
      tiles: tensor cores; otherwise values are gathered.
      tokens: of one expert that share a decode, a power of two: 1 to 8 gathered; tiles 16, with bfloat16 32 and 64 too.
      passes: (gathered) rows of a thread, one after another.
      splits: (tiles) parts in which the sum over the columns is cut, at most segments, and at least one a class.
    """

    tiles: bool
    tokens: int
    passes: int = 1
    splits: int = 1


def heuristic(tokens: int, shape: tuple[int, int, int], dtype: DTypeLike) -> Config:
    """For [tokens, in] and experts of `shape` (experts, out, in). From a model of the hardware: never tuned on one."""
    experts, out, width = shape
    segments, row_blocks = -(-width // gap.SEGMENT), -(-out // ROWS)
    active = max(1, min(tokens, experts) // 2)  # Groups differ in size: with as many, all multiprocessors have work.
    if tokens >= 4 * experts:
        most = 64 if jnp.dtype(dtype).itemsize == 2 else 16
        block = min(most, max(16, _power_of_two(-(-tokens // experts))))
        return Config(tiles=True, tokens=block, splits=max(1, min(segments, BLOCKS // (active * row_blocks))))
    passes = next(p for p in (4, 2, 1) if p == 1 or active * segments * -(-row_blocks // p) >= BLOCKS)
    return Config(tiles=False, tokens=min(8, _power_of_two(tokens)), passes=passes)


@functools.partial(jax.jit, static_argnames="config")
def multiply(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array, *, config: Config) -> jax.Array:
    """`api.compressed_ragged_dot` for arrays none of whose axes is zero."""
    segments = rhs.data["starts"].shape[2]
    classes = gap.number_of_classes(rhs.data)
    if not config.tiles:
        splits = segments
    elif classes == 1:
        splits = _equal(segments, config.splits)
    else:  # A block of threads has one table.
        each = segments // classes
        splits = classes * max(
            n for n in range(1, each + 1) if each % n == 0 and n * classes <= max(classes, config.splits)
        )
    kernel = TILES if config.tiles else FEW
    return _call(kernel, lhs, rhs, group_sizes, (splits, lhs.shape[0], rhs.shape[1]), config.tokens, config.passes)


@jax.jit
def multiply_transposed(g: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """`gradient.transposed` for arrays none of whose axes is zero."""
    (experts, out, width), tokens = rhs.shape, g.shape[0]
    row_blocks, active = -(-out // ROWS), max(1, min(tokens, experts) // 2, tokens // TRANSPOSED_TOKENS)
    splits = _equal(row_blocks, BLOCKS // (active * rhs.data["starts"].shape[2]))
    return _call(TRANSPOSED, g, rhs, group_sizes, (splits, tokens, width), TRANSPOSED_TOKENS)


def _equal(pieces: int, splits: int) -> int:
    """About as many splits, all of as many pieces but the last."""
    return -(-pieces // -(-pieces // max(1, min(pieces, splits))))


def _call(kernel, lhs, rhs, group_sizes, shape, tokens, passes=1):
    """The sum of parts of `shape`."""
    parts = shared.call(
        TARGET,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        lhs,
        *(rhs.data[name] for name in ("words", "word_counts", "starts", "skips", "parameters")),
        rhs.levels,
        jnp.asarray(tables(rhs.levels.shape[2])),
        group_sizes,
        slots=slots(rhs.levels.shape[2]),
        segment_columns=np.int32(gap.segment_columns(rhs.shape[2], rhs.data["starts"].shape[2])),
        log2_block=np.int32(tokens.bit_length() - 1),
        passes=np.int32(passes),
        kernel=np.int32(kernel),
    )
    return jnp.sum(parts, axis=0).astype(lhs.dtype)


@functools.cache
def tables(num_levels: int) -> np.ndarray:
    """`gpu.gap.table` by windows whose first bit is the highest: uint32 [parameters, 2^WINDOW].

    The last bits of a window are the most random ones. As the lowest of an index, they spread a warp's over the banks.
    """
    bits = np.arange(1 << gap.WINDOW)
    reversed_ = sum((bits >> i & 1) << (gap.WINDOW - 1 - i) for i in range(gap.WINDOW))
    return np.ascontiguousarray(streams.table(num_levels)[:, reversed_])


def slots(num_levels: int) -> np.ndarray:
    """Which row of `tables` is whose, by what `parameters` may say: uint8 [256]."""
    return np.asarray(gap.table_rows(np.arange(256), num_levels), np.uint8)


def _power_of_two(n: int) -> int:
    """The smallest at least n."""
    return 1 << max(0, n - 1).bit_length()
