"""Pallas kernels, which XLA compiles by Triton: the portable way on a GPU, and the readable one.

`gpu/` says how they work. Interpreted on the CPU, they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import jax

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import gpu
from qmoe_jax.kernels.compressed_ragged_dot.gpu import Config

# Each is a module of this folder, imported when it is wanted, as Pallas is. It has `multiply_few` and `decode`, as
# `gpu.multiply` takes them after a launch.
CODECS = ("dictionary", "gap")


def module(name: str) -> ModuleType:
    """A codec's, or `shared`."""
    return importlib.import_module(f"{__package__}.{name}")


def why_not(rhs: CompressedExperts) -> str | None:
    """Why this implementation cannot multiply by `rhs` here; None where it can."""
    return gpu.why_not(rhs, CODECS) or _failure(rhs.codec)


@functools.cache
def _failure(codec):
    if reason := gpu.check.failure(multiply, codec):
        return f"its self-check failed ({reason})"
    return None


def compressed_ragged_dot(lhs: jax.Array, rhs: CompressedExperts, group_sizes: jax.Array) -> jax.Array:
    """See `api.compressed_ragged_dot`. Invalid streams of the codec `dictionary` are read out of bounds.

    Raises:
      NotImplementedError: no GPU, another codec, or (when lowered) another platform than CUDA.
    """
    if reason := why_not(rhs):
        raise NotImplementedError(f"implementation 'pallas' cannot run here: {reason}.")
    # Without a default, lowering for another platform raises NotImplementedError.
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, cuda=multiply)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def multiply(
    lhs: jax.Array,
    rhs: CompressedExperts,
    group_sizes: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`compressed_ragged_dot` where `why_not` says None; `interpret` runs the kernels on any platform."""
    kernels, shared = module(rhs.codec), module("shared")
    launch = functools.partial(shared.launch, interpret=interpret)
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
