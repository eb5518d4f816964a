"""experiments/benchmarks/gpu.py without a GPU: stages on tiny shapes. kernels/test_cuda_executed.py has its events."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.on_gpu import events, kernels, products, table, variants
from benchmarks.on_gpu.report import Stage

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_stage_keeps_what_it_had(tmp_path):
    stage = Stage(tmp_path / "kernels.json", seconds=60)
    what = dict(shape="base wo", tokens=1, experts=1)
    for product, microseconds in (("cuBLAS", 8.0), ("cuBLAS", 6.0), ("cuda gap", 3.0)):
        stage.attempt("events", {**what, "product": product}, lambda us=microseconds: {"microseconds": us})
    stage.attempt("events", {**what, "product": "broken"}, lambda: 1 / 0)
    stage.attempt("events", {**what, "product": "late"}, lambda: {}, least=3600)
    found = json.loads((tmp_path / "kernels.json").read_text())  # as it is when the process is killed here
    assert found["state"] == "running" and "ZeroDivisionError" in found["events"][-1]["error"]
    assert [row["product"] for row in found["left_out"]] == ["late"]
    text = table.summary(tmp_path, ["check", "kernels"])
    assert "cut off" in text and "not run" in text
    assert "2.00 to 2.00" in text  # 6 us of the faster layout, over 3


def gpu(output, *flags):
    command = [sys.executable, str(ROOT / "experiments/benchmarks/gpu.py"), f"--output={output}", "--dry_run", *flags]
    # Programs are small, and run once: compiling them is what takes the time.
    quickly = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=quickly)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


NCU = """==PROF== Connected to process 7
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Block Size","Grid Size","Section","Metric Name","Metric Unit","Metric Value"
"0","7","void F<float>(M)","(9, 1, 1)","(1, 1, 1)","x","smsp__inst_executed.sum","inst","12"
"4","7","void F<unsigned short>(M, a)","(9, 1, 1)","(60, 1, 1)","x","smsp__inst_executed.sum","inst","775,000"
"4","7","void F<unsigned short>(M, a)","(9, 1, 1)","(60, 1, 1)","x","dram__bytes_read.sum","byte","1,065,984"
"""


def test_counters_are_the_last_kernels_by_weight_and_step(monkeypatch):
    monkeypatch.setattr(variants.shutil, "which", lambda name: "ncu")
    monkeypatch.setattr(variants, "output_of", lambda *command, **environment: NCU)
    found = variants.counters(out=2080, width=6144, tokens=1, experts=1)
    assert found["kernel"] == "void F<unsigned short>" and found["grid"] == "(60, 1, 1)"
    assert found["bytes_read"] == 1_065_984
    assert found["instructions_a_weight"] == pytest.approx(32 * 775_000 / (2080 * 6144))
    monkeypatch.setattr(variants, "output_of", lambda *command, **environment: "==ERROR== ERR_NVGPUCTRPERM")
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        variants.counters(out=2080, width=6144, tokens=1, experts=1)


def test_stages_that_need_events_on_a_gpu_that_is_made_up(tmp_path, monkeypatch):
    """Their loops and tables; what a GPU would say is bytes over a bandwidth."""
    seconds = lambda nbytes: {"microseconds": 1e6 * nbytes / 3e12}
    dense = lambda tokens, out, width, active, matrices, by_rows: seconds(2 * active * out * width)

    def compressed(rhs, tokens, active, calls, config=None):
        assert rhs.shape[0] >= calls * active  # no call meets the bytes of another
        return seconds(rhs.resident_nbytes / rhs.shape[0] * active) | {"calls": calls}

    monkeypatch.setattr(events, "cublas", dense)
    monkeypatch.setattr(events, "compressed", compressed)
    for module in (kernels, variants):
        monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
    shapes = {"wide": (24, 1040), "narrow": (24, 40)}
    sizes = dataclasses.replace(products.TINY, shapes=shapes, cold_bytes=1 << 20)
    kernels.kernels(Stage(tmp_path / "kernels.json", 60), sizes)
    variants.variants(Stage(tmp_path / "variants.json", 60), sizes)
    found = json.loads((tmp_path / "variants.json").read_text())
    assert not found["left_out"] and not any("error" in row for row in found["variant"])
    for tokens, active in variants.LOADS:
        own = [row for row in found["variant"] if (row["tokens"], row["experts"]) == (tokens, active)]
        assert sum(row["chosen"] for row in own) == 1 and {row["segment"] for row in own} == {512, 256}
    text = table.summary(tmp_path, ["check", "kernels", "variants"])
    assert "wide" in text and "chosen, us" in text and "WRONG" not in text


@pytest.mark.long
def test_dry_run_of_all_stages(tmp_path):
    printed = gpu(tmp_path, "--tests=tests/kernels/test_imports.py")
    for name in ("check", "tests", "kernels", "variants", "layers", "rehearsal"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["state"] == "complete" and not found["left_out"], name
    check = json.loads((tmp_path / "check.json").read_text())["product"]
    right = {(row["implementation"], row["codec"]) for row in check if row.get("right")}
    assert right >= {(name, codec) for name in ("xla", "cpu", "pallas") for codec in ("gap", "dictionary")}
    assert all(
        row.get("right") or "needs a GPU" in row["cannot"] or "decodes the codec" in row["cannot"] for row in check
    )
    derivatives = json.loads((tmp_path / "layers.json").read_text())["derivative"]
    assert len(derivatives) == 2 and all(row["speed"] > 0 for row in derivatives)
    assert "WRONG" not in printed and "derivative of tokens" in printed and "projected here" in printed
    assert (tmp_path / "summary.md").read_text() in printed


def test_an_unknown_stage_is_refused(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/benchmarks/gpu.py"), f"--output={tmp_path}", "--stages=all"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "found 'all', expected among check, tests" in done.stderr
