"""experiments/convert.py, and that the other experiments take what it makes."""

import dataclasses
import hashlib
import json
import pathlib
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import tiny_model
from absl import app, flags, logging

from qmoe_jax.checkpoints import CompressedWriter, NativeCheckpoint, conversion, open_checkpoint
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.compression.progress import Progress

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ("--config.memory.tokens_per_batch=512", "--config.memory.experts_per_group=4", "--config.compare=false")

app.define_help_flags()  # Otherwise the first script would, and only once.


@pytest.fixture
def run(monkeypatch, capfd):
    """run('convert', *flags) -> (exit code, output, errors), as `python experiments/convert.py ...`."""

    def run_here(experiment, *args):
        script = ROOT / f"experiments/{experiment}.py"
        known, verbosity = set(flags.FLAGS), logging.get_verbosity()
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
        capfd.readouterr()
        code, message = 0, ""
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as e:  # Python prints what isn't a number, and exits with 1.
            code, message = (e.code, "") if isinstance(e.code, int | None) else (1, e.code)
        finally:
            logging.set_verbosity(verbosity)
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
        out, err = capfd.readouterr()
        return code or 0, out, err + message

    return run_here


@pytest.fixture
def convert(run, tmp_path):
    """convert(checkpoint, name, codec) -> the path of a new checkpoint."""

    def run_with(checkpoint, name, codec):
        code, _, errors = run(
            "convert", f"--checkpoint={checkpoint}", f"--output={tmp_path / name}", f"--codec={codec}"
        )
        assert code == 0, errors
        return tmp_path / name

    return run_with


def write(directory, codec, num_levels=2, zeros=0.885, config=tiny_model.CONFIG):
    """A compressed checkpoint of the tiny model's shapes: random symbols, levels and dense parameters."""
    rng = np.random.default_rng(0)
    shapes = {"wi": (config.d_ff, config.d_model), "wo": (config.d_model, config.d_ff)}
    p = [zeros] + [(1 - zeros) / num_levels] * num_levels
    with CompressedWriter(
        directory, config, {"bits": 1.5, "method": "made up"}, codec, {"origin": "nowhere"}
    ) as writer:
        for layer in config.sparse_layers:
            matrices = {}
            for name, (out, width) in shapes.items():
                symbols = rng.choice(num_levels + 1, (config.num_experts, out, width), p=p).astype(np.uint8)
                levels = np.sort(rng.standard_normal((config.num_experts, out, num_levels)), axis=-1)
                matrices[name] = CompressedExperts.from_symbols(symbols, levels, codec)
            writer.write_layer(layer, matrices)
        writer.finish({n: v for n, v in tiny_model.random_params(config).items() if "/mlp/expert/" not in n})
    return directory


def assert_same_weights(a, b):
    """Symbols, levels and dense parameters are bitwise the same, and the manifest says the same of the model."""
    a, b = open_checkpoint(a), open_checkpoint(b)
    assert a.config == b.config and a.provenance == b.provenance
    assert a.manifest["quantization"] == b.manifest["quantization"]
    for layer in a.config.sparse_layers:
        ((_, _, found),), ((_, _, expected),) = a.experts(layer), b.experts(layer)
        assert list(found) == list(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name].symbols(), expected[name].symbols())
            assert np.asarray(found[name].levels).tobytes() == np.asarray(expected[name].levels).tobytes()
    assert set(a.specs) == set(b.specs)
    for name in b.specs:
        assert a.read(name).tobytes() == b.read(name).tobytes()


def stored(path):
    """{layer and matrix: {array's name: bytes}} of all experts."""
    checkpoint = open_checkpoint(path)
    return {
        (layer, name): {n: a.tobytes() for n, a in matrix.stored().items()}
        for layer in checkpoint.config.sparse_layers
        for _, _, matrices in checkpoint.experts(layer)
        for name, matrix in matrices.items()
    }


def assert_fails(result, *names, code=1):
    found, _, errors = result
    assert found == code and "Traceback" not in errors
    (line,) = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    for name in names:
        assert str(name) in line


# --- Lossless --------------------------------------------------------------------------------------------------------


def test_there_and_back_is_the_identity(convert, tmp_path):
    original = write(tmp_path / "original", "dictionary")
    gap = convert(original, "gap", "gap")
    back = convert(gap, "back", "dictionary")
    assert open_checkpoint(gap).codec == "gap" and open_checkpoint(back).codec == "dictionary"
    assert_same_weights(gap, original)
    assert_same_weights(back, original)
    assert stored(back) == stored(original)
    assert stored(convert(gap, "again", "gap")) == stored(gap)


def test_three_levels_stay(convert, tmp_path):
    original = write(tmp_path / "original", "gap", num_levels=3)
    assert_same_weights(convert(original, "copy", "gap"), original)


def test_report_counts_the_bytes_of_both(run, tmp_path):
    original = write(tmp_path / "original", "dictionary")
    code, out, errors = run("convert", f"--checkpoint={original}", f"--output={tmp_path / 'gap'}", "--codec=gap")
    assert code == 0, errors
    report = json.loads((tmp_path / "gap" / "convert.json").read_text())
    for path, sizes in ((original, report["before"]), (tmp_path / "gap", report["after"])):
        arrays = stored(path)
        size = sum(len(a) for matrix in arrays.values() for a in matrix.values())
        config = tiny_model.CONFIG
        weights = len(arrays) * config.num_experts * config.d_ff * config.d_model
        dense = sum(2 * np.prod(spec.shape) for spec in open_checkpoint(path).specs.values())
        assert (sizes["codec"], sizes["bytes_experts"]) == (open_checkpoint(path).codec, size)
        assert sizes["bytes_model"] == size + dense
        assert sizes["bits_per_weight"] == pytest.approx(8 * size / weights)
        assert sizes["compression_experts"] == pytest.approx(2 * weights / size)
        assert f"{sizes['bits_per_weight']:.4f}" in out
    assert report["provenance"] == {"origin": "nowhere"}
    assert "converting: 100%" in errors


def test_what_compress_makes_evaluates_to_the_same_loss(run, convert, tiny, tmp_path):
    """With either codec, and converted; generate takes them too."""
    losses = {}
    for codec in ("dictionary", "gap"):
        where = (f"--checkpoint={tiny.checkpoint}", f"--output={tmp_path / codec}", f"--config.codec.name={codec}")
        code, _, errors = run("compress", *where, *tiny.flags(), *SMALL)
        assert code == 0, errors
        losses[codec] = json.loads((tmp_path / codec / "report.json").read_text())["loss"]
    assert losses["gap"] == losses["dictionary"]
    assert_same_weights(tmp_path / "gap", tmp_path / "dictionary")
    for path in (tmp_path / "gap", convert(tmp_path / "gap", "converted", "dictionary")):
        report = tmp_path / "evaluation.json"
        code, _, errors = run("evaluate", f"--checkpoint={path}", f"--report={report}", *tiny.flags(), *SMALL)
        assert code == 0, errors
        assert json.loads(report.read_text())["loss"] == pytest.approx(losses["gap"], abs=1e-6)
        prompt = ("--prompt=the cat <extra_id_0> on the mat", "--config.generation.max_length=8")
        code, out, errors = run("generate", f"--checkpoint={path}", *prompt, *tiny.flags())
        assert code == 0, errors
        assert "text: " in out


@pytest.mark.parametrize("method", ["gptq", pytest.param("rtn", marks=pytest.mark.long)])
def test_two_bits_are_saved_by_the_gap_codec(method, run, tiny, tmp_path):
    settings = ("--config.quantization.bits=2", f"--config.quantization.method={method}", "--config.codec.name=gap")
    where = (f"--checkpoint={tiny.checkpoint}", f"--output={tmp_path / 'two'}")
    code, _, errors = run("compress", *where, *settings, *tiny.flags(), *SMALL)
    assert code == 0, errors
    compressed = json.loads((tmp_path / "two" / "report.json").read_text())
    report = tmp_path / "evaluation.json"
    code, _, errors = run("evaluate", f"--checkpoint={tmp_path / 'two'}", f"--report={report}", *tiny.flags(), *SMALL)
    assert code == 0, errors
    assert json.loads(report.read_text())["loss"] == pytest.approx(compressed["loss"], abs=1e-6)
    assert 1 < compressed["bits_per_weight"] < 10 and compressed["compression_experts"] > 1.6
    assert open_checkpoint(tmp_path / "two").manifest["quantization"]["bits"] == 2


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_two_bits_are_not_saved_by_the_dictionary(run, tiny, tmp_path):
    where = (f"--checkpoint={tiny.checkpoint}", f"--output={tmp_path / 'out'}", "--config.codec.name=dictionary")
    result = run("compress", *where, "--config.save=true", "--config.quantization.bits=2", *tiny.flags(), *SMALL)
    assert_fails(result, "config.save", "can't be stored", "codec 'gap'")
    assert_fails(run("compress", *where, "--config.save=true", "--config.quantization.bits=2"), "codec 'gap'")
    assert not (tmp_path / "out").exists()


def test_three_levels_are_refused_by_the_dictionary_before_anything_is_replaced(run, tmp_path):
    original = write(tmp_path / "original", "gap", num_levels=3)
    kept = write(tmp_path / "kept", "gap")
    before = sorted(kept.rglob("*"))
    args = (f"--checkpoint={original}", f"--output={kept}", "--codec=dictionary", "--overwrite")
    assert_fails(run("convert", *args), original, "encoder/layers_0", "3 in a row", "gap")
    assert sorted(kept.rglob("*")) == before


def test_what_is_no_compressed_checkpoint(run, tiny, tmp_path):
    for path, names in ((tiny.checkpoint, ["is not compressed", "compress.py"]), (tmp_path / "nowhere", ["nowhere"])):
        assert_fails(run("convert", f"--checkpoint={path}", f"--output={tmp_path / 'out'}"), *names)
    assert not (tmp_path / "out").exists()


def test_unknown_codec(run, tmp_path):
    result = run("convert", f"--checkpoint={tmp_path}", f"--output={tmp_path / 'out'}", "--codec=zip")
    assert_fails(result, "'zip'", "dictionary, gap")


def test_output_that_is_in_use(run, tmp_path):
    original = write(tmp_path / "original", "dictionary")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    args = (f"--checkpoint={original}", "--codec=gap")
    assert_fails(run("convert", *args, f"--output={tmp_path / 'out'}"), "not empty", "--overwrite")
    assert_fails(run("convert", *args, f"--output={original}", "--overwrite"), "overlap")
    code, _, errors = run("convert", *args, f"--output={tmp_path / 'out'}", "--overwrite")
    assert code == 0, errors
    assert_same_weights(tmp_path / "out", original)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_changed_byte_in_a_later_layer_leaves_no_checkpoint(run, tmp_path):
    original = write(tmp_path / "original", "dictionary")
    damaged = shutil.copytree(original, tmp_path / "damaged")
    layer = damaged / "layers" / tiny_model.CONFIG.sparse_layers[-1].replace("/", ".")
    (file,) = layer.rglob("wo.codewords/0")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_fails(run("convert", f"--checkpoint={damaged}", f"--output={tmp_path / 'out'}", "--codec=gap"), layer)
    assert_fails(run("inspect_checkpoint", tmp_path / "out"), "interrupted")
    file.write_bytes(content)  # Now it goes on, to what it would have been.
    code, out, errors = run("convert", f"--checkpoint={damaged}", f"--output={tmp_path / 'out'}", "--codec=gap")
    assert code == 0, errors
    assert f"going on after {len(tiny_model.CONFIG.sparse_layers) - 1} of" in out
    whole = tmp_path / "whole"
    assert run("convert", f"--checkpoint={damaged}", f"--output={whole}", "--codec=gap")[0] == 0
    assert (whole / "SHA256SUMS").read_text() == (tmp_path / "out" / "SHA256SUMS").read_text()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(f.name for f in whole.iterdir())


# --- Other layouts ---------------------------------------------------------------------------------------------------


def assert_same_parameters(found, expected):
    """Bitwise, names and dtypes included."""
    found, expected = open_checkpoint(found), open_checkpoint(expected)
    assert dict(found.specs) == dict(expected.specs)
    for name in expected.specs:
        assert found.read(name).tobytes() == expected.read(name).tobytes(), name


def test_t5x_to_hugging_face_and_back(run, tiny, tmp_path):
    hf, back = tmp_path / "hf", tmp_path / "back"
    code, out, errors = run("convert", f"--checkpoint={tiny.checkpoint}", f"--output={hf}", "--format=huggingface")
    assert code == 0, errors
    assert "lost: T5X's capacity factor" in out and "converting: 100%" in errors
    assert sorted(f.name for f in hf.iterdir()) == ["SHA256SUMS", "config.json", "convert.json", "model.safetensors"]
    code, _, errors = run("convert", f"--checkpoint={hf}", f"--output={back}", "--format=t5x")
    assert code == 0, errors
    assert_same_parameters(back, tiny.checkpoint)
    for directory in (hf, back):  # The checksums are those of all files, in the form of sha256sum.
        lines = (directory / "SHA256SUMS").read_text().splitlines()
        named = {name: sha for sha, name in (line.split("  ") for line in lines)}
        files = {f.relative_to(directory).as_posix(): f for f in directory.rglob("*") if f.is_file()}
        assert set(files) - {"SHA256SUMS", "convert.json"} == set(named)
        assert all(hashlib.sha256(files[n].read_bytes()).hexdigest() == sha for n, sha in named.items())


@pytest.mark.parametrize("target", ["t5x", "huggingface"])
def test_compressed_experts_become_dense_ones(run, target, tmp_path):
    original, output = open_checkpoint(write(tmp_path / "original", "gap")), tmp_path / "out"
    code, _, errors = run("convert", f"--checkpoint={original.path}", f"--output={output}", f"--format={target}")
    assert code == 0, errors
    found = open_checkpoint(output)
    assert found.config == original.config
    expected = {name: original.read(name) for name in original.specs}
    for layer in original.config.sparse_layers:
        ((_, _, kernels),) = original.experts(layer)
        for matrix, kernel in kernels.items():
            expected[f"{layer}/mlp/expert/{matrix}/kernel"] = np.asarray(kernel.to_dense()).swapaxes(1, 2)
    assert set(expected) == set(found.specs)
    for name, value in expected.items():
        np.testing.assert_array_equal(found.read(name), value)
        assert found.specs[name].dtype.name == "bfloat16"


def test_the_other_experiments_take_hugging_faces_layout(run, tiny, tmp_path):
    hf, report = tmp_path / "hf", tmp_path / "report.json"
    run("convert", f"--checkpoint={tiny.checkpoint}", f"--output={hf}", "--format=huggingface")
    losses = []
    for path in (tiny.checkpoint, hf):
        code, _, errors = run("evaluate", f"--checkpoint={path}", f"--report={report}", *tiny.flags(), *SMALL)
        assert code == 0, errors
        losses.append(json.loads(report.read_text())["loss"])
    assert losses[0] == losses[1]
    code, _, errors = run("compress", f"--checkpoint={hf}", f"--output={tmp_path / 'c'}", *tiny.flags(), *SMALL)
    assert code == 0, errors
    assert open_checkpoint(tmp_path / "c").provenance["layout"] == "huggingface"


def test_what_a_tree_does_not_tell_is_given(run, tiny, tmp_path):
    for flag, reason in (("--top_k=2", "2 experts"), ("--experts_choose=1.0", "experts choose")):
        args = (f"--checkpoint={tiny.checkpoint}", f"--output={tmp_path / 'out'}", "--format=huggingface", flag)
        code, _, errors = run("convert", *args)
        assert code == 1 and "can't hold this model" in errors and reason in errors
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_and_writes_nothing(run, tiny, tmp_path):
    args = (f"--checkpoint={tiny.checkpoint}", f"--output={tmp_path / 'out'}", "--format=huggingface", "--dry_run")
    code, out, errors = run("convert", *args, "--shard_mb=0.05")
    assert code == 0, errors
    assert "target.encoder.encoder_norm.scale" in out and "model-00001-of-" in out
    total = sum(4 * np.prod(s.shape) for s in open_checkpoint(tiny.checkpoint).specs.values())
    assert str(total) in out
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_replaced_only_if_asked_and_ours(run, tiny, tmp_path):
    out = tmp_path / "out"
    args = (f"--checkpoint={tiny.checkpoint}", f"--output={out}", "--format=huggingface")
    assert run("convert", *args, "--shard_mb=0.05")[0] == 0
    (out / "notes.txt").write_text("mine")
    assert_fails(run("convert", *args), "not empty", "--overwrite")
    code, _, errors = run("convert", *args, "--overwrite")
    assert code == 0, errors
    assert sorted(f.suffix for f in out.iterdir()) == ["", ".json", ".json", ".safetensors", ".txt"]
    assert_same_parameters(out, tiny.checkpoint)
    assert_fails(run("convert", *args[:2], "--format=t5x", "--overwrite"), "huggingface checkpoint", "t5x")
    for name in ("SHA256SUMS", "convert.json"):
        (out / name).unlink()
    assert_fails(run("convert", *args, "--overwrite"), "doesn't replace")


@pytest.mark.parametrize(
    ("error", "message", "exit_code"),
    [(OSError("the disk went away"), "the disk went away", 1), (KeyboardInterrupt(), "interrupted", 130)],
    ids=["error", "ctrl-c"],
)
def test_a_conversion_that_was_stopped_goes_on(error, message, exit_code, run, tiny, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    args = (f"--checkpoint={tiny.checkpoint}", "--format=t5x")
    assert run("convert", *args, f"--output={whole}")[0] == 0
    read, calls = NativeCheckpoint.experts, []

    def fails_later(self, layer, *rest):
        calls.append(layer)
        if len(calls) == 3:
            raise error
        return read(self, layer, *rest)

    monkeypatch.setattr(NativeCheckpoint, "experts", fails_later)
    result = run("convert", *args, f"--output={out}")
    assert_fails(result, message, "3 of 4 parts are written; run the same command", code=exit_code)
    assert_fails(run("evaluate", f"--checkpoint={out}", *tiny.flags()), out, "never finished")
    assert_fails(run("convert", *args, f"--output={out}", "--dtype=bfloat16"), "unfinished conversion")
    code, text, errors = run("convert", *args, f"--output={out}")
    assert code == 0, errors
    assert "going on after 3 of 4 parts" in text
    assert calls == [*tiny_model.CONFIG.sparse_layers, tiny_model.CONFIG.sparse_layers[-1]]
    assert (out / "SHA256SUMS").read_text() == (whole / "SHA256SUMS").read_text()
    assert sorted(f.name for f in out.iterdir()) == ["SHA256SUMS", "checkpoint_3", "convert.json"]


@pytest.mark.parametrize("target", ["t5x", "huggingface"])
def test_a_conversion_that_lacks_its_report_gets_it_and_a_finished_one_says_so(
    target, run, tiny, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    args = ("convert", f"--checkpoint={tiny.checkpoint}", f"--output={out}", f"--format={target}")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(conversion, "write_report", stopped)
        assert_fails(run(*args), "interrupted", code=130)
    assert not (out / "convert.json").exists()
    written = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file() and f.name != conversion.PROGRESS}
    code, text, errors = run(*args)
    assert code == 0, errors
    assert (out / "convert.json").exists() and not (out / conversion.PROGRESS).exists()
    assert {f: f.stat().st_mtime_ns for f in written} == written
    report = (out / "convert.json").read_bytes()
    code, text, errors = run(*args)
    assert code == 0 and f"finished already: {target} checkpoint" in text
    assert (out / "convert.json").read_bytes() == report
    assert_fails(run(*args, "--dtype=bfloat16"), "not empty")


def test_a_conversion_is_not_continued_from_other_weights(run, tmp_path, monkeypatch):
    """The same names, shapes and norms: only samples of the weights tell."""
    params, model, out = tiny_model.random_params(), tmp_path / "model", tmp_path / "out"
    tiny_model.write_checkpoint(model, params)
    args = ("convert", f"--checkpoint={model}", f"--output={out}", "--format=t5x")
    first = f"{tiny_model.CONFIG.sparse_layers[0]}/mlp/expert/wi/kernel"
    with monkeypatch.context() as m:
        m.setattr("qmoe_jax.checkpoints.t5x.target.T5XWriter.finish", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*args)
    shutil.rmtree(model)
    tiny_model.write_checkpoint(model, params | {first: params[first] * 1.01})
    assert_fails(run(*args), "unfinished conversion of other weights", first)
    code, _, errors = run(*args, "--overwrite")
    assert code == 0, errors
    assert_same_parameters(out, model)


def test_to_the_published_layout(run, tmp_path):
    """Whose loader takes every file beside README.md for its own; a report there can be checked."""
    config = dataclasses.replace(tiny_model.CONFIG, encoder_sparse_layers=(1,))
    original, out = write(tmp_path / "original", "dictionary", config=config), tmp_path / "out"
    code, text, errors = run("convert", f"--checkpoint={original}", f"--output={out}", "--format=ista")
    assert code == 0, errors
    assert "lost: use on a GPU" in text
    files = {"README.md", "config.json", "exp00.pt", "exp01.pt", "noexp.pt", "sizes.pt"}
    assert {f.name for f in out.iterdir()} == files
    lines = re.findall(r"^([0-9a-f]{64})  (.+)$", (out / "README.md").read_text(), re.MULTILINE)
    assert {(hashlib.sha256((out / n).read_bytes()).hexdigest(), n) for n in files - {"README.md"}} == set(lines)
    again = ("convert", f"--checkpoint={original}", f"--output={out}", "--format=ista", "--overwrite")
    assert run(*again)[0] == 0
    back = tmp_path / "back"
    assert run("convert", f"--checkpoint={out}", f"--output={back}", "--codec=dictionary")[0] == 0
    assert stored(back) == stored(original)


# --- What is somebody else's -----------------------------------------------------------------------------------------


def test_overwrite_removes_nothing_that_no_conversion_wrote(run, tiny, tmp_path):
    """A list of checksums, or a README with lines like one, names files of somebody's: they stay."""
    output, thesis = tmp_path / "out", tmp_path / "out" / "thesis.txt"
    output.mkdir()
    thesis.write_text("years of work")
    line = f"{hashlib.sha256(thesis.read_bytes()).hexdigest()}  thesis.txt\n"
    (output / "SHA256SUMS").write_text(line)
    (output / "README.md").write_text(line)
    arguments = (f"--checkpoint={tiny.checkpoint}", f"--output={output}", "--format=huggingface", "--overwrite")
    code, _, errors = run("convert", *arguments)
    assert code == 0, errors
    assert thesis.read_text() == "years of work" and (output / "README.md").read_text() == line
    # What a conversion wrote, and somebody changed since, is named and stays.
    changed = output / "config.json"
    changed.write_text(changed.read_text() + " ")
    code, _, errors = run("convert", *arguments)
    assert code == 1 and "config.json has changed since a conversion wrote it" in errors
    assert changed.exists() and (output / "model.safetensors").exists()


@pytest.mark.parametrize("folder", ["layers", "dense", "layers/drawings"])
def test_overwrite_removes_no_folder_that_is_no_part_of_a_checkpoint(folder, run, tiny, tmp_path):
    work = tmp_path / "out" / folder / "work.txt"
    work.parent.mkdir(parents=True)
    work.write_text("years of work")
    code, _, errors = run("compress", *tiny.flags(), f"--checkpoint={tiny.checkpoint}", f"--output={tmp_path / 'out'}",
                          "--overwrite", *SMALL)  # fmt: skip
    assert code == 1 and "is no part of a compressed checkpoint, and would be removed" in errors
    assert work.read_text() == "years of work"


def test_a_refused_resume_leaves_the_report_that_is_there(run, tiny, tmp_path):
    output = tmp_path / "out"
    Progress(output, {"x": 1})
    (output / "report.json").write_text("{}")
    code, _, errors = run("compress", *tiny.flags(), f"--checkpoint={tiny.checkpoint}", f"--output={output}", *SMALL)
    assert code == 1 and "unfinished compression of something else" in errors
    assert (output / "report.json").read_text() == "{}"
