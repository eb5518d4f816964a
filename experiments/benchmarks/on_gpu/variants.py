"""Stage 4: what the model of the hardware chose beside its alternatives, and ncu's counters beside that model."""

from __future__ import annotations

import csv
import functools
import io
import os
import shutil
import sys
from unittest import mock

import jax

from benchmarks.on_gpu import events, products
from benchmarks.on_gpu.check import ROOT, output_of
from benchmarks.on_gpu.report import Stage
from qmoe_jax.codecs import gap
from qmoe_jax.kernels.compressed_ragged_dot import cuda
from qmoe_jax.kernels.compressed_ragged_dot.cuda.gap import Config

SEGMENTS = (512, 256)  # most columns of a segment
LOADS = ((1, 1), (8, 8), (64, 8))  # tokens, experts
COUNTED = ((1, 1), (8, 8))
COLD_BYTES = 128 << 20  # of compressed experts: more than the caches of all but one
STEP = 31  # weights of a thread's step at P(0) = .885, docs/gpu.md
# ncu's name -> ours. Sums over the GPU; warps' instructions.
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "sm__cycles_active.avg": "cycles",
    "smsp__inst_executed.sum": "instructions",
    "smsp__inst_executed_pipe_alu.sum": "integer",
    "smsp__inst_executed_pipe_fma.sum": "fma",
    "smsp__inst_executed_pipe_lsu.sum": "loads_and_stores",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum": "shared_wavefronts",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "shared_conflicts",
    "dram__bytes_read.sum": "bytes_read",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "percent_of_warps_active",
}
PER_WEIGHT = "instructions", "integer", "fma", "loads_and_stores"
PROFILED = """
import jax, jax.numpy as jnp
from benchmarks.on_gpu import products
from qmoe_jax.kernels.compressed_ragged_dot import cuda
out, width, tokens, active = {arguments}
rhs = products.encoded(out, width, 2 * active)
if reason := cuda.why_not(rhs):
    raise SystemExit(reason)
x, sizes = jnp.ones((tokens, width), "bfloat16"), jnp.asarray(products.group_sizes(1, 2 * active, tokens, active)[0])
jax.block_until_ready(cuda.multiply(x, rhs, sizes))
"""


def variants(stage: Stage, sizes: products.Sizes) -> None:
    """Rows of `variant`: microseconds by rows of a thread, tokens of a block, splits, columns of a segment; `counters`.

    All variants are in one binary. Threads of a block, 128, are a constant of csrc/work.cuh, so that is not varied.
    """
    out, width = list(sizes.shapes.values())[-2 if len(sizes.shapes) > 1 else 0]  # c2048 wo
    for tokens, active in COUNTED:
        what = dict(out=out, width=width, tokens=tokens, experts=active)
        stage.attempt("counters", what, functools.partial(counters, **what), least=20)
    if jax.default_backend() != "gpu":
        stage.put("cannot", f"events need a GPU; JAX's devices are {jax.default_backend()!r}")
        stage.complete()
        return
    for segment in SEGMENTS:
        with mock.patch.object(gap, "SEGMENT", segment):
            one = products.encoded(out, width, 1).resident_nbytes
            experts = max(16, min(COLD_BYTES, sizes.cold_bytes) // one)
            rhs = products.encoded(out, width, experts)
        for tokens, active in LOADS:
            chosen = cuda.CODECS["gap"].heuristic(tokens, rhs.shape, "bfloat16")
            for config in alternatives(tokens, active, rhs.data["starts"].shape[2]):
                what = dict(out=out, width=width, tokens=tokens, experts=active, segment=segment, config=vars(config))
                what["chosen"] = config == chosen and segment == gap.SEGMENT
                calls = max(1, min(sizes.calls, experts // active))
                run = functools.partial(events.compressed, rhs, tokens, active, calls, config)
                stage.attempt("variant", what, run, least=5)
    stage.complete()


def alternatives(tokens: int, active: int, segments: int) -> list[Config]:
    """Ways to cut a product; `Config` says what they are."""
    if tokens <= 8:
        blocks = sorted({1, tokens})
        return [Config(tiles=False, tokens=block, passes=passes) for block in blocks for passes in (1, 2, 4)]
    few = [Config(tiles=False, tokens=8, passes=passes) for passes in (1, 4)]
    splits = sorted({1, max(1, segments // 2), segments})
    return few + [Config(tiles=True, tokens=block, splits=n) for block in (16, 32, 64) for n in splits]


def counters(out: int, width: int, tokens: int, experts: int) -> dict:
    """What ncu counts of one product whose bytes no cache holds, and that by weight and by a warp's step."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"cannot": "there is no ncu on the PATH"}
    script = PROFILED.format(arguments=(out, width, tokens, experts))
    search = os.pathsep.join([str(ROOT), str(ROOT / "experiments")])
    text = output_of(
        *(tool, "--csv", "--print-units", "base", "--metrics", ",".join(METRICS)),
        *("--kernel-name", "regex:FewTokens|Tiles", sys.executable, "-c", script),
        seconds=60,
        PYTHONPATH=search,
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
    )
    found = last_kernel(text)
    weights = out * width * experts  # each is decoded once
    steps = weights / (32 * STEP)
    return {
        **found,
        **{f"{name}_a_weight": 32 * found[name] / weights for name in PER_WEIGHT if name in found},
        **{
            f"{name}_a_step": found[name] / steps for name in ("shared_wavefronts", "shared_conflicts") if name in found
        },
    }


def last_kernel(text: str) -> dict:
    """Counters of the last kernel in ncu's CSV: those before it are the self-check's.

    Raises RuntimeError with the end of what ncu printed where that holds none.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = [row for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))) if row.get("Metric Name") in METRICS]
    if not rows:
        raise RuntimeError(f"ncu counted nothing: {text[-1500:]}")
    own = [row for row in rows if row["ID"] == rows[-1]["ID"]]
    counted = {METRICS[row["Metric Name"]]: float(row["Metric Value"].replace(",", "")) for row in own}
    return {"kernel": own[0]["Kernel Name"].split("(")[0], "grid": own[0].get("Grid Size"), **counted}
