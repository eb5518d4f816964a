"""Stage 3: one product, on cold weights, against cuBLAS in bfloat16; by events around graphs."""

from __future__ import annotations

import functools

import jax

from benchmarks.on_gpu import events, products
from benchmarks.on_gpu.report import Stage

ENOUGH_EXPERTS = 2048
L2_BYTES = 256 << 20  # more than any cache, of compressed experts that calls go through


def kernels(stage: Stage, sizes: products.Sizes) -> None:
    """Rows of `events`: the kernel, and cuBLAS's; a shape and a load each."""
    if jax.default_backend() != "gpu":
        stage.put("cannot", f"events need a GPU; JAX's devices are {jax.default_backend()!r}")
        stage.complete()
        return
    for shape, (out, width) in sizes.shapes.items():
        one = products.encoded(out, width, 1).resident_nbytes
        enough = max(1, min(L2_BYTES, sizes.cold_bytes) // one)
        experts = min(ENOUGH_EXPERTS, max(enough, *(active for _, active in sizes.loads)))
        rhs = products.encoded(out, width, experts)
        matrices = -(-sizes.cold_bytes // (2 * out * width))
        for tokens, active in sizes.loads:
            what = dict(shape=shape, out=out, width=width, tokens=tokens, experts=active)
            calls = max(1, min(sizes.calls, experts // active))
            for by_rows in (True, False):
                dense = functools.partial(events.cublas, tokens, out, width, active, max(matrices, active), by_rows)
                stage.attempt(
                    "events", {**what, "product": "cuBLAS", "layout": "out, in" if by_rows else "in, out"}, dense, 5
                )
            own = functools.partial(events.compressed, rhs, tokens, active, calls)
            stage.attempt("events", {**what, "product": "cuda gap"}, own, least=5)
        del rhs
    stage.complete()
