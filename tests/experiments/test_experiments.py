"""The command lines: the whole way. Most run in this process; some as a user would start them."""

import importlib.util
import re
import shutil

import numpy as np
import pytest
import tiny_model
from as_users import (
    COMPRESS_FIELDS,
    CONFIG,
    REPORT_FIELDS,
    assert_fails,
    assert_holds,
    memory_flags,
    names_in,
    read_json,
    start,
)
from models.numpy_switch import cross_entropy
from models.random_models import padded

import qmoe_jax
from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.models.switch import Vocabulary, load_examples


def test_compress_from_another_directory(elsewhere):
    output, finished = elsewhere
    assert finished.returncode == 0, finished.stderr
    checkpoint = ["dense", "layers", "manifest.json"]
    reports = ["report.html", "report.json", "report.png"]
    assert names_in(output) == [*checkpoint, *reports]
    report = read_json(output / "report.json")
    assert_holds(report, COMPRESS_FIELDS)
    assert report["experts_quantized"] + report["experts_fallback"] == report["experts_total"]
    assert report["compression_experts"] == pytest.approx(16 / report["bits_per_weight"])
    assert {"reading", "hessians", "quantization", "encoding", "writing"} <= set(report["seconds"])
    assert set(report["baselines"]) == {"bfloat16", "rtn"}
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text()
    assert f"{report['loss']:.4f}" in page and "encoder/layers_1" in page and page.rstrip().endswith("</html>")
    assert all(0 < layer["output_error"] < 1 for layer in report["layers"].values())
    # A table with a line for each way, a progress bar with the time left, and nothing of Orbax's log.
    table = [line for line in finished.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "bfloat16",
        "round to nearest, 1.5 bits",
        "GPTQ, 1.5 bits",
    ]
    assert f"{report['loss']:.4f}" in table[-1]
    assert re.search(r"compressing: .*\d\d:\d\d<\d\d:\d\d", finished.stderr)
    assert "WARNING" not in finished.stderr and "orbax" not in finished.stderr.lower()


def test_evaluate_compressed_from_another_directory(elsewhere, tiny, tmp_path):
    output, _ = elsewhere
    (tmp_path / "moved").mkdir()
    shutil.copytree(output, tmp_path / "moved" / "model")
    args = ("--checkpoint=moved/model", "--report=reports/evaluation.json")
    finished = start(tmp_path, "evaluate", tiny, *args)
    assert finished.returncode == 0, finished.stderr
    report = read_json(tmp_path / "reports" / "evaluation.json")
    assert_holds(report, REPORT_FIELDS)
    compressed = read_json(output / "report.json")
    for field in ("loss", "loss_paper"):
        assert report[field] == pytest.approx(compressed[field], abs=1e-6)
    assert f"{report['loss']:.4f}" in finished.stdout


def test_evaluate_t5x_is_the_models_own_cross_entropy(run, tiny, tmp_path):
    report = tmp_path / "report.json"
    args = (CONFIG, *tiny.flags(), *memory_flags(), f"--checkpoint={tiny.checkpoint}", f"--report={report}")
    result = run("evaluate", *args)
    assert result.code == 0, result.err
    report = read_json(report)
    assert_holds(report, REPORT_FIELDS)
    assert "loss_paper" in result.out

    model, params = qmoe_jax.load(tiny.checkpoint)
    examples = load_examples(tiny.validation, Vocabulary.load(tiny.vocabulary), tiny_model.NUM_VALIDATION)
    tokens = padded(examples.pairs)
    losses = cross_entropy(qmoe_jax.forward(model, params, *tokens), tokens[2])
    assert report["loss"] == pytest.approx(losses.sum() / (tokens[2] > 0).sum(), abs=1e-5)
    assert report["num_tokens"] == (tokens[2] > 0).sum()


def test_generate_from_both_layouts(run, tiny, elsewhere):
    marked, unmarked = "the cat <extra_id_0> on the <extra_id_1>", "the cat sat"
    for path, prompt in ((tiny.checkpoint, marked), (tiny.checkpoint, unmarked), (elsewhere[0], marked)):
        args = (f"--prompt={prompt}", "--config.generation.max_length=12")
        result = run("generate", *tiny.flags(), f"--checkpoint={path}", *args)
        assert result.code == 0, result.err
        (text,) = re.findall(r"^text: +(.+)", result.out, re.MULTILINE)
        assert text.startswith("the cat") and "<extra_id_0>" not in text


@pytest.mark.long
def test_evaluate_and_generate_over_several_devices(run, tiny, elsewhere, tmp_path):
    output, _ = elsewhere
    losses, texts = [], []
    for devices in (1, 4):
        args = (CONFIG, *tiny.flags(), f"--checkpoint={output}", f"--config.mesh.experts={devices}")
        result = run("evaluate", *args, *memory_flags(), f"--report={tmp_path / 'report.json'}")
        assert result.code == 0, result.err
        losses.append(read_json(tmp_path / "report.json")["loss"])
        texts.append(run("generate", *args, "--config.generation.max_length=12").out.split("\n\n")[1])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert texts[1] == texts[0]


@pytest.mark.parametrize("experiment", ["compress", "evaluate", "generate"])
def test_processes_that_are_not_all_told_of(experiment, run):
    assert_fails(run(experiment, CONFIG, "--process_id=1"), "--coordinator_address, --num_processes: not given")


@pytest.mark.parametrize("experiment", ["evaluate", "generate"])
@pytest.mark.parametrize("devices", [0, 3, 99])
def test_devices_that_there_are_not_or_that_do_not_divide_the_experts(experiment, devices, run, tiny):
    args = (*tiny.flags(), f"--checkpoint={tiny.checkpoint}", f"--config.mesh.experts={devices}")
    assert_fails(run(experiment, *args), "config.mesh.experts", str(devices))


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        ("gptq", "1.5"),
        pytest.param("rtn", "1.5", marks=pytest.mark.long),
        ("rd", "1.5"),
        pytest.param("gptq", "2", marks=pytest.mark.long),
        ("rtn", "2"),
    ],
)
def test_methods_and_bits(method, bits, run, tiny, tmp_path):
    report = tmp_path / "out" / "report.json"
    settings = (
        f"--config.quantization.method={method}",
        f"--config.quantization.bits={bits}",
        f"--config.codec.name={'gap' if method == 'rd' else 'dictionary'}",
        "--config.compare=false",
    )
    if method == "rd":
        settings += ("--config.quantization.target_bits=1.8",)  # Of such narrow rows levels alone take about a bit.
    data = tiny.flags(calibration="nowhere.jsonl") if method == "rtn" else tiny.flags()
    paths = (f"--checkpoint={tiny.checkpoint}", f"--output={tmp_path / 'out'}")
    result = run("compress", CONFIG, *paths, *data, *settings, *memory_flags())
    assert result.code == 0, result.err
    report = read_json(report)
    assert (report["method"], report["bits"]) == (method, float(bits))
    assert "baselines" not in report
    if bits == "1.5":
        assert_holds(report, COMPRESS_FIELDS)
        assert open_checkpoint(tmp_path / "out").manifest["quantization"]["method"] == method
    else:
        sizes = {"bits_per_weight", "compression_experts", "compression_model", "entropy_per_weight"}
        assert_holds(report, {f: sane for f, sane in COMPRESS_FIELDS.items() if f not in sizes})
        assert report["bits_per_weight"] is report["compression_experts"] is report["compression_model"] is None
        assert 0.5 < report["entropy_per_weight"] < 2
        assert names_in(tmp_path / "out") == ["report.html", "report.json", "report.png"]
        assert "measured, not saved" in result.out


def test_top_2_is_kept_in_the_compressed_checkpoint(run, tiny, tmp_path):
    top_2 = "--config.model.top_k=2"
    args = (*tiny.flags(), *memory_flags(), "--config.compare=false", f"--output={tmp_path / 'out'}", top_2)
    assert run("compress", f"--checkpoint={tiny.checkpoint}", *args).code == 0
    loss = read_json(tmp_path / "out" / "report.json")["loss"]
    for name, more, same in (("kept", [], True), ("said again", [top_2], True), ("other", [top_2[:-1] + "1"], False)):
        report = tmp_path / f"{name}.json"
        args = (*tiny.flags(), *memory_flags(), f"--report={report}", *more)
        assert run("evaluate", f"--checkpoint={tmp_path / 'out'}", *args).code == 0
        assert (abs(read_json(report)["loss"] - loss) < 1e-6) == same, name


# --- Training --------------------------------------------------------------------------------------------------------


def test_training_makes_a_checkpoint_that_evaluates(run, tiny, tmp_path):
    """Three steps."""
    workdir = tmp_path / "work"
    args = [f"--config.data.vocabulary={tiny.vocabulary}", f"--config.data.train={tiny.calibration}"]
    model = dict(d_model=16, d_ff=24, num_heads=2, head_dim=8, num_experts=4)
    args += [f"--config.model.{field}={value}" for field, value in model.items()]
    args += ["--config.train.steps=3", "--config.train.tokens_per_batch=512", "--config.train.log_every=1"]
    result = run("train", f"--workdir={workdir}", *args)
    assert result.code == 0, result.err
    report = read_json(workdir / "report.json")
    assert len(report["history"]) == 3 and all(np.isfinite(h["loss"]) for h in report["history"])
    assert (workdir / "training.png").read_bytes().startswith(b"\x89PNG")
    if importlib.util.find_spec("tensorboardX"):
        assert len(list((workdir / "tensorboard").iterdir())) == 1
    config = open_checkpoint(workdir).config
    assert {field: getattr(config, field) for field in model} == model
    evaluation = tmp_path / "evaluation.json"
    result = run("evaluate", *tiny.flags(), f"--checkpoint={workdir}", f"--report={evaluation}")
    assert result.code == 0, result.err
    assert_holds(read_json(evaluation), REPORT_FIELDS)


def test_training_without_text(run, tiny, tmp_path):
    args = (f"--config.data.vocabulary={tiny.vocabulary}", "--config.data.train=nowhere.jsonl")
    assert_fails(run("train", f"--workdir={tmp_path / 'work'}", *args), "nowhere.jsonl")
    assert not (tmp_path / "work").exists()
