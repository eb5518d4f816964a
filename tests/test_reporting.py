"""What a run tells its user."""

import json
import sys

import numpy as np
import pytest

from qmoe_jax import figures, files, reports, resources


def test_table_is_aligned_markdown():
    table = reports.table(["model", "loss", "size"], [["bfloat16", 1.25, None], ["a", 10.0, "1.5x"]])
    assert table.splitlines() == [
        "| model    |    loss | size |",
        "|:---------|--------:|-----:|",
        "| bfloat16 |  1.2500 |    - |",
        "| a        | 10.0000 | 1.5x |",
    ]


def test_table_with_a_short_row_is_an_error():
    with pytest.raises((ValueError, IndexError)):
        reports.table(["model", "loss"], [["bfloat16"]])


def test_table_of_nothing_is_its_header():
    assert len(reports.table(["model", "loss"], []).splitlines()) == 2


def test_a_compression_row_fits_its_header():
    report = {"loss": 1.0, "loss_paper": 2.0, "zeros": 0.9, "entropy_per_weight": 0.5, "bits_per_weight": 0.8}
    report |= {"compression_experts": 20.0, "compression_model": 19.5, "bytes_model": 2_500_000}
    row = reports.compression_row("GPTQ", report)
    assert len(row) == len(reports.COMPRESSION_HEADER)
    assert row == ["GPTQ", 1.0, 2.0, 0.9, 0.5, 0.8, "20.00x", "19.50x", "2.50"]
    assert reports.compression_row("bfloat16", {"loss": 1.0})[2:] == [None] * 7


def test_stages_add_up_and_nest():
    stages = resources.Stages()
    for _ in range(2):
        with stages("outer"), stages("inner"):
            pass
    report = stages.report()
    assert list(report) == ["inner", "outer", "total"]
    assert 0 <= report["inner"] <= report["outer"] <= report["total"]


def test_a_stage_that_raises_is_counted():
    stages = resources.Stages()
    with pytest.raises(KeyError), stages("broken"):
        raise KeyError
    assert "broken" in stages.report()


def test_peak_memory_is_of_this_process_in_bytes():
    before = resources.peak_rss_bytes()
    block = np.ones(100_000_000, np.uint8)
    assert 30e6 < before <= resources.peak_rss_bytes() < 1e12
    assert resources.peak_rss_bytes() > block.nbytes


def test_json_is_written_whole_with_its_directories(tmp_path):
    path = tmp_path / "a" / "b" / "report.json"
    for value in ({"loss": 1.5, "name": "größer"}, {"loss": None}):
        files.write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_json_that_cannot_be_written_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    files.write_json(path, {"loss": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"loss": 2, "model": object()})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        files.write_json(path, {"loss": 3})
    assert json.loads(path.read_text()) == {"loss": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_progress_goes_to_standard_error_with_the_time_left(capsys):
    with reports.progress(4, "compressing") as bar:
        for _ in range(4):
            bar.update()
        reports.say("a line")
    out, err = capsys.readouterr()
    assert out == "a line\n"
    assert "compressing: 100%" in err and "4/4" in err
    assert bar.fp is not sys.stdout


LAYER = {"zeros": 0.9, "entropy_per_weight": 0.5, "bits_per_weight": 0.8, "tokens_per_expert": [3, 0]}
LAYER |= {"output_error": 0.1, "output_error_per_expert": [0.1, None]}


@pytest.mark.parametrize("stored", [0.8, None], ids=["stored", "measured only"])
def test_figure_of_a_compression(stored, tmp_path):
    layer = LAYER | {"bits_per_weight": stored, "fallback": {"1": "no calibration tokens"}}
    layers = {"encoder/layers_0": layer, "decoder/layers_11": layer}
    report = {"layers": layers, "method": "gptq", "title": "GPTQ", "bits": 1.5, "zeros": 0.9, "loss": 3.0}
    figures.plot_compression(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_training_and_of_losses(tmp_path):
    figures.plot_training([{"step": 0, "loss": 5.0}, {"step": 1, "loss": 4.0}], tmp_path / "training.png")
    figures.plot_losses({"bfloat16": {"loss": 1.0}, "ternary": {"loss": 1.5}}, tmp_path / "losses.png")
    for name in ("training", "losses"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_rows_are_the_baselines_and_the_report_itself():
    report = {"method": "rd", "title": "rate-distortion GPTQ", "bits": 1.5, "loss": 1.3, "bytes_bfloat16": 4e6}
    assert [row[0] for row in reports.comparison_rows(report)] == ["rate-distortion GPTQ, 1.5 bits"]
    report["baselines"] = {
        "rtn": {"method": "rtn", "title": "round to nearest", "bits": 2, "loss": 2.0},
        "bfloat16": {"loss": 1.0},
    }
    rows = reports.comparison_rows(report)
    names = ["bfloat16", "round to nearest, 2 bits", "rate-distortion GPTQ, 1.5 bits"]
    assert [row[:2] for row in rows] == [[n, loss] for n, loss in zip(names, (1.0, 2.0, 1.3), strict=True)]
    assert rows[0][-1] == "4.00"
