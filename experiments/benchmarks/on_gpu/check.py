"""Stages 1 and 2: is what runs here right? Products against float64; the kernels' tests; compute-sanitizer."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import common
from benchmarks.on_gpu import products
from benchmarks.on_gpu.report import Stage
from benchmarks.on_gpu.timing import SOURCE, Timing
from qmoe_jax import codecs
from qmoe_jax.kernels.compressed_ragged_dot import cuda, pallas
from qmoe_jax.kernels.compressed_ragged_dot.api import IMPLEMENTATIONS, compressed_ragged_dot

ROOT = pathlib.Path(__file__).resolve().parents[3]
# Riskiest last: after an illegal access nothing else runs in the process.
ORDER = [*sorted(IMPLEMENTATIONS, key=lambda name: (name == "cuda", name != "xla")), None]
SANITIZED = """
import jax, jax.numpy as jnp
from benchmarks.on_gpu import products
from qmoe_jax.kernels.compressed_ragged_dot.api import compressed_ragged_dot
for dtype in ("float32", "bfloat16"):
    for tokens, sizes in ((1, [0, 1, 0, 0]), (24, [1, 3, 20, 0])):
        rhs = products.encoded(77, 2080, 4)
        x = jnp.ones((tokens, 2080), dtype)
        jax.block_until_ready(compressed_ragged_dot(x, rhs, jnp.array(sizes), implementation="cuda"))
"""


def output_of(*command: str | os.PathLike, seconds: float = 60, **environment: str) -> str:
    """What a program prints, or why it doesn't."""
    try:
        done = subprocess.run(
            [str(c) for c in command],
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=ROOT,
            env=os.environ | environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr).strip()


def check(stage: Stage, sizes: products.Sizes) -> None:
    """Stage 1: versions, the build, bandwidth; every implementation and codec in every way that XLA runs it."""
    device = jax.devices()[0]
    stage.put("environment", common.environment() | {"capability": getattr(device, "compute_capability", None)})
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"
    stage.put("nvidia_smi", output_of("nvidia-smi", query, "--format=csv"))
    if device.platform == "gpu":
        stage.attempt("build", {"what": "nvcc"}, lambda: build(device))
        stage.attempt(
            "time", {"what": "empty kernels, each dependent on the one before, and a copy"}, lambda: bandwidth(sizes)
        )
    out, width = list(sizes.shapes.values())[-1]
    for codec in codecs.CODECS:
        rhs = products.encoded(out, width, 4, codec)
        weights = np.asarray(rhs.to_dense())
        for implementation in ORDER:
            for dtype in sizes.checked_dtypes:
                for tokens in sizes.checked_tokens:
                    what = dict(codec=codec, implementation=implementation, dtype=dtype, tokens=tokens)
                    stage.attempt("product", what, functools.partial(right, rhs, weights, **what), least=5)
    stage.complete()


def build(device) -> dict:
    nvcc = cuda.shared.find_nvcc()
    capability = str(getattr(device, "compute_capability", "9.0")).replace(".", "")
    version = output_of(nvcc, "--version").splitlines()
    flags = "-O3", "-std=c++17", "-w", f"-arch=sm_{capability}", "-cubin", "-Xptxas=-v", "-o", os.devnull
    log = "".join(cuda.shared.compile_with(nvcc, codec.SOURCE, *flags) for codec in cuda.CODECS.values())
    kernels = re.findall(r"function '(\w+)' for.*?(\d+) bytes spill stores.*?Used (\d+) registers", log, re.DOTALL)
    return {
        "nvcc": nvcc,
        "version": version[-1] if version else "",
        "libraries": [str(path) for path in cuda.build()],
        "capability": capability,
        "kernels": {name: {"registers": int(used), "spilled": int(spilled)} for name, spilled, used in kernels},
    }


def bandwidth(sizes: products.Sizes) -> dict:
    timing = Timing(ctypes.CDLL(str(cuda.shared.build(SOURCE))))
    return {
        "empty_dependent_kernel_microseconds": {f"{n} blocks": timing.empty_kernel(n) for n in (1, 528)},
        "copy_bytes_per_second": timing.copy(max(sizes.cold_bytes, 1 << 20)),
    }


def right(rhs, weights, *, codec, implementation, dtype, tokens) -> dict:
    """Largest error over what rounding allows: once, under jit twice with other buffers, and in a scan."""
    experts, _, width = rhs.shape
    spread = products.group_sizes(1, experts, tokens, min(tokens, experts))[0]
    spread[0] += tokens - spread.sum()
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(rng.standard_normal((4, tokens, width), np.float32), dtype)
    other = np.roll(spread, 1)
    is_interpreted = implementation == "pallas" and codec in pallas.CODECS and jax.default_backend() == "cpu"
    if is_interpreted:  # a dry run
        run = functools.partial(pallas.multiply, interpret=True)
    else:
        run = functools.partial(compressed_ragged_dot, implementation=implementation)
    jitted = jax.jit(run)

    def error(found, x, sizes):
        x = np.asarray(x, np.float64)
        expected = products.reference(x, weights, sizes)
        allowed = 1e-6 * products.reference(np.abs(x), np.abs(weights), sizes) + 1e-30
        if dtype == "bfloat16":
            allowed += 2**-8 * np.abs(expected)
        assert found.dtype == dtype
        found = np.asarray(found, np.float64)
        return float(np.max(np.abs(found - expected) / allowed)) if np.isfinite(found).all() else float("inf")

    try:
        found = {"once": error(run(x[0], rhs, jnp.asarray(spread)), x[0], spread)}
    except NotImplementedError as e:
        return {"cannot": str(e)}
    for i, own in ((1, spread), (2, other), (3, spread)):  # captured as a graph, run with other buffers, updated
        found[f"jit {i}"] = error(jitted(x[i], rhs, jnp.asarray(own)), x[i], own)
    both = jnp.asarray(np.stack([spread, other]))
    _, scanned = jax.lax.scan(lambda c, inputs: (c, run(inputs[0], rhs, inputs[1])), 0, (x[:2], both))
    found["scan"] = max(error(scanned[i], x[i], np.asarray(both[i])) for i in range(2))
    return {"right": all(value <= 1 for value in found.values()), **found}


def tests(stage: Stage, paths: list[str]) -> None:
    """Stage 2: the kernels' tests on this device; memcheck and racecheck of a small case."""

    def run_tests():
        if importlib.util.find_spec("pytest") is None:
            return {"cannot": "pytest is not installed"}
        flags = "-p", "no:cacheprovider", "--no-header", "-rfE"
        text = output_of(
            *(sys.executable, "-m", "pytest", *flags, *paths),
            seconds=max(10, stage.left() - 60),
            JAX_DEFAULT_MATMUL_PRECISION="highest",
        )
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", text[-400:])}
        failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
        good = bool(counts.get("passed")) and not failed
        return {"right": good, **counts, "failed_tests": failed, "tail": None if good else text[-4000:]}

    stage.attempt("pytest", {"paths": paths}, run_tests)
    try:
        beside = pathlib.Path(cuda.shared.find_nvcc()).parent
    except RuntimeError:
        beside = pathlib.Path()
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(beside))
    for kind in ("memcheck", "racecheck"):
        if tool is None:
            stage.add("sanitizer", {"tool": kind, "cannot": "there is no compute-sanitizer on the PATH"})
            continue

        def sanitize(kind=kind):
            search = os.pathsep.join([str(ROOT), str(ROOT / "experiments")])
            environment = dict(PYTHONPATH=search, XLA_PYTHON_CLIENT_PREALLOCATE="false")
            text = output_of(
                *(tool, "--tool", kind, sys.executable, "-c", SANITIZED),
                seconds=max(10, stage.left() / 2),
                **environment,
            )
            summary = re.findall(r"(ERROR SUMMARY|RACECHECK SUMMARY): (.*)", text)
            good = bool(summary) and summary[-1][1].startswith("0 ")
            return {
                "right": good,
                "summary": summary[-1][1] if summary else None,
                "tail": None if good else text[-4000:],
            }

        stage.attempt("sanitizer", {"tool": kind}, sanitize, least=20)
    stage.complete()
