"""Experiments that compare methods, on a carried model with few documents: what must hold between their numbers."""

import json
import pathlib

import pytest
from test_convert import run  # noqa: F401, a fixture

ROOT = pathlib.Path(__file__).resolve().parents[2]
FEW = ("--config.data.num_calibration=60", "--config.data.num_validation=30")


@pytest.fixture
def measure(run, tmp_path):  # noqa: F811
    def measure(experiment, *args, few=FEW):
        code, out, errors = run(experiment, f"--output={tmp_path}", *args, *few)
        assert code == 0, errors
        return out

    return measure


@pytest.mark.long
def test_frontier(measure, tmp_path):
    few = ("--config.data.num_calibration=24", "--config.data.num_validation=10")
    out = measure("studies/frontier", f"--config={ROOT}/configs/tiny_olmoe.py", "--targets=0.7,1.2", few=few)
    report = json.loads((tmp_path / "frontier.json").read_text())
    points = {(p["name"].split(",")[0], p["codec"], p["bits"]): p for p in report["points"]}
    by_name = {(p["name"].split(",")[0], p["codec"], p["target_bits"]): p for p in report["points"]}
    paper, gap = points["paper's recipe", "dictionary", "ternary"], points["paper's recipe", "gap", "ternary"]
    two = points["paper's recipe", "gap", "2 bits"]
    assert two["loss"] < gap["loss"] < report["without_experts"] and two["bits_per_weight"] > gap["bits_per_weight"]
    assert paper["loss"] == gap["loss"] and gap["entropy_per_weight"] < gap["bits_per_weight"]
    assert gap["bits_per_weight"] < 0.8 * paper["bits_per_weight"]
    for target in (0.7, 1.2):
        ours = by_name["rate-distortion", "gap", target]
        assert abs(ours["bits_per_weight"] / target - 1) < 0.03
        assert ours["above_bfloat16"] == pytest.approx(ours["loss"] - report["bfloat16"])
        assert f"{ours['bits_per_weight']:.3f}" in (tmp_path / "frontier.md").read_text()
    assert report["comparison"]["paper_bits"] == paper["bits_per_weight"]
    assert f"bfloat16: {report['bfloat16']:.4f}" in out
    assert (tmp_path / "frontier.png").stat().st_size > 1000


@pytest.mark.long
def test_experts_with_few_tokens(measure, tmp_path):
    arguments = ("--candidates=60", "--taken=8", "--documents=8", "--min_tokens=0,512")
    measure("studies/few_tokens", *arguments)
    report = json.loads((tmp_path / "few_tokens.json").read_text())
    fewest = {row["taken"]: row["fewest"] for row in report["choices"]}
    assert fewest["routing"] > fewest["in order"] and fewest["routers"] >= fewest["in order"]
    for method in ("gptq", "rd"):
        alone, filled = (row["error below 64"] for row in report["min_tokens"] if row["method"] == method)
        assert filled < 0.8 * alone


@pytest.mark.long
def test_seconds_of_a_compression(measure, tmp_path):
    measure("benchmarks/compression_time", "--rounds=2")
    report = json.loads((tmp_path / "compression_time.json").read_text())
    assert report["calibration_documents"] == 60 and report["validation_documents"] == 30
    last = {name: runs[-1] for name, runs in report["seconds"].items()}  # of two rounds, the one that counts
    paper, ours = last["the paper's recipe"], last["rate-distortion"]
    assert report["ratio"] == ours["total"] / paper["total"]
    for run_ in (paper, ours):
        assert sum(s for stage, s in run_.items() if stage != "total") <= run_["total"]
    assert f"{ours['total']:.2f}" in (tmp_path / "compression_time.md").read_text()


@pytest.mark.long
def test_demo(run, tmp_path):  # noqa: F811
    args = ("--demo_config.data.num_calibration=30", "--demo_config.data.num_validation=10", f"--output={tmp_path}")
    code, out, err = run("demo", *args)
    assert code == 0, err
    assert "rate-distortion, ternary" in out and out.count("Filled in by the compressed model") == 2
    assert {"demo.json", "demo.md", "demo.png", "manifest.json"} <= {p.name for p in tmp_path.iterdir()}
