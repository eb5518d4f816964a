"""CUDA C++: threads gather few tokens' values from shared memory, which Triton cannot do.

Many tokens an expert go the way of `pallas/`. A library is compiled by nvcc (on the PATH, or in the folder `bin` of
CUDA_HOME) when it is first wanted, into the user's cache (XDG_CACHE_HOME or ~/.cache); compile all beforehand, and see
where they are, by

    python -c "from qmoe_jax.kernels.compressed_ragged_dot import cuda; print(*cuda.build())"
"""

from __future__ import annotations

import functools
import pathlib
from types import ModuleType

import jax

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import gpu, pallas
from qmoe_jax.kernels.compressed_ragged_dot.cuda import gap, shared
from qmoe_jax.kernels.compressed_ragged_dot.gpu import Config

# Each has SOURCE, FUNCTION in it and TARGET, what XLA calls it; `heuristic` as in `gpu.CODECS`; and `multiply_few`, as
# `gpu.multiply` takes it after a call.
CODECS: dict[str, ModuleType] = {
    "gap": gap,
}


def why_not(rhs: CompressedExperts) -> str | None:
    """Why this implementation cannot multiply by `rhs` here; None where it can. Compiles the library if need be."""
    if reason := gpu.why_not(rhs, CODECS):
        return reason
    codec = CODECS[rhs.codec]
    return shared.load(codec.SOURCE, codec.FUNCTION, codec.TARGET)


def compressed_ragged_dot(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `api.compressed_ragged_dot`.

    Raises:
      NotImplementedError: no GPU, no nvcc, another codec, or (when lowered) another platform than CUDA.
    """
    if reason := why_not(rhs):
        raise NotImplementedError(f"implementation 'cuda' cannot run here: {reason}.")
    # Without a default, lowering for another platform raises NotImplementedError.
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, cuda=multiply)


@functools.partial(jax.jit, static_argnames="config")
def multiply(
    lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array, *, config: Config | None = None
) -> jax.Array:
    """`compressed_ragged_dot` where `why_not` says None. Lowers anywhere."""
    codec = CODECS[rhs.codec]
    call = functools.partial(shared.call, codec.TARGET)
    dense = pallas.module("shared")
    launch = functools.partial(dense.launch, interpret=False)
    return gpu.multiply(
        lhs,
        rhs,
        group_sizes,
        config or codec.heuristic(lhs.shape[0], rhs.shape, lhs.dtype),
        codec=gpu.CODECS[rhs.codec],
        multiply_few=functools.partial(codec.multiply_few, call),
        decode=functools.partial(pallas.module(rhs.codec).decode, launch),
        multiply_dense=functools.partial(dense.multiply_dense, launch),
    )


def build() -> list[pathlib.Path]:
    """Compiles the libraries of all codecs unless that has been done before: their paths.

    Raises RuntimeError with the reason where there is no nvcc or it fails.
    """
    return [shared.build(codec.SOURCE) for codec in CODECS.values()]
