"""Matrix products of tokens sorted by expert: a loop over the experts that have tokens.

On CPU XLA expands `jax.lax.ragged_dot` into a dense product of all tokens with all experts; the loop does
each token's work once, and never touches (or decodes) an expert without tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def grouped_dot(
    lhs: jax.Array, group_sizes: jax.Array, matrix: Callable[[jax.Array], jax.Array], out_features: int
) -> jax.Array:
    """Multiplies each group of consecutive tokens by its expert's matrix.

    Args:
      lhs: [tokens, in], sorted by expert.
      group_sizes: int [experts], tokens of each expert; below zero counts as none, and tokens that aren't there are
        nobody's.
      matrix: from a traced expert index to its matrix [in, out]; runs for experts with tokens only.
      out_features: out.

    Returns:
      [tokens, out] in lhs's dtype, accumulated in float32. Rows beyond sum(group_sizes) are zero.
    """
    tokens = lhs.shape[0]
    block = _block(tokens, group_sizes.size)
    padded = jnp.pad(lhs, ((0, block), (0, 0)))  # [tokens + block, in]: a block that begins in time fits

    def expert(e, start, end, out):
        W = matrix(e).astype(jnp.float32)  # [in, out]

        def multiply(i, out):
            x = jax.lax.dynamic_slice_in_dim(padded, i, block).astype(jnp.float32)
            y = jnp.matmul(x, W, precision="highest").astype(out.dtype)
            rest = jax.lax.dynamic_slice_in_dim(out, i, block)
            y = jnp.where((i + jnp.arange(block) < end)[:, None], y, rest)
            return jax.lax.dynamic_update_slice_in_dim(out, y, i, 0)

        return _for_blocks(start, end, block, multiply, out)

    out = varying_as(jnp.zeros((tokens + block, out_features), lhs.dtype), padded, group_sizes)
    return _for_active_experts(tokens, group_sizes, expert, out)[:tokens]


@jax.custom_vjp
def ragged_dot(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`jax.lax.ragged_dot` that is fast on CPU too, with gradients for lhs and rhs.

    Args:
      lhs: float32 or bfloat16 [tokens, in], sorted by expert.
      rhs: float [experts, in, out].
      group_sizes: int32 [experts], tokens of each expert.

    Returns:
      [tokens, out] in lhs's dtype, accumulated in float32. Rows beyond sum(group_sizes) are zero.

    Raises:
      ValueError where the shapes do not fit each other.
    """
    for name, array in (("lhs", lhs), ("rhs", rhs), ("group_sizes", group_sizes)):
        if not isinstance(array, jax.Array | np.ndarray):
            raise TypeError(f"{name}: found {type(array).__name__}, expected an array.")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes: {group_sizes.dtype}, expected whole numbers.")
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            f"lhs {list(lhs.shape)}, rhs {list(rhs.shape)}, group_sizes {list(group_sizes.shape)}: "
            "expected [tokens, in], [experts, in, out], [experts]."
        )
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, cpu=_cpu, default=_xla)


@jax.jit
def _cpu(lhs, rhs, group_sizes):
    return grouped_dot(lhs, group_sizes, lambda e: _expert(rhs, e), out_features=rhs.shape[2])


def _expert(rhs, e):
    """rhs[e] that touches no other expert, inside a loop, for bfloat16 too.

    On CPU XLA slices bfloat16 as float32; without the barrier it would convert all experts once, ahead of the loop.
    """
    rhs, e = jax.lax.optimization_barrier((rhs, e))
    return rhs[e]


def _xla(lhs, rhs, group_sizes):
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    ends = group_ends(group_sizes, lhs.shape[0])
    group_sizes = jnp.diff(ends, prepend=0).astype(group_sizes.dtype)
    precision = jax.lax.Precision.HIGHEST  # float32 is float32, and not what tensor cores take for it
    out = jax.lax.ragged_dot(
        lhs.astype(dtype), rhs.astype(dtype), group_sizes, precision, preferred_element_type=jnp.float32
    )
    assigned = jnp.arange(lhs.shape[0]) < jnp.max(ends, initial=0)
    return jnp.where(assigned[:, None], out, 0).astype(lhs.dtype)


def _forward(lhs, rhs, group_sizes):
    return ragged_dot(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(residuals, gradient):
    lhs, rhs, group_sizes = residuals
    d_lhs, d_rhs = jax.lax.platform_dependent(lhs, rhs, group_sizes, gradient, cpu=_cpu_backward, default=_xla_backward)
    return d_lhs, d_rhs, None


ragged_dot.defvjp(_forward, _backward)


@jax.jit
def _cpu_backward(lhs, rhs, group_sizes, gradient):
    """Gradients of lhs, [tokens, in], and of rhs, [experts, in, out]."""
    d_lhs = grouped_dot(gradient, group_sizes, lambda e: _expert(rhs, e).T, out_features=rhs.shape[1])

    tokens = lhs.shape[0]
    block = _block(tokens, group_sizes.size)
    lhs_padded, gradient_padded = (jnp.pad(a, ((0, block), (0, 0))) for a in (lhs, gradient))

    def expert(e, start, end, d_rhs):
        def add(i, d_W):
            x = jax.lax.dynamic_slice_in_dim(lhs_padded, i, block).astype(jnp.float32)
            g = jax.lax.dynamic_slice_in_dim(gradient_padded, i, block).astype(jnp.float32)
            own = (i + jnp.arange(block) < end)[:, None]
            return d_W + jnp.matmul(jnp.where(own, x, 0).T, jnp.where(own, g, 0), precision="highest")

        d_W = _for_blocks(start, end, block, add, jnp.zeros(rhs.shape[1:], jnp.float32))
        return d_rhs.at[e].set(d_W.astype(rhs.dtype))

    return d_lhs.astype(lhs.dtype), _for_active_experts(tokens, group_sizes, expert, jnp.zeros_like(rhs))


def _xla_backward(lhs, rhs, group_sizes, gradient):
    return jax.vjp(lambda lhs, rhs: _xla(lhs, rhs, group_sizes), lhs, rhs)[1](gradient)


def _block(tokens: int, experts: int) -> int:
    """Tokens per product: about half of what an expert has on average.

    On CPU eight tokens take no longer than one, as both read the whole matrix; above 128 nothing is gained.
    """
    half = -(-tokens // max(1, 2 * experts))
    return min(128, max(8, 1 << (half - 1).bit_length()))


def varying_as(out: jax.Array, lhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`out`, [tokens, out], taken by `shard_map` for different on each device if lhs or group_sizes are.

    Loops and branches want types to agree in that. XLA drops the selection, as nothing is ever selected.
    """
    return jnp.where(0 * group_sizes.sum() > 0, lhs[:, :1], out)


def _for_active_experts(tokens, group_sizes, body, state):
    """Runs state = body(expert, start, end, state) for all experts with tokens, in order."""
    ends = group_ends(group_sizes, tokens)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    (active,) = jnp.nonzero(ends > starts, size=group_sizes.size, fill_value=0)

    def run(k, state):
        e = active[k]
        return body(e, starts[e], ends[e], state)

    return jax.lax.fori_loop(0, jnp.sum(ends > starts), run, state)


def group_ends(group_sizes: jax.Array, tokens: int) -> jax.Array:
    """Where each group ends, int [experts], at most at `tokens`; sizes below zero count as none.

    A sum that stays within int32, whatever sizes promise.
    """
    sizes = jnp.clip(group_sizes, 0, tokens)
    if tokens * sizes.size < 2**31:  # Compiles several times as fast.
        return jnp.minimum(jnp.cumsum(sizes), tokens)
    add = lambda a, b: a + jnp.minimum(b, tokens - a)  # min(a + b, tokens)
    return jax.lax.associative_scan(add, sizes)


def _for_blocks(start, end, block, body, state):
    """Runs state = body(i, state) for i = start, start + block, ... below end."""
    return jax.lax.fori_loop(0, (end - start + block - 1) // block, lambda k, s: body(start + k * block, s), state)
