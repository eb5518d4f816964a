"""What the GPU kernels share, whatever the codec: the list of work, block sizes, the two ways.

    few tokens an expert     one launch: decodes, multiplies by up to `Config.tokens` tokens at once
    many                     decodes experts to dense bfloat16, which is exact, then uses tensor cores

Either way an expert without tokens costs nothing: the grid covers a list of work, made before the launch, of static
length min(tokens, experts) plus what large groups need; programs beyond its end stop at once. A codec's own file
says how it is decoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.grouped import group_ends

# Columns of the list of work.
EXPERT, RANK, START, SIZE, FIRST, TABLE = range(6)


def why_not(rhs: CompressedExperts, codecs: Collection[str]) -> str | None:
    """Why a backend that decodes these codecs cannot multiply by `rhs` here; None where it might."""
    if rhs.codec not in codecs:
        which = "codecs" if len(codecs) > 1 else "codec"
        return f"it decodes the {which} {', '.join(map(repr, codecs))}, not {rhs.codec!r}"
    if jax.default_backend() != "gpu":
        return f"it needs a GPU; JAX's devices are {jax.default_backend()!r}"
    return None


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes; all powers of two.

    Attributes:
      rows: rows of the matrix of one program.
      codewords: (codec `dictionary`) consecutive codewords of a row that are taken at once; more means more
        parallelism, and more idle lanes at the ends of rows. A warp holds 32 / codewords rows, so that it scans no
        further than itself.
      warps: of a program.
      tokens: of one expert that share a decode; 16 bytes of lhs, which a lane loads at once.
      many_tokens: tokens an expert, on average, from which experts are decoded to dense ones.
      dense_tokens, dense_rows, dense_columns, dense_warps: the tile of the dense product, [tokens, in] x [in, out].
      dense_weights: weights decoded at a time, which bounds the memory taken.
    """

    rows: int = 16
    codewords: int = 8
    warps: int = 4
    tokens: int = 8
    many_tokens: int = 16
    dense_tokens: int = 64
    dense_rows: int = 64
    dense_columns: int = 64
    dense_warps: int = 4
    dense_weights: int = 1 << 27


def dense_tokens(tokens: int, shape: tuple[int, int, int], dtype: DTypeLike) -> int:
    """`Config.dense_tokens` for [tokens, in] and experts of `shape` (experts, out, in)."""
    # float32 takes three products; with more than 64 tokens registers spill.
    return min(256 // jnp.dtype(dtype).itemsize, max(16, _power_of_two(tokens // max(1, shape[0]))))


def work(group_sizes: jax.Array, tokens: int, block: int, streams: jax.Array) -> jax.Array:
    """Cuts the experts' tokens into items of at most `block` tokens, in order.

    Args:
      group_sizes: int32 [experts].
      tokens: rows of lhs; group sizes that promise more are cut off.
      block: most tokens of an item.
      streams: int32 [experts, 1 + tables], where each expert's stream starts, and its table or tables.

    Returns:
      int32 [items, 5 + tables]: expert, its rank among those with tokens, first token, how many, start of the stream,
      tables.
      Items beyond the last have no tokens.
    """
    experts = group_sizes.shape[0]
    active = min(tokens, experts)
    items = jnp.arange(active + (tokens - active) // block, dtype=jnp.int32)

    ends = group_ends(group_sizes, tokens)  # [experts]
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    blocks = (ends - starts + block - 1) // block
    last = jnp.cumsum(blocks)
    rank = jnp.cumsum(blocks > 0) - 1

    expert = jnp.sum(items[:, None] >= last, axis=1)  # [items]
    exists = expert < experts
    expert = jnp.minimum(expert, experts - 1)
    start = starts[expert] + (items - (last - blocks)[expert]) * block
    size = jnp.where(exists, jnp.clip(ends[expert] - start, 0, block), 0)
    columns = [a[:, None] for a in (expert, rank[expert], start, size)]
    return jnp.concatenate([*columns, streams[expert]], axis=1).astype(jnp.int32)


def multiply(
    lhs: jax.Array,
    rhs: CompressedExperts,
    group_sizes: jax.Array,
    config: Config | None,
    *,
    codec: ModuleType,
    multiply_few: Callable,
    decode: Callable,
    multiply_dense: Callable,
) -> jax.Array:
    """`api.compressed_ragged_dot` from three launches.

    Args:
      codec: of `gpu.CODECS`.
      multiply_few: (lhs, blocks [items, in, config.tokens] or None for blocks of one token, rhs, items, config)
        -> [tokens, out]; rows of no item are undefined.
      decode: (rhs, items, config) -> bfloat16 [items * out * in + 1], the experts of the items; the last element
        and experts of items without tokens are undefined.
      multiply_dense: (lhs, dense, items, out [tokens, out], config) -> out with the rows of the items replaced; an
        item's matrix is number RANK of `dense`.
    """
    tokens = lhs.shape[0]
    experts, out, _ = rhs.shape
    if 0 in (tokens, experts, out):
        return jnp.zeros((tokens, out), lhs.dtype)
    if config is None:
        config = codec.heuristic(tokens, rhs.shape, lhs.dtype)
    streams = codec.streams(rhs)
    if tokens >= config.many_tokens * experts:
        return _many_tokens(lhs, rhs, group_sizes, streams, config, decode, multiply_dense)

    items = work(group_sizes, tokens, config.tokens, streams)
    blocks = None
    if config.tokens > 1:
        # A lane finds the values of all tokens of its item side by side.
        token = items[:, START, None] + jnp.arange(config.tokens)
        blocks = lhs.at[token].get(mode="clip").swapaxes(1, 2)  # [items, in, config.tokens]
    product = multiply_few(lhs, blocks, rhs, items, config)
    assigned = jnp.arange(tokens) < jnp.sum(group_sizes)
    return jnp.where(assigned[:, None], product, 0)


def _many_tokens(lhs, rhs, group_sizes, streams, config, decode, multiply_dense):
    tokens = lhs.shape[0]
    experts, out, width = rhs.shape
    matrices = work(group_sizes, tokens, tokens, streams)  # one item an expert
    items = work(group_sizes, tokens, config.dense_tokens, streams)
    at_once = min(matrices.shape[0], max(1, config.dense_weights // (out * width)))
    matrices = jnp.pad(matrices, ((0, -matrices.shape[0] % at_once), (0, 0)))

    def some_experts(i, product):
        chosen = jax.lax.dynamic_slice_in_dim(matrices, i * at_once, at_once)
        dense = decode(rhs, chosen, config)
        slot = items[:, RANK] - i * at_once
        own = (slot >= 0) & (slot < at_once)
        own_items = items.at[:, RANK].set(slot).at[:, SIZE].set(jnp.where(own, items[:, SIZE], 0))
        return multiply_dense(lhs, dense, own_items, product, config)

    product, _ = vary_together((jnp.zeros((tokens, out), lhs.dtype), items))
    if at_once == matrices.shape[0]:
        return some_experts(0, product)
    active = jnp.sum(matrices[:, SIZE] > 0)
    return jax.lax.fori_loop(0, (active + at_once - 1) // at_once, some_experts, product)


def vary_together(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The same arrays, all varying over those of shard_map's axes that one of them varies over."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*varying)
    return [
        array if own == axes else jax.lax.pcast(array, tuple(axes - own), to="varying")
        for array, own in zip(arrays, varying, strict=True)
    ]


def launches(config: Config, rows: int, items: int) -> tuple[int, int]:
    """Programs per item, and in all; one axis, as the others are limited to 65 535."""
    per_item = -(-rows // config.rows)
    return per_item, per_item * items


def zeros(rhs: CompressedExperts, items: jax.Array) -> jax.Array:
    """What `decode` of `multiply` writes to: bfloat16 [items * out * in + 1]."""
    return jnp.zeros((items.shape[0] * rhs.shape[1] * rhs.shape[2] + 1,), jnp.bfloat16)


def _power_of_two(n: int) -> int:
    """The smallest at least n."""
    return 1 << max(0, n - 1).bit_length()
