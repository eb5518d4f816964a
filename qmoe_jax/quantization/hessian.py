"""The Hessian of a layer's squared output error: H = 2/n X'X over the tokens that an expert sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.jit
def accumulate(H: jax.Array, n: jax.Array, X: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds tokens to running Hessians, so that long token lists can be streamed in chunks.

    Args:
      H: float32 [experts, columns, columns], Hessian of the tokens so far (zeros at first).
      n: int32 [experts], how many they were (zeros at first).
      X: [experts, tokens, columns], inputs of each expert's matrix.
      mask: bool [experts, tokens], which of them count; the others may hold anything.

    Returns:
      H and n with the new tokens. An expert without tokens keeps H = 0, which `gptq` takes as starved.
    """
    X = jnp.where(mask[..., None], X.astype(jnp.float32), 0.0)
    total = n + mask.sum(-1, dtype=jnp.int32)  # [experts]
    weight = mask.astype(jnp.float32)
    return accumulate_weighted(H, n.astype(jnp.float32), X, X, weight, total.astype(jnp.float32)), total


@jax.jit
def accumulate_weighted(
    S: jax.Array, n: jax.Array, Y: jax.Array, X: jax.Array, weight: jax.Array, total: jax.Array
) -> jax.Array:
    """Adds tokens to running sums S = 2/n Y' diag(weight) X, n = sum of weights; with Y = X, to weighted Hessians.

    Args:
      S: float32 [experts, rows, columns], of the tokens so far (zeros at first).
      n: float32 [experts], their weights' sum (zeros at first).
      Y: [experts, tokens, rows].
      X: [experts, tokens, columns].
      weight: float32 [experts, tokens]; where it is zero, Y and X may hold any finite value.
      total: float32 [experts], n and the sum of the new weights. It is given, as XLA's order of adding depends on the
        number of experts.

    Returns:
      S with the new tokens.
    """
    Y = weight[..., None] * Y.astype(jnp.float32)
    per_token = 1.0 / jnp.where(total > 0, total, 1.0)
    YX = jnp.einsum("etr,etc->erc", Y, X.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    new = S * (n * per_token)[:, None, None] + (2.0 * per_token)[:, None, None] * YX
    return _where_any(total > n, new, S)


def _where_any(any_tokens, new, old):
    """`old` to the bit for experts without new tokens: how many chunks there are is a matter of the whole group."""
    return jnp.where(any_tokens[:, None, None], new, old)


def hessian(X: jax.Array, mask: jax.Array) -> jax.Array:
    """H = 2/n X'X over the n tokens that count; zero where there are none (GPTQ, section 3).

    The scale is immaterial to `gptq` but for its least damping of 1e-6.

    Args:
      X: [experts, tokens, columns], inputs of each expert's matrix.
      mask: bool [experts, tokens], which tokens count.

    Returns:
      float32 [experts, columns, columns].
    """
    experts, _, columns = X.shape
    H = jnp.zeros((experts, columns, columns), jnp.float32)
    return accumulate(H, jnp.zeros(experts, jnp.int32), X, mask)[0]
