"""The command lines: what is wrong is said in one line, and nothing half-written is left."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import msgpack
import numpy as np
import pytest
import tiny_model
from as_users import ROOT, assert_fails, environment, files_below, memory_flags, names_in, start
from tiny_model import random_params, write_checkpoint, write_texts

import interrupts
from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.compression import progress

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
    slow = environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # It isn't through before the signal comes.
    process = subprocess.Popen(command, env=slow, stderr=subprocess.PIPE, text=True)
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


def test_compressing_what_is_compressed(compress, tmp_path):
    model = tmp_path / "model"
    assert compress(output=model).code == 0
    assert_fails(compress(checkpoint=model), model, "compressed already")


def test_compressed_checkpoint_with_a_changed_byte(compress, run, tiny, tmp_path):
    model = tmp_path / "model"
    assert compress(output=model).code == 0
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
