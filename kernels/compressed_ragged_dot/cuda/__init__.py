"""CUDA C++, compiled by nvcc when it is first wanted, into the user's cache (XDG_CACHE_HOME or ~/.cache).

nvcc is that of CUDA_HOME, of the extra `cuda13` or on the PATH. It compiles for the GPU that is there. Compile
beforehand, and see where the libraries are, by

    python -c "from qmoe_jax.kernels.compressed_ragged_dot import cuda; print(*cuda.build())"

Without a GPU that compiles for all those in `shared.ARCHITECTURES`.
"""

from __future__ import annotations

import functools
import pathlib
from types import ModuleType

import jax
import jax.numpy as jnp

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import gpu
from qmoe_jax.kernels.compressed_ragged_dot.cuda import gap, shared

# Each has SOURCE, FUNCTION in it, TARGET, what XLA calls it, and WARM_UP, which loads all kernels; Config, `heuristic`
# (tokens, shape, dtype) -> Config, `multiply` with a config, and `multiply_transposed`. `dictionary` is left to
# `pallas/`: `convert` makes `gap` of it, which is smaller and takes half the instructions.
CODECS: dict[str, ModuleType] = {
    "gap": gap,
}


def why_not(rhs: CompressedExperts) -> str | None:
    """Why this implementation cannot multiply by `rhs` here; None where it can. Compiles the library if need be."""
    if reason := gpu.why_not(rhs, CODECS):
        return reason
    return _failure(rhs.codec)


@functools.cache
def _failure(codec):
    own = CODECS[codec]
    if reason := shared.load(own.SOURCE, own.FUNCTION, own.TARGET, own.WARM_UP):
        return reason
    if reason := gpu.check.failure(multiply, codec) or gpu.check.failure(multiply_transposed, codec, transposed=True):
        return f"its self-check failed ({reason})"
    return None


def compressed_ragged_dot(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `api.compressed_ragged_dot`.

    Raises:
      NotImplementedError: no GPU, no nvcc, another codec, or (when lowered) another platform than CUDA.
    """
    if reason := why_not(rhs):
        raise NotImplementedError(f"implementation 'cuda' cannot run here: {reason}.")
    # Without a default, lowering for another platform raises NotImplementedError.
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, cuda=multiply)


def multiply(
    lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array, *, config: gap.Config | None = None
) -> jax.Array:
    """`compressed_ragged_dot` where `why_not` says None. Lowers anywhere."""
    if 0 in (lhs.shape[0], *rhs.shape):
        return jnp.zeros((lhs.shape[0], rhs.shape[1]), lhs.dtype)
    codec = CODECS[rhs.codec]
    config = config or codec.heuristic(lhs.shape[0], rhs.shape, lhs.dtype)
    return codec.multiply(lhs, rhs, group_sizes, config=config)


def multiply_transposed(g: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """`gradient.transposed` where `why_not` says None. Lowers anywhere."""
    if 0 in (g.shape[0], *rhs.shape):
        return jnp.zeros((g.shape[0], rhs.shape[2]), g.dtype)
    return CODECS[rhs.codec].multiply_transposed(g, rhs, group_sizes)


def build() -> list[pathlib.Path]:
    """Compiles the libraries of all codecs unless that has been done before: their paths.

    Raises RuntimeError with the reason where there is no nvcc or it fails.
    """
    return [shared.build(codec.SOURCE) for codec in CODECS.values()]
