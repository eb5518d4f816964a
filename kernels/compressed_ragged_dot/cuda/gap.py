"""CUDA C++ for the codec `gap`: csrc/gap.cu. `gpu/gap.py` says how it works, `gpu.multiply` what it takes."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import gpu
from qmoe_jax.kernels.compressed_ragged_dot.gpu import Config

SOURCE = pathlib.Path(__file__).with_name("csrc") / "gap.cu"
FUNCTION = "QmoeGapCuda"
TARGET = "qmoe_gap_cuda"

MAX_TOKENS = 8  # of an item: what the kernel has room for


def heuristic(tokens: int, shape: tuple[int, int, int], dtype: DTypeLike) -> Config:
    """Block sizes as of `gpu.gap.heuristic`, for blocks of threads that share what they gather from: untuned."""
    experts, out, width = shape
    rows = max(1, min(tokens, experts)) * out * -(-width // gpu.gap.SEGMENT)  # of a segment each
    # Two blocks a multiprocessor, if that can be; beyond that, the larger a block, the less is copied for each row.
    block = next((r for r in (256, 128) if rows >= 2 * 132 * r), 64)
    own = gpu.gap.heuristic(tokens, shape, dtype)
    return Config(rows=block, warps=block // 32, tokens=min(tokens, MAX_TOKENS), dense_tokens=own.dense_tokens)


def multiply_few(
    call: Callable[..., jax.Array],
    lhs: jax.Array,
    blocks: jax.Array | None,
    rhs: CompressedExperts,
    items: jax.Array,
    config: Config,
) -> jax.Array:
    """As in `gpu.multiply`; `blocks` go unused, as a block of threads collects its tokens itself."""
    del blocks
    segments = -(-rhs.shape[2] // gpu.gap.SEGMENT)
    out = jax.ShapeDtypeStruct((segments, lhs.shape[0], rhs.shape[1]), jnp.float32)
    parts = call(out, lhs, *gpu.gap.arrays(rhs), items, threads=config.rows, block=config.tokens)
    return jnp.sum(parts, axis=0).astype(lhs.dtype)
