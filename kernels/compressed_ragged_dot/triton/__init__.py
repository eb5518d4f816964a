"""Triton kernels, called through jax-triton. `gpu/` says how they work."""

from __future__ import annotations

import functools
import importlib

import jax

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import gpu
from qmoe_jax.kernels.compressed_ragged_dot.gpu import Config

# Each is a module of this folder, which needs the package triton and so is imported when it is wanted. It has
# `multiply_few` and `decode`, as `gpu.multiply` takes them after a launch.
CODECS = ("dictionary", "gap")


def why_not(rhs: CompressedExperts) -> str | None:
    """Why this implementation cannot multiply by `rhs` here; None where it can."""
    return gpu.why_not(rhs, CODECS) or _import_error()


def compressed_ragged_dot(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `api.compressed_ragged_dot`. Invalid streams of the codec `dictionary` are read out of bounds.

    Raises:
      NotImplementedError: no GPU, no jax-triton, another codec, or (when lowered) another platform than CUDA.
    """
    if reason := why_not(rhs):
        raise NotImplementedError(f"implementation 'triton' cannot run here: {reason}.")
    # Without a default, lowering for another platform raises NotImplementedError.
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, cuda=multiply)


@functools.partial(jax.jit, static_argnames=("config", "compute_capability"))
def multiply(
    lhs: jax.Array,
    rhs: CompressedExperts,
    group_sizes: jax.Array,
    *,
    config: Config | None = None,
    compute_capability: int | None = None,
) -> jax.Array:
    """`compressed_ragged_dot` where `why_not` says None; for a given compute capability it lowers without a GPU."""
    launch = functools.partial(_launch, compute_capability=compute_capability)
    kernels, shared = (importlib.import_module(f"{__package__}.{name}") for name in (rhs.codec, "shared"))
    return gpu.multiply(
        lhs,
        rhs,
        group_sizes,
        config,
        codec=gpu.CODECS[rhs.codec],
        multiply_few=functools.partial(kernels.multiply_few, launch),
        decode=functools.partial(kernels.decode, launch),
        multiply_dense=functools.partial(shared.multiply_dense, launch),
    )


@functools.cache
def _import_error() -> str | None:
    try:
        import jax_triton  # noqa: F401
    except Exception as error:  # where jax lacks its CUDA plugin, it is not an ImportError
        return f"it needs jax-triton, from the extra 'cuda13' ({error})"
    return None


def _launch(kernel, *inputs, compute_capability, **options):
    import jax_triton

    out = jax_triton.triton_call(*inputs, kernel=kernel, compute_capability=compute_capability, **options)
    return gpu.vary_together((out, *inputs))[0]  # jax-triton knows nothing of shard_map's axes
