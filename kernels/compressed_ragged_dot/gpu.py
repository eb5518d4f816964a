"""What the Pallas and Triton implementations share: the table, the list of work, block sizes, the two ways.

A warp takes several rows, and several consecutive codewords of each: one codeword a lane. A table gives a
codeword's length and its non-zeros, at most three; a prefix sum over the lengths gives the columns where codewords
start; then every lane gathers the tokens' values at its non-zeros. Zeros cost nothing, and nobody searches for set
bits. The loop is 70 to 90 machine instructions a codeword for one token, some 160 for eight: about 4 and 8 a weight,
where an H200 issues 12.3 in the time of reading a bfloat16 weight.

    few tokens an expert     one launch: decodes, multiplies by up to `Config.tokens` tokens at once
    many                     decodes experts to dense bfloat16, which is exact, then uses tensor cores

Either way an expert without tokens costs nothing: the grid covers a list of work, made before the launch, of static
length min(tokens, experts) plus what large groups need; programs beyond its end stop at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.codecs import dictionary
from qmoe_jax.codecs.experts import CompressedExperts

# The table's entries, see `table`.
MAX_NONZEROS = 3
FIELD_BITS = 7
PLACE, EXISTS, MAXIMUM = 31, 32, 64
LENGTH_SHIFT = 27

# Columns of the list of work.
EXPERT, RANK, START, SIZE, FIRST, ITEM_COLUMNS = range(6)


def why_not(rhs: CompressedExperts) -> str | None:
    """Why neither implementation can multiply by `rhs` here; None where one might."""
    if rhs.codec != "dictionary":
        return f"it decodes the codec 'dictionary', not {rhs.codec!r}"
    if jax.default_backend() != "gpu":
        return f"it needs a GPU; JAX's devices are {jax.default_backend()!r}"
    return None


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes; all powers of two.

    Attributes:
      rows: rows of the matrix of one program.
      codewords: consecutive codewords of a row that are taken at once; more means more parallelism, and more idle
        lanes at the ends of rows. A warp holds 32 / codewords rows, so that it scans no further than itself.
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


def heuristic(tokens: int, shape: tuple[int, int, int], dtype) -> Config:
    """Block sizes for [tokens, in] and experts of `shape` (experts, out, in): untuned, reasoned for an H200."""
    experts, out, _ = shape
    # Latency is hidden by about 1000 lanes a multiprocessor; beyond that, few codewords a row waste the least.
    rows = out * max(1, min(tokens, experts))
    codewords = next((c for c in (8, 16) if rows * c >= 132 * 1024), 32)
    warps = 4
    itemsize = jnp.dtype(dtype).itemsize
    block = 1 if tokens == 1 else 16 // itemsize
    # float32 takes three products; with more than 64 tokens registers spill.
    dense_tokens = min(256 // itemsize, max(16, _power_of_two(tokens // max(1, experts))))
    return Config(
        rows=32 * warps // codewords, codewords=codewords, warps=warps, tokens=block, dense_tokens=dense_tokens
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


def work(group_sizes: jax.Array, tokens: int, block: int, first: jax.Array) -> jax.Array:
    """Cuts the experts' tokens into items of at most `block` tokens, in order.

    Args:
      group_sizes: int32 [experts].
      tokens: rows of lhs; group sizes that promise more are cut off.
      block: most tokens of an item.
      first: int32 [experts], where each expert's codewords start.

    Returns:
      int32 [items, 5]: expert, its rank among those with tokens, first token, how many, first codeword. Items
      beyond the last have no tokens.
    """
    experts = group_sizes.shape[0]
    active = min(tokens, experts)
    items = jnp.arange(active + (tokens - active) // block, dtype=jnp.int32)

    ends = jnp.minimum(jnp.cumsum(group_sizes), tokens)  # [experts]
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    blocks = (ends - starts + block - 1) // block
    last = jnp.cumsum(blocks)
    rank = jnp.cumsum(blocks > 0) - 1

    expert = jnp.sum(items[:, None] >= last, axis=1)  # [items]
    exists = expert < experts
    expert = jnp.minimum(expert, experts - 1)
    start = starts[expert] + (items - (last - blocks)[expert]) * block
    size = jnp.where(exists, jnp.clip(ends[expert] - start, 0, block), 0)
    return jnp.stack([expert, rank[expert], start, size, first[expert]], axis=1).astype(jnp.int32)


def multiply(
    lhs: jax.Array,
    rhs: CompressedExperts,
    group_sizes: jax.Array,
    config: Config | None,
    *,
    multiply_few: Callable,
    decode: Callable,
    multiply_dense: Callable,
) -> jax.Array:
    """`api.compressed_ragged_dot` from three launches.

    Args:
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
        config = heuristic(tokens, rhs.shape, lhs.dtype)
    counts = rhs.data["row_offsets"][:, -1]
    first = jnp.cumsum(counts) - counts
    if tokens >= config.many_tokens * experts:
        return _many_tokens(lhs, rhs, group_sizes, first, config, decode, multiply_dense)

    items = work(group_sizes, tokens, config.tokens, first)
    blocks = None
    if config.tokens > 1:
        # A lane finds the values of all tokens of its item side by side.
        token = items[:, START, None] + jnp.arange(config.tokens)
        blocks = lhs.at[token].get(mode="clip").swapaxes(1, 2)  # [items, in, config.tokens]
    product = multiply_few(lhs, blocks, rhs, items, config)
    assigned = jnp.arange(tokens) < jnp.sum(group_sizes)
    return jnp.where(assigned[:, None], product, 0)


def _many_tokens(lhs, rhs, group_sizes, first, config, decode, multiply_dense):
    tokens = lhs.shape[0]
    experts, out, width = rhs.shape
    matrices = work(group_sizes, tokens, tokens, first)  # one item an expert
    items = work(group_sizes, tokens, config.dense_tokens, first)
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


def _power_of_two(n: int) -> int:
    """The smallest at least n."""
    return 1 << max(0, n - 1).bit_length()
