"""The public function."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable

import jax

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import base, cpu, cuda, gradient, pallas, xla

# Takes an implementation by name wherever none is asked for, in whatever is traced afterwards.
ENVIRONMENT = "QMOE_JAX_IMPLEMENTATION"


def _triton(lhs, rhs, group_sizes):
    """The old name of `pallas`, whose kernels XLA compiles by Triton: Triton's own did the same."""
    warnings.warn("implementation 'triton' is now 'pallas', which Triton compiles.", DeprecationWarning, stacklevel=4)
    return pallas.compressed_ragged_dot(lhs, rhs, group_sizes)


# Best first.
IMPLEMENTATIONS: dict[str, Callable[[jax.Array, CompressedExperts, jax.Array], jax.Array]] = {
    "cpu": cpu.compressed_ragged_dot,
    "cuda": cuda.compressed_ragged_dot,
    "pallas": pallas.compressed_ragged_dot,
    "triton": _triton,
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
      implementation: name of one of `IMPLEMENTATIONS`; None takes what the environment variable
        QMOE_JAX_IMPLEMENTATION names, or else the best that works on the platform the program is lowered for. On a
        GPU a kernel works if it passed its self-check, when it was first wanted (see `chosen`).

    Returns:
      [tokens, out] in lhs's dtype, accumulated in float32. Rows beyond sum(group_sizes) are zero.

    Raises:
      ValueError or TypeError for arguments of the wrong kind, shape or dtype, and for an unknown
      implementation.
      NotImplementedError with the reason where the implementation named cannot run.
    """
    base.check_arguments(lhs, rhs, group_sizes)
    implementation = _named(implementation)
    return _product(implementation, lhs, rhs, group_sizes)


def chosen(rhs: CompressedExperts, implementation: str | None = None) -> str:
    """Name of the implementation that `compressed_ragged_dot` takes for `rhs` on this process's devices.

    Where it is a slower one than there is for them, a warning says why, once.
    """
    if name := _named(implementation):
        return name
    if jax.default_backend() == "cpu":
        return "xla" if cpu.why_not(rhs) else "cpu"
    return _best_on_gpu(rhs)


_USED: dict[str, None] = {}  # in order


def used() -> list[str]:
    """Names of the implementations that products of this process were traced with, for reports."""
    return list(_USED)


def _named(implementation):
    source, name = "implementation", implementation
    if name is None:
        source, name = ENVIRONMENT, os.environ.get(ENVIRONMENT) or None
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: unknown implementation {name!r}. Known: {', '.join(IMPLEMENTATIONS)}.")
    return name


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(implementation, lhs, rhs, group_sizes):
    _USED[implementation or chosen(rhs)] = None
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
        if jax.default_backend() == "cpu":
            _say_once(f"On CPU compressed_ragged_dot runs as plain XLA, many times slower than in C++: {reason}.")
    else:
        branches["cpu"] = cpu.multiply
    on_gpu: dict[str, Callable[..., jax.Array]]
    on_gpu = {"cuda": cuda.multiply, "pallas": pallas.multiply, "xla": xla.compressed_ragged_dot}
    branches["cuda"] = on_gpu[_best_on_gpu(rhs)]
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, **branches)


def _best_on_gpu(rhs):
    """Name of the fastest that works on the GPU that is there; "xla" where there is none."""
    if jax.default_backend() != "gpu":
        return "xla"
    reasons = []
    for name, backend in (("cuda", cuda), ("pallas", pallas)):
        reason = backend.why_not(rhs)
        if reason is None:
            break
        reasons.append(f"'{name}' cannot run: {reason}")
    else:
        name = "xla"
    if reasons:
        _say_once(f"On this GPU compressed_ragged_dot runs as '{name}', slower than it could be. {'. '.join(reasons)}.")
    return name


@functools.cache
def _say_once(text):
    warnings.warn(text, stacklevel=4)
