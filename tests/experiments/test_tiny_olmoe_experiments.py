"""The command lines with a decoder: training one, its vocabulary, the carried one, and outside tools beside ours."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
import tokenizers
from test_convert import run  # noqa: F401, a fixture

from qmoe_jax.checkpoints import open_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = f"--config={ROOT}/configs/tiny_olmoe.py"
FEW = ("--config.data.num_calibration=8", "--config.data.num_validation=6")


@pytest.fixture
def succeed(run):  # noqa: F811
    def succeed(experiment, *args):
        code, out, errors = run(experiment, *args)
        assert code == 0, errors
        return out

    return succeed


def assert_fails(result, *words):
    code, _, errors = result
    assert code == 1 and "Traceback" not in errors
    for word in words:
        assert word in errors.splitlines()[-1], errors


@pytest.fixture
def vocabulary(succeed, tiny, tmp_path):
    """A byte-level vocabulary of the tiny model's text."""
    succeed(
        "tools/make_tokenizer",
        f"--documents={tiny.calibration}",
        "--vocabulary_size=300",
        f"--output={tmp_path / 'words'}",
    )
    return tmp_path / "words/tokenizer.json"


def test_vocabulary_writes_every_text(vocabulary):
    tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary))
    assert tokenizer.get_vocab_size() == 300 and tokenizer.token_to_id("<|endoftext|>") == 0
    for text in ("def f(x):\n\treturn x  # 1", " leading", "ünï ≠ \U0001f600", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_vocabulary_too_small(run, tiny, tmp_path):  # noqa: F811
    flags = (f"--documents={tiny.calibration}", "--vocabulary_size=100", f"--output={tmp_path / 'out'}")
    assert_fails(run("tools/make_tokenizer", *flags), "vocabulary_size=100", "257")
    assert not (tmp_path / "out").exists()


def training(vocabulary, tiny, workdir, **train):
    model = dict(d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=12, num_experts=4, top_k=2)
    train = dict(steps=3, tokens_per_batch=256, window=32, log_every=1) | train
    settings = {f"model.{f}": v for f, v in model.items()} | {f"train.{f}": v for f, v in train.items()}
    settings |= {"data.vocabulary": vocabulary, "data.train": tiny.calibration}
    return [
        f"--config={ROOT}/configs/train_olmoe.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


@pytest.mark.long
def test_training_makes_a_checkpoint_that_evaluates(succeed, vocabulary, tiny, tmp_path):
    workdir = tmp_path / "work"
    succeed("train", *training(vocabulary, tiny, workdir, steps=30, warmup_steps=2))
    report = json.loads((workdir / "report.json").read_text())
    losses = [h["loss"] for h in report["history"]]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.5
    assert (workdir / "training.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = open_checkpoint(workdir)
    assert (checkpoint.family.name, checkpoint.config.vocab_size, checkpoint.config.eos) == ("olmoe", 300, (0,))
    files = (f"--checkpoint={workdir}", f"--config.data.vocabulary={workdir}")
    data = (f"--config.data.validation={tiny.validation}", "--config.data.window=32", "--config.data.num_validation=7")
    succeed("evaluate", CONFIG, *files, *data, f"--report={tmp_path / 'evaluation.json'}")
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["loss"] < losses[0] - 0.3 and evaluation["num_documents"] == 7


def test_training_refuses(run, vocabulary, tiny, tmp_path):  # noqa: F811
    small = training(vocabulary, tiny, tmp_path / "out", tokens_per_batch=10**6)
    assert_fails(run("train", *small), "config.data.train", "more text")
    known = training(vocabulary, tiny, tmp_path / "out")
    assert_fails(run("train", *known, "--config.family=olmo"), "config.family", "olmoe")
    assert_fails(run("train", *known, "--config.train.optimizer=sgd"), "config.train.optimizer", "adamw")
    vocabulary.with_name("tokenizer_config.json").unlink()
    assert_fails(run("train", *known), "tokenizer_config.json", "eos_token")
    assert not (tmp_path / "out").exists()


def test_the_carried_model_needs_no_flags(succeed, tmp_path):
    out = succeed("evaluate", CONFIG, "--config.data.num_validation=6")
    assert "tiny_olmoe" in out
    compressed = tmp_path / "compressed"
    succeed("compress", CONFIG, *FEW, "--config.compare=false", f"--output={compressed}")
    assert open_checkpoint(compressed).family.name == "olmoe"
    text = succeed("generate", CONFIG, f"--checkpoint={compressed}", "--config.generation.max_length=3")
    assert "prompt: def __init__" in text and "extra_id" not in text


def test_a_checkpoint_is_asked_for(run):  # noqa: F811
    result = run("evaluate", f"--config={ROOT}/configs/paper/base128.py")
    assert_fails(result, "--checkpoint=DIR")


# --- Outside tools ---------------------------------------------------------------------------------------------------


def test_frontier_takes_only_points_of_the_same_model(run, tmp_path):  # noqa: F811
    outside = tmp_path / "outside.json"
    flags = (CONFIG, *FEW, f"--outside={outside}", f"--output={tmp_path / 'out'}")
    outside.write_text('{"points": []}')
    assert_fails(run("studies/frontier", *flags), str(outside), "not written by studies/outside.py")
    outside.write_text('{"points": [], "bfloat16": {"loss": 1.0, "num_tokens": 1530}}')
    assert_fails(run("studies/frontier", *flags), str(outside), "another model")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("hqq") is not None, reason="HQQ is installed, so that nothing is missing")
def test_hqq_is_named_where_it_is_missing(run, tmp_path):  # noqa: F811
    assert_fails(run("studies/outside", f"--output={tmp_path / 'out.json'}"), "pip install hqq")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="the package hqq isn't installed (it needs torch)")
def test_hqq(succeed, tmp_path):
    output = tmp_path / "hqq.json"
    succeed("studies/outside", CONFIG, *FEW, "--bits=2,4", "--group_sizes=64", f"--output={output}")
    two, four = json.loads(output.read_text())["points"]
    assert (two["bits_per_weight"], four["bits_per_weight"]) == (
        2.5,
        4.5,
    )  # 64 weights share 32 bits
    assert abs(four["above_bfloat16"]) < 0.05 and abs(four["above_bfloat16"]) < two["above_bfloat16"]
