"""The public function."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import base, cpu, cuda, gradient, pallas, xla

# Best first.
IMPLEMENTATIONS: dict[str, Callable[[jax.Array, CompressedExperts, jax.Array], jax.Array]] = {
    "cpu": cpu.compressed_ragged_dot,
    "cuda": cuda.compressed_ragged_dot,
    "triton": pallas.compressed_ragged_dot,
    "pallas": pallas.compressed_ragged_dot,
    "xla": xla.compressed_ragged_dot,
}


def compressed_ragged_dot(
    lhs: jax.Array,
    rhs: CompressedExperts,
    group_sizes: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies tokens, sorted by expert, by the transpose of their expert's compressed matrix.

    The contract of `jax.lax.ragged_dot` with a compressed right-hand side: the first group_sizes[0] rows of
    lhs meet expert 0, the next group_sizes[1] expert 1, and so on. Experts without tokens are not decoded.

    Differentiable in reverse mode with respect to lhs and rhs.levels, from the same bytes (see `gradient`); symbols
    have no derivative. `rhs.with_levels(levels)` puts in levels that are trained.

    Args:
      lhs: float32 or bfloat16 [tokens, in].
      rhs: experts of shape (experts, out, in).
      group_sizes: int32 [experts], tokens of each expert. Below zero counts as none; tokens beyond those that there are
        count for nobody, whatever the sum.
      implementation: name of one of `IMPLEMENTATIONS`; None takes the best that works on the platform the
        program is lowered for.

    Returns:
      [tokens, out] in lhs's dtype, accumulated in float32. Rows beyond sum(group_sizes) are zero.

    Raises:
      ValueError or TypeError for arguments of the wrong kind, shape or dtype, and for an unknown
      implementation.
      NotImplementedError with the reason where the implementation named cannot run.
    """
    base.check_arguments(lhs, rhs, group_sizes)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown implementation {implementation!r}. Known: {', '.join(IMPLEMENTATIONS)}.")
    return _product(implementation, lhs, rhs, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(implementation, lhs, rhs, group_sizes):
    product = _best if implementation is None else IMPLEMENTATIONS[implementation]
    return product(lhs, rhs, group_sizes)


def _forward(implementation, lhs, rhs, group_sizes):
    return _product(implementation, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(implementation, residuals, g):
    lhs, rhs, group_sizes = residuals
    product = functools.partial(_product, implementation)
    d_levels = gradient.d_levels(lhs, rhs, group_sizes, g, product).astype(rhs.levels.dtype)
    d_rhs = dataclasses.replace(rhs, data=dict.fromkeys(rhs.data), levels=d_levels)
    return gradient.transposed(g, rhs, group_sizes), d_rhs, None


_product.defvjp(_forward, _backward)


def _best(lhs, rhs, group_sizes):
    branches: dict[str, Callable[..., jax.Array]] = {"default": xla.compressed_ragged_dot}
    if reason := cpu.why_not(rhs):
        _say_once(f"On CPU compressed_ragged_dot runs as plain XLA, many times slower than in C++: {reason}.")
    else:
        branches["cpu"] = cpu.multiply
    # Where the default for GPUs is decided: XLA, as the kernels have not run on one. They are there by name.
    branches["cuda"] = xla.compressed_ragged_dot
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, **branches)


@functools.cache
def _say_once(text):
    if jax.default_backend() == "cpu":
        warnings.warn(text, stacklevel=4)
