"""Stages 4 and 5: products as JAX runs them, a layer of c2048 with all experts, generation, rehearsals, Hessians."""

from __future__ import annotations

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.on_gpu import products
from benchmarks.on_gpu.check import ROOT, output_of
from benchmarks.on_gpu.report import Stage
from qmoe_jax.kernels.compressed_ragged_dot.api import IMPLEMENTATIONS, compressed_ragged_dot

STEPS = 16  # of a program
JIT_LOADS = ((1, 1), (8, 8))
DERIVATIVE_LOADS = ((8, 8), (64, 8))
MODELS = ("switch_base_128", "switch_large_128", "switch_c_2048")
TINY_MODEL = ROOT / "experiments/tiny_model/checkpoint_3000"


def layers(stage: Stage, sizes: products.Sizes, dry_run: bool) -> None:
    """Stage 4: products with many experts; a layer's experts, compressed and all there, against a single dense one."""
    names = [name for name in IMPLEMENTATIONS if runs_here(name)]
    stage.put("implementations", names)
    for shape, (out, width) in sizes.shapes.items():
        most = max(sizes.layer_experts) if shape == list(sizes.shapes)[-1] else min(sizes.layer_experts)
        for tokens, active in JIT_LOADS:
            what = dict(shape=shape, tokens=tokens, experts=active)
            calls = max(1, min(sizes.calls // 4, min(sizes.layer_experts) // active))
            run = functools.partial(jit_dense, out, width, tokens, active, calls)
            stage.attempt("jit", {**what, "product": "dense"}, run, least=10)
            for experts in sorted({min(sizes.layer_experts), most}):
                for name in names:
                    few = calls if name in ("cuda", "cpu") else 1  # XLA's loop takes milliseconds
                    run = functools.partial(jit_compressed, out, width, experts, tokens, active, few, name)
                    stage.attempt("jit", {**what, "product": f"{name} gap of {experts}"}, run, least=10)
        for tokens, active in DERIVATIVE_LOADS:
            what = dict(shape=shape, tokens=tokens, experts=active)
            run = functools.partial(derivative, out, width, min(sizes.layer_experts), tokens, active)
            stage.attempt("derivative", what, run, least=10)
    for batch in (1, 8):
        run = functools.partial(layer, max(out, width), min(out, width), sizes.layer_experts[-1], batch)
        stage.attempt("layer", dict(experts=sizes.layer_experts[-1], batch=batch), run, least=30)
    flags = ["--codecs=gap", "--dtypes=bfloat16"]
    if dry_run:
        flags += [f"--checkpoint={TINY_MODEL}", "--batches=1", "--new_tokens=4", "--rounds=1"]
    else:
        flags += ["--preset=switch_base_128", "--new_tokens=128"]  # the paper's number of tokens
    stage.attempt(
        "generation", {}, lambda: script(stage, "benchmarks/generation.py", "generation.json", *flags), least=60
    )
    stage.complete()


def runs_here(name: str) -> bool:
    try:
        compressed_ragged_dot(jnp.ones((1, 8)), products.encoded(2, 8, 1), jnp.ones(1, jnp.int32), implementation=name)
    except NotImplementedError:
        return False
    return True


def jit_compressed(
    out: int, width: int, experts: int, tokens: int, active: int, calls: int, implementation: str
) -> dict:
    """A program of several products after each other, each with other experts."""
    rhs = products.encoded(out, width, experts)
    sizes = products.group_sizes(calls, rhs.shape[0], tokens, active)
    x = jnp.ones((tokens, rhs.shape[2]), jnp.bfloat16)

    @jax.jit
    def run(x, rhs, sizes):
        return [compressed_ragged_dot(x, rhs, sizes[i], implementation=implementation) for i in range(calls)]

    seconds = products.median_seconds(lambda: run(x, rhs, jnp.asarray(sizes)))
    return {"microseconds": seconds / calls * 1e6, "calls": calls}


def jit_dense(out: int, width: int, tokens: int, active: int, calls: int) -> dict:
    """The same in bfloat16, dense; matrices [in, out], which XLA hands to cuBLAS or to a kernel of its own."""
    W = [jnp.full((active, width, out), 0.01, jnp.bfloat16) for _ in range(calls)]
    x = jnp.ones((active, tokens // active, width), jnp.bfloat16)

    @jax.jit
    def run(x, W):
        return [jnp.einsum("eti,eio->eto", x, w, preferred_element_type=jnp.bfloat16) for w in W]

    seconds = products.median_seconds(lambda: run(x, W))
    return {"microseconds": seconds / calls * 1e6, "calls": calls}


def derivative(out: int, width: int, experts: int, tokens: int, active: int) -> dict:
    """Microseconds of d lhs [tokens, width] from d out [tokens, out], and of a dense product of that shape."""
    rhs = products.encoded(out, width, experts)
    sizes = jnp.asarray(products.group_sizes(1, experts, tokens, active)[0])
    x, g = jnp.ones((tokens, width), jnp.bfloat16), jnp.ones((tokens, out), jnp.bfloat16)
    W = jnp.full((active, out, width), 0.01, jnp.bfloat16)

    @jax.jit
    def compressed(x, g, rhs, sizes):
        return jax.vjp(lambda x: compressed_ragged_dot(x, rhs, sizes), x)[1](g)[0]

    @jax.jit
    def dense(g, W):
        return jnp.einsum("eto,eoi->eti", g, W, preferred_element_type=jnp.bfloat16)

    own = products.median_seconds(lambda: compressed(x, g, rhs, sizes)) * 1e6
    other = products.median_seconds(lambda: dense(g.reshape(active, -1, out), W)) * 1e6
    return {"microseconds": own, "dense": other, "speed": other / own}


def layer(hidden: int, d_model: int, experts: int, batch: int) -> dict:
    """Microseconds of x + W2 relu(W1 x): compressed, each token with an expert of its own, and one dense expert."""
    W1, W2 = products.encoded(hidden, d_model, experts), products.encoded(d_model, hidden, experts, seed=1)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.integers(0, experts, (STEPS, batch)), axis=1)
    sizes = np.stack([np.bincount(row, minlength=experts) for row in chosen]).astype(np.int32)
    x = jnp.ones((batch, d_model), jnp.bfloat16)

    @jax.jit
    def compressed(x, W1, W2, sizes):
        for i in range(STEPS):
            x = x + compressed_ragged_dot(jax.nn.relu(compressed_ragged_dot(x, W1, sizes[i])), W2, sizes[i])
            x = x / (1 + jnp.max(jnp.abs(x)))
        return x

    @jax.jit
    def dense(x, D1, D2):
        for _ in range(STEPS):
            x = x + jax.nn.relu(x @ D1) @ D2
            x = x / (1 + jnp.max(jnp.abs(x)))
        return x

    D1, D2 = jnp.full((d_model, hidden), 0.01, jnp.bfloat16), jnp.full((hidden, d_model), 0.01, jnp.bfloat16)
    own = products.median_seconds(lambda: compressed(x, W1, W2, jnp.asarray(sizes))) / STEPS * 1e6
    other = products.median_seconds(lambda: dense(x, D1, D2)) / STEPS * 1e6
    resident = W1.resident_nbytes + W2.resident_nbytes
    return {"microseconds": own, "one_dense_expert": other, "speed": other / own, "resident_bytes": resident}


def rehearse(stage: Stage, dry_run: bool) -> None:
    """Stage 5: what compressing the published models would take; Hessians in float32 and by three bfloat16 products."""
    width, tokens = (64, 128) if dry_run else (6144, 8192)
    stage.attempt("hessian", dict(width=width, tokens=tokens), lambda: hessians(width, tokens), least=20)
    for model in MODELS[:1] if dry_run else MODELS:
        flags = [f"--models={model}", "--generation=false"]
        if dry_run:
            flags += ["--experts=1", "--tokens=16"]
        run = functools.partial(script, stage, "tools/rehearse.py", f"rehearsal_{model}", *flags)
        stage.attempt("rehearsal", dict(model=model), run, least=60)
    stage.complete()


def hessians(width: int, tokens: int) -> dict:
    """Seconds of X' X, and errors relative to the largest element of float64's."""
    x = np.random.default_rng(0).standard_normal((tokens, width), np.float32)
    some = x[:, : min(width, 64)].astype(np.float64)
    exact = some.T @ some
    X, found = jnp.asarray(x), {}
    ways = {"highest": jax.lax.Precision.HIGHEST, "three bfloat16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3}
    for name, precision in ways.items():
        product = jax.jit(lambda X, precision=precision: jnp.matmul(X.T, X, precision=precision))
        try:
            H = np.asarray(product(X))[: some.shape[1], : some.shape[1]]
        except Exception as error:  # a platform without this algorithm
            found[f"{name}: error"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        found[f"{name}: seconds"] = products.median_seconds(lambda product=product: product(X), 5)
        found[f"{name}: error"] = float(np.max(np.abs(H - exact)) / np.max(np.abs(exact)))
    return found


def script(stage: Stage, name: str, output: str, *flags: str) -> dict:
    """Runs another experiment; its report."""
    target = stage.path.parent / output
    text = output_of(
        *(sys.executable, ROOT / "experiments" / name, f"--output={target}", *flags),
        seconds=max(10, stage.left() - 5),
    )
    report = target if target.suffix else target / "rehearsal.json"
    if not report.exists():
        raise RuntimeError(f"{name} wrote no report:\n{text[-2000:]}")
    return {"report": str(report.relative_to(stage.path.parent)), **summary(report)}


def summary(report: pathlib.Path) -> dict:
    """Hours of each model, or tokens per second of each row."""
    found = json.loads(report.read_text())
    if "models" in found:
        return {
            "hours": {name: m["projected_seconds"]["total"] / 3600 for name, m in found["models"].items()},
            "paper_hours": {name: (m["paper_minutes_on_an_a6000"] or 0) / 60 for name, m in found["models"].items()},
        }
    names = "model", "experts_per_layer", "experts", "batch", "tokens_per_second", "times_dense", "times_ideal"
    return {"rows": [{name: row[name] for name in names} for row in found["rows"]]}
