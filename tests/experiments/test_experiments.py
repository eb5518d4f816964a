"""The command lines. Most run in this process, through the scripts' own entry; some as a user would start them."""

import dataclasses
import errno
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import time

import msgpack
import numpy as np
import pytest
import tiny_model
from absl import app, flags
from models.numpy_switch import cross_entropy
from models.random_models import padded
from tiny_model import random_params, write_checkpoint, write_texts

import interrupts
import qmoe_jax
from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.compression import progress
from qmoe_jax.models.switch import Vocabulary, load_examples

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = f"--config={ROOT}/configs/tiny.py"

app.define_help_flags()  # Otherwise the first script would, and only once.


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capfd):
    """run('compress', *flags) -> Result, as `python experiments/compress.py ...` from the repository's root."""
    monkeypatch.chdir(ROOT)

    def run_here(experiment, *args):
        known = set(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", [f"experiments/{experiment}.py", *map(str, args)])
        capfd.readouterr()
        code, message = 0, ""
        try:
            runpy.run_path(f"experiments/{experiment}.py", run_name="__main__")
        except SystemExit as e:  # Python prints what isn't a number, and exits with 1.
            code, message = (e.code, "") if isinstance(e.code, int | None) else (1, f"{e.code}\n")
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
        out, err = capfd.readouterr()
        return Result(code or 0, out, err + message)

    return run_here


def memory_flags(tokens=512):
    settings = {"tokens_per_batch": tokens, "experts_per_group": 4, "commit_share": 1.0}
    return [f"--config.memory.{name}={value}" for name, value in settings.items()]


def read_json(path):
    return json.loads(pathlib.Path(path).read_text(), parse_constant=lambda c: pytest.fail(f"{c} in {path}"))


def files_below(path):
    return [p for p in pathlib.Path(path).rglob("*") if p.is_file()]


def names_in(path):
    """Sorted; without TensorBoard's events, which are there or not."""
    return sorted({p.name for p in pathlib.Path(path).iterdir()} - {"tensorboard"})


def assert_fails(result, *names, code=1):
    """That exit code, and one line that names what is wrong; no traceback."""
    assert result.code == code, result.out + result.err
    assert "Traceback" not in result.err
    (line,) = re.findall(r"^error: (.+(?:\n  .+)*)", result.err.replace("\r", "\n"), re.MULTILINE)
    assert result.err.rstrip().endswith(line)
    assert len(line) < 1500
    for name in names:
        assert str(name) in line, line


# --- The whole way ---------------------------------------------------------------------------------------------------

REPORT_FIELDS = {
    "loss": lambda v: 0 < v < 20,
    "loss_paper": lambda v: 0 < v < 20,
    "num_documents": lambda v: v == tiny_model.NUM_VALIDATION,
    "num_tokens": lambda v: v > 0,
    "peak_rss_bytes": lambda v: 50e6 < v < 100e9,
    "seconds": lambda v: v["total"] > 0 and all(s >= 0 for s in v.values()),
}
COMPRESS_FIELDS = REPORT_FIELDS | {
    "zeros": lambda v: 0.2 < v < 1,
    "entropy_per_weight": lambda v: 0.5 < v < np.log2(3),
    "bits_per_weight": lambda v: 1 < v < 10,  # In rows of 20 weights the metadata weighs.
    "compression_experts": lambda v: 1.6 < v < 16,
    "compression_model": lambda v: 1 < v < 16,
    "experts_total": lambda v: v == 24,
    "experts_quantized": lambda v: v >= 20,
    "experts_fallback": lambda v: v <= 4,
}


def assert_holds(report, fields):
    for field, sane in fields.items():
        assert sane(report[field]), (field, report[field])


@pytest.fixture(scope="module")
def elsewhere(tiny, tmp_path_factory):
    """The tiny model's compressed checkpoint, made by a user in another directory, and what was printed."""
    directory = tmp_path_factory.mktemp("elsewhere")
    return directory / "out", start(directory, "compress", tiny, "--output=out", f"--checkpoint={tiny.checkpoint}")


def start(directory, experiment, tiny, *args):
    command = [sys.executable, ROOT / f"experiments/{experiment}.py", *tiny.flags(), *memory_flags(), *args]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment(), timeout=300)


def environment():
    """As a user has it: nothing imports the package from the current directory by chance."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}


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
    for path in (tiny.checkpoint, elsewhere[0]):
        for prompt in ("the cat <extra_id_0> on the <extra_id_1>", "the cat sat"):
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


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compress(run, tiny, tmp_path):
    """compress(checkpoint=..., output=..., more flags..., data field=value) -> Result."""

    def run_with(*args, checkpoint=None, output=None, **data):
        paths = (f"--checkpoint={checkpoint or tiny.checkpoint}", f"--output={output or tmp_path / 'out'}")
        return run("compress", *paths, *tiny.flags(**data), *memory_flags(), "--config.compare=false", *args)

    return run_with


@pytest.fixture
def damaged(tiny, tmp_path):
    """A copy of the tiny model's step directory, to be damaged."""
    return pathlib.Path(shutil.copytree(tiny.checkpoint, tmp_path / "damaged"))


WI = "encoder/layers_1/mlp/expert/wi/kernel"
WI_DIRECTORY = "target.encoder.layers_1.mlp.expert.wi.kernel"


def test_no_checkpoint(compress, run, tiny, tmp_path):
    assert_fails(compress(checkpoint=tmp_path / "nowhere"), "No checkpoint", tmp_path / "nowhere")
    for experiment in ("evaluate", "generate"):
        result = run(experiment, *tiny.flags(), f"--checkpoint={tmp_path / 'nowhere'}")
        assert_fails(result, "No checkpoint", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_truncated_msgpack(compress, damaged):
    index = damaged / "checkpoint"
    index.write_bytes(index.read_bytes()[:-100])
    assert_fails(compress(checkpoint=damaged), index, "truncated")


def test_version_2(compress, damaged):
    index = damaged / "checkpoint"
    content = msgpack.unpackb(index.read_bytes())
    index.write_bytes(msgpack.packb(content | {"version": 2}))
    assert_fails(compress(checkpoint=damaged), index, "version 2", "expected version 3")


@pytest.mark.parametrize("damage", ["missing", "truncated", "corrupt"])
def test_damaged_chunk(damage, compress, run, tiny, damaged, tmp_path):
    (chunk,) = (p for p in (damaged / WI_DIRECTORY).iterdir() if p.name != ".zarray")
    content = chunk.read_bytes()
    if damage == "missing":
        chunk.unlink()
    elif damage == "truncated":
        chunk.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        chunk.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    assert_fails(compress(checkpoint=damaged), WI, damaged)
    assert names_in(tmp_path / "out") == ["layers", "progress"]  # The layer before it is committed.
    assert_fails(run("evaluate", *tiny.flags(), f"--checkpoint={damaged}"), WI)


def test_unknown_codec_of_an_array(compress, damaged, tmp_path):
    metadata = damaged / WI_DIRECTORY / ".zarray"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"compressor": {"id": "lz77"}}))
    assert_fails(compress(checkpoint=damaged), WI, "lz77", "gzip")
    assert names_in(tmp_path / "out") == ["layers", "progress"]  # The layer before it is committed.


def test_not_a_switch_transformer(compress, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model", {"resnet/conv/kernel": np.zeros((3, 3), np.float32)})
    assert_fails(compress(checkpoint=checkpoint), "Not a Switch Transformer", "resnet/conv/kernel")


def test_all_lacking_parameters_are_listed(compress, tmp_path):
    params = random_params()
    lost = [WI, "decoder/decoder_norm/scale", "encoder/layers_0/attention/key/kernel"]
    for name in lost:
        del params[name]
    checkpoint = write_checkpoint(tmp_path / "model", params)
    assert_fails(compress(checkpoint=checkpoint), *(f"missing: {name}" for name in lost))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", [WI, "decoder/layers_0/mlp/wi/kernel", "token_embedder/embedding"])
def test_weight_that_is_not_finite(value, name, compress, run, tiny, tmp_path):
    params = random_params()
    params[name][5] = value
    checkpoint = write_checkpoint(tmp_path / "model", params)
    expert = ["expert 5"] if name == WI else []
    assert_fails(compress(checkpoint=checkpoint), name, "NaN or Inf", *expert)
    assert name == "token_embedder/embedding" or names_in(tmp_path / "out") == ["layers", "progress"]
    assert_fails(run("evaluate", *tiny.flags(), f"--checkpoint={checkpoint}"), name, *expert)


def test_vocabulary_of_another_model(compress, tiny, tmp_path):
    for rows, what in ((100, "larger than the embedding"), (1024, "smaller than the ids")):
        config = dataclasses.replace(tiny_model.CONFIG, vocab_size=rows)
        checkpoint = write_checkpoint(tmp_path / str(rows), random_params(config))
        assert_fails(compress(checkpoint=checkpoint), tiny.vocabulary, what, f"{rows} rows")


def test_vocabulary_that_is_none(compress, tmp_path):
    assert_fails(compress(vocabulary=tmp_path / "absent.model"), tmp_path / "absent.model")
    (tmp_path / "text.model").write_text("hello")
    assert_fails(compress(vocabulary=tmp_path / "text.model"), tmp_path / "text.model", "not a SentencePiece model")


@pytest.mark.parametrize(
    ("line", "problem"),
    [(b"", "empty line"), (b"the cat", "not JSON"), (b'{"text": "\xff"}', "not UTF-8"), (b'{"txt": ""}', '"text"')],
)
@pytest.mark.parametrize("which", ["calibration", "validation"])
def test_bad_line_of_text(which, line, problem, compress, tmp_path):
    texts = pathlib.Path(write_texts(tmp_path / "texts.jsonl", 30, seed=0))
    lines = texts.read_bytes().splitlines()
    texts.write_bytes(b"\n".join([*lines[:4], line, *lines[4:]]))
    assert_fails(compress(**{which: texts}), f"{texts}, line 5", problem)
    assert not (tmp_path / "out").exists()


def test_text_that_is_missing_empty_or_too_little(compress, tiny, tmp_path):
    assert_fails(compress(validation=tmp_path / "absent.jsonl"), tmp_path / "absent.jsonl", "no such text file")
    (tmp_path / "empty.jsonl").touch()
    assert_fails(compress(calibration=tmp_path / "empty.jsonl"), tmp_path / "empty.jsonl", "empty")
    assert_fails(compress(num_calibration=21), tiny.calibration, "21 documents were asked for", "only 20")
    assert_fails(compress(num_validation=0), "config.data.num_validation")


def test_output_that_is_not_empty(compress, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    assert_fails(compress(), out, "not empty", "--overwrite")
    assert [p.name for p in files_below(out)] == ["thesis.tex"]
    for _ in range(2):  # Over other files, and over a compressed checkpoint.
        assert compress("--overwrite").code == 0
        assert open_checkpoint(out).config == tiny_model.CONFIG
        assert (out / "thesis.tex").read_text() == "mine"


def test_a_run_that_failed_goes_on_when_the_command_is_given_again(compress, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write, calls = progress.write_rows, []

    def full_disk(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*args)

    with monkeypatch.context() as m:
        m.setattr(progress, "write_rows", full_disk)
        result = compress()
    assert_fails(result, "No space left", f"{out}: 1 of 3 sparse layers are committed; run the same command")
    assert_fails(compress("--config.quantization.damping=0.2"), "quantization.damping", "0.1", "--overwrite")
    assert_fails(compress("--config.save=false"), out)
    result = compress("--config.memory.experts_per_group=8")
    assert result.code == 0 and "going on after 1 of 3 sparse layers" in result.out
    assert names_in(out) == ["dense", "layers", "manifest.json", "report.html", "report.json", "report.png"]
    report = (out / "report.json").read_bytes()
    result = compress()
    assert result.code == 0 and "finished already, by the same command" in result.out
    assert (out / "report.json").read_bytes() == report
    assert_fails(compress("--config.quantization.damping=0.2"), "not empty")


def test_a_kill_between_the_manifest_and_the_report_is_mended_by_the_same_command(compress, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def terminated(*_):
        raise interrupts.Terminated

    with monkeypatch.context() as m:
        m.setattr("qmoe_jax.reports.html.html_report", terminated)
        assert_fails(compress(), "terminated", f"{out}: the checkpoint is written; run the same command", code=143)
    assert (out / "manifest.json").exists() and not (out / "report.html").exists()
    written = {p: p.read_bytes() for p in files_below(out / "layers")}
    result = compress()
    assert result.code == 0 and "going on after 3 of 3 sparse layers" in result.out
    assert names_in(out) == ["dense", "layers", "manifest.json", "report.html", "report.json", "report.png"]
    assert {p: p.read_bytes() for p in files_below(out / "layers")} == written


@pytest.mark.parametrize("report", ["folder", "no/folder/in/a.file/report.json"])
def test_a_report_that_cannot_be_written_is_refused_before_the_evaluation(report, run, tiny, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "no/folder/in").mkdir(parents=True)
    (tmp_path / "no/folder/in/a.file").touch()
    monkeypatch.setattr("qmoe_jax.streaming.run", lambda *_, **__: pytest.fail("it was evaluated"))
    result = run("evaluate", *tiny.flags(), f"--checkpoint={tiny.checkpoint}", f"--report={tmp_path / report}")
    assert_fails(result, f"--report={tmp_path / report}")


def test_output_that_is_a_file(compress, tmp_path):
    (tmp_path / "out").write_text("mine")
    for more in ([], ["--overwrite"]):
        assert_fails(compress(*more), tmp_path / "out", "a file")
    assert (tmp_path / "out").read_text() == "mine"


def test_output_that_would_overwrite_the_checkpoint(compress, damaged):
    before = sorted(files_below(damaged))
    for output in (damaged, damaged / "inside", damaged.parent, f"{damaged}/../{damaged.name}"):
        assert_fails(compress("--overwrite", checkpoint=damaged, output=output), output, "overlap")
    assert sorted(files_below(damaged)) == before


def test_asking_to_save_two_bits_fails_before_any_work(compress, tmp_path):
    args = ("--config.save=true", "--config.quantization.bits=2", "--config.codec.name=dictionary")
    # Neither the checkpoint nor the vocabulary is there: it doesn't get so far.
    result = compress(*args, checkpoint=tmp_path / "nowhere", vocabulary="nowhere")
    assert_fails(result, "config.save", "2-bit")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("quantization.method=magic", ["quantization.method", "'magic'", "gptq, rtn"]),
        ("quantization.bits=3", ["quantization.bits", "3", "1.5"]),
        ("quantization.block_size=0", ["quantization.block_size", "0"]),
        ("quantization.damping=-1", ["quantization.damping", "-1"]),
        ("quantization.token_cap=0", ["quantization.token_cap", "0"]),
        ("codec.name=zip", ["codec", "'zip'", "dictionary"]),
        ("codec.num_shards=0", ["config.codec.num_shards", "0", "1 to 8"]),
        ("codec.num_shards=9", ["config.codec.num_shards", "9", "1 to 8"]),
        ("model.preset=switch_huge", ["'switch_huge'", "switch_base_8"]),
        ("model.preset=switch_base_8", ["switch_base_8", "d_model: found 20, expected 768", "vocab_size", "d_ff"]),
        ("model.dtype=float16", ["model.dtype", "'float16'", "bfloat16"]),
        ("model.top_k=0", ["top_k", "0", "8"]),
        ("model.top_k=9", ["top_k", "9", "8"]),
        ("memory.experts_per_group=0", ["memory.experts_per_group", "0"]),
        ("memory.tokens_per_batch=-1", ["memory.tokens_per_batch", "-1"]),
        ("memory.tokens_per_expert_call=0", ["memory.tokens_per_expert_call", "0"]),
        ("memory.commit_share=3.0", ["memory.commit_share", "3"]),
        ("data.max_length=1", ["max_length", "1"]),
        ("data.vocabulary=", ["data.vocabulary"]),
    ],
)
def test_setting_out_of_range(setting, names, compress, tmp_path):
    assert_fails(compress(f"--config.{setting}"), *names)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--config.quantisation.bits=2", "quantisation"),
        ("--config.quantization.bit=2", 'Did you mean "bits"'),
        ("--config.codec.name.gap=1", "codec.name.gap"),
        ("--config.data.num_calibration=many", "many"),
        ("--outptu=x", "outptu"),
    ],
)
def test_flag_that_does_not_exist_or_does_not_parse(flag, name, compress, tmp_path):
    result = compress(flag)
    assert result.code == 1
    assert name in result.out + result.err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_in_one_line(compress, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("common.check_room", interrupt)
    assert_fails(compress(), "interrupted", code=130)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_modules_are_imported_ends_it_at_once(name, tmp_path):
    """jax stands for all of them: it is on its way when the signal comes, and swallows what is raised meanwhile."""
    (tmp_path / "jax.py").write_text(
        f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.{name})\nexcept BaseException:\n    pass\n"
    )
    command = [sys.executable, ROOT / "experiments/evaluate.py"]
    done = subprocess.run(command, env=environment() | {"PYTHONPATH": tmp_path}, capture_output=True, text=True)
    ends = {"SIGINT": (130, "error: interrupted\n"), "SIGTERM": (143, "error: terminated\n")}
    assert (done.returncode, done.stderr) == ends[name]


def test_sigterm_in_a_run_tells_in_one_line_what_is_committed(tiny, tmp_path):
    out = tmp_path / "out"
    more = (f"--checkpoint={tiny.checkpoint}", f"--output={out}", "--config.compare=false")
    command = [sys.executable, ROOT / "experiments/compress.py", *tiny.flags(), *memory_flags(), *more]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (out / "layers").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    (line,) = re.findall(r"^error: .*", process.communicate(timeout=240)[1].replace("\r", "\n"), re.MULTILINE)
    assert process.returncode == 143
    assert re.fullmatch(rf"error: terminated; {out}: (no sparse layer is|\d of 3 sparse layers are) committed.*", line)
    assert not (out / "manifest.json").exists()


def test_help_lists_the_flags_that_experiments_share(run):
    result = run("compress", "--help")
    assert all(flag in result.out for flag in ("--config", "--coordinator_address", "--output"))


def test_compressing_what_is_compressed(compress, elsewhere):
    assert_fails(compress(checkpoint=elsewhere[0]), elsewhere[0], "compressed already")


def test_compressed_checkpoint_with_a_changed_byte(run, tiny, elsewhere, tmp_path):
    model = shutil.copytree(elsewhere[0], tmp_path / "model")
    file = next(p for p in files_below(model / "layers") if p.name == "0")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for experiment in ("evaluate", "generate"):
        result = run(experiment, *tiny.flags(), f"--checkpoint={model}")
        assert_fails(result, file.parents[1], "changed")


def test_prompts_that_cannot_be_filled(run, tiny):
    for prompt, problem in (
        ("<extra_id_0> and <extra_id_0>", "twice"),
        ("<extra_id_100>", "Sentinel 100"),
        (" ", "--prompt: it is empty"),
    ):
        assert_fails(run("generate", *tiny.flags(), f"--checkpoint={tiny.checkpoint}", f"--prompt={prompt}"), problem)


@pytest.mark.parametrize("setting", ["temperature=-1", "top_p=0", "max_length=0"])
def test_generation_settings_out_of_range(setting, run, tiny):
    result = run("generate", *tiny.flags(), f"--checkpoint={tiny.checkpoint}", f"--config.generation.{setting}")
    assert_fails(result, setting.partition("=")[0])


def test_a_process_that_fails_says_so_in_one_line(tiny, tmp_path):
    finished = start(tmp_path, "compress", tiny, "--checkpoint=nowhere")
    assert finished.returncode == 1
    (line,) = finished.stderr.strip().splitlines()
    assert line.startswith("error: No checkpoint at 'nowhere'")
    assert not (tmp_path / "out").exists()


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
