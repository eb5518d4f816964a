"""Microseconds by events around graphs, of cuBLAS and of the CUDA kernel."""

from __future__ import annotations

import functools

from benchmarks.on_gpu.timing import SOURCE, Timing
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot import cuda


@functools.cache
def timing() -> Timing:
    return Timing(cuda.shared.build(SOURCE))


def cublas(tokens: int, out: int, width: int, active: int, matrices: int, by_rows: bool) -> dict:
    return {"microseconds": timing().cublas(tokens, out, width, active, matrices, by_rows)}


def compressed(rhs: CompressedExperts, tokens: int, active: int, calls: int) -> dict:
    raise NotImplementedError("not yet")
