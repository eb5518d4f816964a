"""experiments/benchmarks/gpu.py without a GPU: its stages on tiny shapes, its events on a machine that runs PTX."""

import ctypes
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "kernels"))
from benchmarks.on_gpu import events, products, table
from benchmarks.on_gpu.report import Stage
from benchmarks.on_gpu.timing import REPLAYS, SOURCE, Timing
from ptx_machine import build

from qmoe_jax.kernels.compressed_ragged_dot import cuda

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    try:
        nvcc = cuda.shared.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    handlers = {cuda.gap.FUNCTION: None, "QmoeTimed": None}
    return build(tmp_path_factory.mktemp("machine"), nvcc, [cuda.gap.SOURCE, SOURCE], handlers)


@pytest.fixture
def timing(machine):
    machine.order("forwards")
    machine.clear()
    return Timing(machine.library, platform="cpu", function="OnCpu_QmoeTimed")


def test_a_graph_of_custom_calls_each_with_its_own_group_sizes(machine, timing, monkeypatch):
    monkeypatch.setattr(cuda.gap, "TARGET", "qmoe_gap_cuda_timed")  # another name than tests of the kernel use
    rhs = products.encoded(24, 40, 6)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40)), jnp.bfloat16)
    calls, found = 3, []
    sizes = products.group_sizes(calls, 6, 2, 2)
    multiply = jax.jit(cuda.multiply)
    run = lambda: found.append(np.asarray(multiply(x, rhs, jnp.asarray(sizes.ravel()))))
    microseconds = timing.custom_call(cuda.gap.TARGET, machine.library[cuda.gap.FUNCTION], calls, run)
    assert microseconds == pytest.approx(1000 / calls)  # a replay takes a millisecond there
    assert machine.counts()["launches"] == 1 + calls  # first one before capture
    expected = products.reference(np.asarray(x, np.float64), np.asarray(rhs.to_dense()), sizes[-1])
    np.testing.assert_allclose(found[0].astype(np.float64), expected, rtol=2**-8, atol=1e-6)


def test_what_fails_during_capture_is_an_error(machine, timing):
    with pytest.raises(RuntimeError, match="group sizes of another shape"):
        run = lambda: cuda.multiply(
            jnp.ones((1, 40), jnp.bfloat16), products.encoded(24, 40, 7), jnp.ones(7, jnp.int32)
        )
        cuda.gap.TARGET, own = "qmoe_gap_cuda_timed", cuda.gap.TARGET
        try:
            timing.custom_call(cuda.gap.TARGET, machine.library[cuda.gap.FUNCTION], 2, run)
        finally:
            cuda.gap.TARGET = own


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("tokens, active", [(1, 1), (6, 1), (6, 3)])
def test_dense_products_stay_within_their_matrices(machine, timing, monkeypatch, tokens, active, by_rows):
    monkeypatch.setattr("benchmarks.on_gpu.timing.cublas_library", lambda: machine.path)
    matrices = 7
    found = timing.cublas(tokens, 24, 40, active, matrices, by_rows)
    assert found == pytest.approx(1000 / (matrices // active))
    assert timing.empty_kernel() == pytest.approx(1000 / 500) and timing.copy(1 << 12) == pytest.approx(2 * 4096 / 1e-3)


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
    assert "WRONG" not in printed and "projected here" in printed
    assert (tmp_path / "summary.md").read_text() in printed


def test_an_unknown_stage_is_refused(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/benchmarks/gpu.py"), f"--output={tmp_path}", "--stages=all"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "found 'all', expected among check, tests" in done.stderr
