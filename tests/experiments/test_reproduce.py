"""Every table and study on the carried model with few documents: what must hold between its numbers."""

import json
import pathlib
import runpy
import sys

import numpy as np
import pytest
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[2]

app.define_help_flags()  # Otherwise the first script would, and only once.


@pytest.fixture
def reproduce(monkeypatch, tmp_path):
    """reproduce('--table=1', ...) -> (data, rows by their first cell)."""
    monkeypatch.chdir(ROOT)

    def run(what, *args):
        known = set(flags.FLAGS)
        argv = ["experiments/reproduce.py", what, "--small", f"--output={tmp_path}", *args]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            runpy.run_path("experiments/reproduce.py", run_name="__main__")
        except SystemExit as e:
            assert not e.code, e.code
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
        name = what.strip("-").replace("study=", "").replace("=", "_")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        report = json.loads((tmp_path / f"{name}.json").read_text())
        markdown = (tmp_path / f"{name}.md").read_text()
        assert "Model: 5.6 M parameters" in markdown  # How it differs from the paper's.
        assert all(str(row[0]) in markdown for row in report["rows"])
        return report["data"], {row[0]: row[1:] for row in report["rows"]}

    return run


@pytest.mark.long
def test_table_1_times_each_group_size(reproduce):
    data, _ = reproduce("--table=1")
    assert list(data) == ["1", "4", "16"]
    assert min(data.values()) > 0


@pytest.mark.long
def test_table_2_measures_with_and_without_special_tokens(reproduce):
    data, rows = reproduce("--table=2")
    assert set(data) == {"masked: no", "masked: yes"}
    for precision in ("2-bit", "ternary"):
        assert data["masked: no"][precision] != data["masked: yes"][precision]
    assert rows["ternary, special tokens masked: yes"][1] == "1.99"  # the paper's


@pytest.mark.long
def test_table_3_counts_the_zeros_that_are_stored(reproduce):
    data, _ = reproduce("--table=3")
    for zeros in data.values():
        assert 0 < zeros["least"] < zeros["mean"] < zeros["most"] < 100
        assert 0 < zeros["std"] < (zeros["most"] - zeros["least"])
    assert data["ternary"]["mean"] > data["2-bit"]["mean"]


@pytest.mark.long
def test_table_4_orders_methods_as_the_paper_does(reproduce):
    data, rows = reproduce("--table=4", "--config.data.seed=2")  # Few documents: with some seeds chance weighs more.
    loss = {(d["method"], d["precision"], d["calibration"]): d["loss"] for d in data}
    bfloat16 = loss["bfloat16", "", 0]
    for times in (0.5, 1, 2):
        assert bfloat16 < loss["QMoE", "2-bit", times] < loss["QMoE", "ternary", times]
        assert loss["QMoE", "ternary", times] < loss["round to nearest", "ternary", 0]
    assert loss["round to nearest", "2-bit", 0] < loss["round to nearest", "ternary", 0]
    assert len(rows) == 10


@pytest.fixture
def other_text(tmp_path):
    """A --dataset of another kind of text."""
    rng = np.random.default_rng(0)
    words = np.array("some words that are not of the documentation of Python at all but go on for a while".split())
    text = "\n\n".join(" ".join(rng.permutation(words)) for _ in range(150))
    (tmp_path / "other.txt").write_text(text)
    return f"--dataset=other={tmp_path}/other.txt"


@pytest.mark.long
def test_table_5_measures_every_text(reproduce, other_text):
    data, _ = reproduce("--table=5", other_text)
    assert list(data) == ["validation", "other"]
    assert all(len(set(losses.values())) == 4 for losses in data.values())
    assert data["validation"]["ternary"] > data["validation"]["bfloat16"]


def test_table_6_rates_are_those_of_the_bytes(reproduce):
    data, rows = reproduce("--table=6")
    for name, r in data.items():
        assert r["compression_model"] == pytest.approx(r["bytes_bfloat16"] / r["bytes_model"])
        assert r["compression_experts"] == pytest.approx(16 / r["bits_per_weight"])
        assert r["bits_per_weight"] > r["entropy_per_weight"], name
    assert rows["paper: c2048"][1] == "20.07x"


@pytest.mark.long
def test_table_7_times_each_amount_of_calibration(reproduce):
    data, rows = reproduce("--table=7")
    assert list(data) == ["0.5", "1.0", "2.0"]
    assert [name.split()[1] for name in rows] == ["30", "60", "120"]


@pytest.mark.long
def test_entropy_limit_is_below_every_code(reproduce):
    data, _ = reproduce("--study=entropy_limit")
    for name, bits in data["matrices"].items():
        assert bits["gap, code alone"] < bits["gap"], name
        # Columns of the last matrix are in classes: of all its symbols together the entropy is no limit.
        assert bits["entropy"] < bits["gap, code alone"] or name.endswith("/wo"), name
        assert bits["entropy"] < bits["dictionary, code alone"] < bits["dictionary"], name
    fitted = {(d["bits"], d["max_pairs"]): d["bits_per_weight"] for d in data["dictionaries"] if d["zeros"] != 0.885}
    made = {(d["bits"], d["max_pairs"]): d["bits_per_weight"] for d in data["dictionaries"] if d["zeros"] == 0.885}
    assert all(fitted[key] < made[key] + 0.002 for key in fitted)  # Of up to 7 pairs, all are in either.


@pytest.mark.long
def test_calibration_varies_amount_seed_and_text(reproduce, other_text):
    data, _ = reproduce("--study=calibration", other_text)
    assert {d["kind"] for d in data} == {"amount", "seed", "text"}
    assert all(np.isfinite([d["gptq"], d["rd"]]).all() for d in data)


@pytest.mark.long
def test_experts_compares_models(reproduce):
    model = ROOT / "experiments/tiny_model"
    data, _ = reproduce("--study=experts", f"--model=a={model}", f"--model=b={model}")
    assert [d["model"] for d in data] == ["a", "a", "b", "b"]
    assert data[0]["loss"] == pytest.approx(data[2]["loss"], abs=1e-6)


@pytest.mark.long
def test_kernels_go_over_densities(reproduce):
    data, _ = reproduce("--study=kernels")
    assert all(d["weights_per_second"] > 0 for d in data)
    chosen, forced = data[:12], data[12:]
    for codec in ("gap", "dictionary"):
        bits = [d["bits"] for d in chosen if d["codec"] == codec]
        assert len(bits) == 6 and bits == sorted(bits, reverse=True)
    (best,) = (d["bits"] for d in chosen if d["codec"] == "gap" and d["zeros"] == 0.885)
    assert all(d["zeros"] == 0.885 and d["bits"] > best for d in forced)


def test_one_thing_at_a_time(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    known = set(flags.FLAGS)
    monkeypatch.setattr(sys, "argv", ["experiments/reproduce.py", "--table=1", "--figure=5"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path("experiments/reproduce.py", run_name="__main__")
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
    assert e.value.code == 1 and "Give one of --table" in capfd.readouterr().err
