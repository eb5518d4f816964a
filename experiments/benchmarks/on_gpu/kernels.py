"""Stage 3: one product, on cold weights, against cuBLAS in bfloat16; by events around graphs, and as JAX runs it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from benchmarks.on_gpu import events, products
from benchmarks.on_gpu.report import Stage
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels.compressed_ragged_dot.api import IMPLEMENTATIONS, compressed_ragged_dot

JIT_LOADS = ((1, 1), (8, 8), (4, 2))
ENOUGH_EXPERTS = 2048
L2_BYTES = 256 << 20  # more than any cache, of compressed experts that calls go through


def kernels(stage: Stage, sizes: products.Sizes) -> None:
    """Rows of `events` (one kernel, or cuBLAS's) and of `jit` (a product as JAX runs it), a shape and a load each."""
    names = [name for name in IMPLEMENTATIONS if runs_here(name)]
    stage.put("implementations", names)
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
            if (tokens, active) in JIT_LOADS:
                run = functools.partial(
                    jit_dense, out, width, tokens, active, max(matrices, active), sizes.calls // 4 or 1
                )
                stage.attempt("jit", {**what, "product": "dense"}, run, least=10)
                for name in names:
                    few = calls if name in ("cuda", "cpu") else 1
                    run = functools.partial(jit_compressed, rhs, tokens, active, min(few, sizes.calls // 4 or 1), name)
                    stage.attempt("jit", {**what, "product": f"{name} gap"}, run, least=10)
        del rhs
    stage.complete()


def runs_here(name: str) -> bool:
    try:
        compressed_ragged_dot(jnp.ones((1, 8)), products.encoded(2, 8, 1), jnp.ones(1, jnp.int32), implementation=name)
    except NotImplementedError:
        return False
    return True


def jit_compressed(rhs: CompressedExperts, tokens: int, active: int, calls: int, implementation: str | None) -> dict:
    """A program of several products after each other, each with other experts."""
    sizes = products.group_sizes(calls, rhs.shape[0], tokens, active)
    x = jnp.ones((tokens, rhs.shape[2]), jnp.bfloat16)

    @jax.jit
    def run(x, rhs, sizes):
        return [compressed_ragged_dot(x, rhs, sizes[i], implementation=implementation) for i in range(calls)]

    seconds = products.median_seconds(lambda: run(x, rhs, jnp.asarray(sizes)))
    return {"microseconds": seconds / calls * 1e6, "calls": calls}


def jit_dense(out: int, width: int, tokens: int, active: int, matrices: int, calls: int) -> dict:
    """The same in bfloat16; matrices [in, out], which XLA hands to cuBLAS or to a kernel of its own."""
    calls = max(1, min(calls, matrices // active))
    W = [jnp.full((active, width, out), 0.01, jnp.bfloat16) for _ in range(calls)]
    x = jnp.ones((active, tokens // active, width), jnp.bfloat16)

    @jax.jit
    def run(x, W):
        return [jnp.einsum("eti,eio->eto", x, w, preferred_element_type=jnp.bfloat16) for w in W]

    seconds = products.median_seconds(lambda: run(x, W))
    return {"microseconds": seconds / calls * 1e6, "calls": calls}
