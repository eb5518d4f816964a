"""Stages 4 and 5: a layer of c2048 with all experts resident, generation, rehearsals, Hessians."""

from __future__ import annotations

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.on_gpu import kernels, products
from benchmarks.on_gpu.check import ROOT, output_of
from benchmarks.on_gpu.report import Stage
from qmoe_jax.kernels.compressed_ragged_dot.api import compressed_ragged_dot

STEPS = 16  # of a program
MODELS = ("switch_base_128", "switch_large_128", "switch_c_2048")
TINY_MODEL = ROOT / "experiments/tiny_model/checkpoint_3000"


def layers(stage: Stage, sizes: products.Sizes, dry_run: bool) -> None:
    """Stage 4: products with many experts; a layer's experts, compressed and all there, against a single dense one."""
    out, width = list(sizes.shapes.values())[-1]
    for experts in sizes.layer_experts:
        for tokens in (1, 8):
            what = dict(out=out, width=width, experts=experts, tokens=tokens)
            run = functools.partial(many_experts, out, width, experts, tokens)
            stage.attempt("product", what, run, least=20)
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


def many_experts(out: int, width: int, experts: int, tokens: int) -> dict:
    rhs = products.encoded(out, width, experts)
    return kernels.jit_compressed(rhs, tokens, min(tokens, experts), min(STEPS, experts // min(tokens, experts)), None)


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
