"""Weights for inputs that are not what they were: asymmetric calibration (as in GPTAQ, Li et al. 2025, and QEP).

Once an expert's inner matrices are quantized, the inputs a of its last one, W, become â. What W should give is still
y = W a; the weights that come closest to it on the inputs it now gets are, in least squares and kept close to W by H's
damping,

    argmin_V  mean (y - V â)^2 + damping / 2 (V - W)^2  =  W + R (H + damping)^-1,   H = 2/n Ââ',  R = 2/n (Y - W Â) Â'
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qmoe_jax.quantization.gptq import Factored, factor, matmul


@functools.partial(jax.jit, static_argnames="block_size")
def match_outputs(
    W: jax.Array, H: jax.Array, R: jax.Array, *, damping: float = 0.1, block_size: int = 128
) -> jax.Array:
    """W + R (H + damping mean diag H)^-1, for all experts of a group.

    Args:
      W: float32 [experts, rows, columns], rows are outputs.
      H: float32 [experts, columns, columns], Hessians of the inputs as they are now.
      R: float32 [experts, rows, columns], 2/n times the sum of what an output lacks, times its input.
      damping, block_size: as in `gptq`.

    Returns:
      float32 [experts, rows, columns]; W itself where H is zero or cannot be factorised.
    """
    return jax.vmap(functools.partial(_match, damping=damping, block_size=block_size))(W, H, R)


def _match(W, H, R, *, damping, block_size):
    factored = factor(H, damping, block_size, unit=block_size, activation_order=False)
    change = factored.arrange_back(_solve(factored, factored.arrange(R)))
    return W + jnp.where(factored.fallback, 0.0, change)


def _solve(factored: Factored, B: jax.Array) -> jax.Array:
    """H^-1 B, B [padded columns, rows]; H = UU' by panels, and L are the transposed inverses of U's diagonal blocks."""
    Z = jnp.split(B, len(factored.L))
    # UZ = B, from the last panel to the first; panels of B become those of Z.
    for k in reversed(range(len(Z))):
        Z[k] = matmul(factored.L[k].T, Z[k])
        for i, U in enumerate(jnp.split(factored.U[k].T, k) if k else []):  # U[i, k], [panel, panel]
            Z[i] = Z[i] - matmul(U, Z[k])
    # U'X = Z, from the first to the last.
    X = Z[0][:0]
    for k in range(len(Z)):
        X = jnp.concatenate([X, matmul(factored.L[k], Z[k] - matmul(factored.U[k], X))])
    return X
