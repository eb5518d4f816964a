"""Microseconds by events around graphs, of cuBLAS and the CUDA kernel, in a process that has no other use for it."""

from __future__ import annotations

import ctypes
import functools

import jax
import jax.numpy as jnp

from benchmarks.on_gpu import products
from benchmarks.on_gpu.timing import SOURCE, Timing
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import cuda


@functools.cache
def timing() -> Timing:
    return Timing(ctypes.CDLL(str(cuda.shared.build(SOURCE))))


@functools.cache
def library(codec: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(cuda.shared.build(cuda.CODECS[codec].SOURCE)))


def cublas(tokens: int, out: int, width: int, active: int, matrices: int, by_rows: bool) -> dict:
    """Of a product in bfloat16 with `active` dense matrices; by rows: [out, in]."""
    return {"microseconds": timing().cublas(tokens, out, width, active, matrices, by_rows)}


def compressed(rhs: CompressedExperts, tokens: int, active: int, calls: int, config=None) -> dict:
    """Of the custom call of `cuda.multiply`, with its `config`; what XLA does beside it isn't in it."""
    codec = cuda.CODECS[rhs.codec]
    handler = getattr(library(rhs.codec), codec.FUNCTION)
    return {"microseconds": timed_call(timing(), handler, rhs, tokens, active, calls, config), "calls": calls}


def timed_call(
    timing: Timing, handler, rhs: CompressedExperts, tokens: int, active: int, calls: int, config=None
) -> float:
    sizes = jnp.asarray(products.group_sizes(calls, rhs.shape[0], tokens, active).ravel())
    x = jnp.ones((tokens, rhs.shape[2]), jnp.bfloat16)
    multiply = jax.jit(functools.partial(cuda.multiply, config=config))
    target = cuda.CODECS[rhs.codec].TARGET
    return timing.custom_call(target, handler, calls, lambda: jax.block_until_ready(multiply(x, rhs, sizes)))
