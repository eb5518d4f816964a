"""The derivative of `compressed_ragged_dot`, from the same bytes as the product.

For token t of expert e, whose weights W[r, c] are level[r, k] where the symbol of (r, c) is k, and 0 where it is 0:

    y[t, r] = sum_c x[t, c] W[r, c] = sum_k level[r, k] y_k[t, r],     y_k[t, r] = sum of x[t, c] where symbol is k

    d x[t, c] = sum_r d y[t, r] W[r, c]                 the product with the matrix as it is: `transposed`
    d level[r, k] = sum_t d y[t, r] y_k[t, r]           y_k is the product itself, its level k taken for 1, others for 0

Symbols have no derivative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import cpu, cuda, xla
from qmoe_jax.kernels.grouped import group_ends

Product = Callable[[jax.Array, CompressedExperts, jax.Array], jax.Array]


def transposed(g: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """Tokens, sorted by expert, times their expert's matrix: [tokens, out] @ [out, in].

    Args:
      g: float32 or bfloat16 [tokens, out].
      rhs: experts of shape (experts, out, in).
      group_sizes: int32 [experts], as for `api.compressed_ragged_dot`.

    Returns:
      [tokens, in] in g's dtype, accumulated in float32. Rows beyond sum(group_sizes) are zero.
    """
    branches: dict[str, Product] = {"default": xla.transposed}
    if cpu.why_not(rhs) is None:
        branches["cpu"] = cpu.multiply_transposed
    if cuda.why_not(rhs) is None:
        branches["cuda"] = cuda.multiply_transposed
    return jax.lax.platform_dependent(g, rhs, group_sizes, **branches)


def d_levels(
    lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array, g: jax.Array, product: Product
) -> jax.Array:
    """Gradient of the levels, float32 [experts, out, L].

    Args:
      lhs: float32 or bfloat16 [tokens, in].
      rhs: experts of shape (experts, out, in).
      group_sizes: int32 [experts].
      g: [tokens, out], gradient of the product.
      product: an implementation of it.
    """
    tokens, (experts, _, L) = lhs.shape[0], rhs.levels.shape
    # Tokens that are nobody's are expert number `experts`, which the sums drop.
    expert = jnp.searchsorted(group_ends(group_sizes, tokens), jnp.arange(tokens), side="right")
    x, g = lhs.astype(jnp.float32), g.astype(jnp.float32)

    def of_symbol(level):  # [L], one of them 1, the others 0
        ones = jnp.broadcast_to(level, rhs.levels.shape).astype(rhs.levels.dtype)
        y = product(x, dataclasses.replace(rhs, levels=ones), group_sizes)  # [tokens, out]
        return jax.ops.segment_sum(g * y, expert, num_segments=experts)  # [experts, out]

    return jnp.stack([of_symbol(level) for level in jnp.eye(L)], axis=-1)
