"""experiments/benchmarks/gpu.py without a GPU: stages on tiny shapes. kernels/test_cuda_executed.py has its events."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks.on_gpu import table
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
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_dry_run_of_all_stages(tmp_path):
    printed = gpu(tmp_path, "--tests=tests/kernels/test_imports.py")
    for name in ("check", "tests", "kernels", "layers", "rehearsal"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["state"] == "complete" and not found["left_out"], name
    check = json.loads((tmp_path / "check.json").read_text())["product"]
    assert {row["codec"] for row in check if row.get("right")} == {"gap", "dictionary"}
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
