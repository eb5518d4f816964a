"""experiments/inspect_checkpoint.py: what it says of every layout, without reading weights."""

import hashlib
import json
import pathlib
import re

import pytest
import tiny_model
from models.hugging_face import with_multi_token_head
from test_convert import assert_fails, run, write  # noqa: F401, a fixture

from qmoe_jax.checkpoints import CheckpointError, checksums, inspection, open_checkpoint
from qmoe_jax.models.switch.config import PRESETS

EXPERTS = 3 * 2 * 8 * 20 * 28  # layers, matrices, experts, d_model, d_ff


def inspect(run, path, tmp_path, *args):  # noqa: F811
    code, out, errors = run("inspect_checkpoint", path, f"--report={tmp_path / 'report.json'}", *args)
    assert code == 0, errors
    return out, json.loads((tmp_path / "report.json").read_text())


def test_a_native_checkpoint(run, tiny, tmp_path):  # noqa: F811
    out, report = inspect(run, tiny.checkpoint, tmp_path)
    sizes = {name: value.size for name, value in tiny_model.random_params().items()}
    assert report["weights_sample"] is None
    other = tiny_model.write_checkpoint(tmp_path, {n: v + 1 for n, v in tiny_model.random_params().items()})
    told = [inspect(run, path, tmp_path, "--sample")[1]["weights_sample"] for path in (tiny.checkpoint, other)]
    assert all(re.fullmatch("[0-9a-f]{16}", sample) for sample in told) and told[0] != told[1]
    assert report["layout"] == "t5x" and report["preset"] is None and report["problems"] == report["foreign"] == []
    assert report["parameters"] == {
        "all": sum(sizes.values()),
        "experts": EXPERTS,
        "other": sum(sizes.values()) - EXPERTS,
    }
    assert report["dtypes"] == {"float32": sum(sizes.values())}
    kernel = report["chunks"]["encoder/layers_1/mlp/expert/wo/kernel"]
    assert (kernel["shape"], kernel["chunk"], kernel["number"]) == ([8, 28, 20], [8, 28, 20], 1)
    assert "8 in each sparse layer, relu, top-1" in out and f"{sum(sizes.values()):,}" in out


def test_a_compressed_checkpoint(run, tmp_path):  # noqa: F811
    path = write(tmp_path / "gap", "gap", zeros=0.75)
    out, report = inspect(run, path, tmp_path)
    assert report["layout"] == "compressed" and report["chunks"] == {}
    assert report["parameters"]["experts"] == report["dtypes"]["compressed, gap"] == EXPERTS
    for layer, found in report["experts"].items():
        ((_, _, kernels),) = open_checkpoint(path).experts(layer)
        assert found["bytes"] == sum(k.nbytes for k in kernels.values())
        assert found["bits_per_weight"] == pytest.approx(8 * found["bytes"] / (EXPERTS / 3))
        assert (found["codec"], found["density"]) == ("gap", None)
        assert layer in out
    accounts = {layer: {"zeros": 0.25} for layer in report["experts"]}
    (path / "report.json").write_text(json.dumps({"layers": accounts}))
    _, report = inspect(run, path, tmp_path)
    assert {e["density"] for e in report["experts"].values()} == {0.75}
    (path / "notes.txt").write_text("mine")
    _, report = inspect(run, path, tmp_path, "--density")
    assert report["foreign"] == ["notes.txt"]
    for found in report["experts"].values():
        assert found["density"] == pytest.approx(0.25, abs=0.02)


def test_other_layouts(run, tiny, tmp_path):  # noqa: F811
    run("convert", f"--checkpoint={tiny.checkpoint}", f"--output={tmp_path / 'hf'}", "--format=huggingface")
    _, report = inspect(run, tmp_path / "hf", tmp_path)
    assert (report["layout"], report["foreign"]) == ("huggingface", [])
    assert report["model"] == json.loads(json.dumps(tiny_model.CONFIG.to_dict()))


def test_published_files(run, fixture_path, tmp_path):  # noqa: F811
    _, report = inspect(run, fixture_path("ista_base_tiny") / "checkpoint", tmp_path)
    assert (report["layout"], report["on_disk"]["files"]) == ("ista", 7)
    assert report["dtypes"]["compressed, dictionary"] == 4 * 2 * 8 * 64 * 128


def test_what_is_left_out(run, fixture_path, tmp_path):  # noqa: F811
    source = fixture_path("deepseek_v3_tiny") / "checkpoint"
    folder, layer = with_multi_token_head(source, tmp_path / "model")
    out, report = inspect(run, folder, tmp_path)
    (names,) = report["left_out"].values()
    assert f"model.layers.{layer}.enorm.weight" in names
    assert f"left out          multi-token head: {', '.join(names)}" in out
    _, out, _ = run("convert", f"--checkpoint={folder}", f"--output={tmp_path / 'hf'}", "--format=huggingface")
    assert f"{folder}: left out: multi-token head: {', '.join(names)}" in out
    assert not open_checkpoint(tmp_path / "hf").left_out


def test_presets_are_recognised():
    for name, config in PRESETS.items():
        assert inspection.preset_of(config) == name
    assert inspection.preset_of(tiny_model.CONFIG) is None


def test_no_weights_are_read(tiny, tmp_path, monkeypatch):
    path = write(tmp_path / "gap", "gap")
    for checkpoint in (tiny.checkpoint, path):
        kind = type(open_checkpoint(checkpoint))
        monkeypatch.setattr(kind, "experts", lambda *_: pytest.fail("experts were read"))
        assert inspection.inspect(checkpoint)["parameters"]["experts"] == EXPERTS


def test_what_is_missing_is_listed(run, tiny, tmp_path):  # noqa: F811
    run("convert", f"--checkpoint={tiny.checkpoint}", f"--output={tmp_path}", "--format=huggingface")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"d_ff": 29, "num_experts": 4}))
    report = inspection.inspect(tmp_path)
    assert len(report["problems"]) == 3 and any("d_ff: 29" in line for line in report["problems"])
    assert_fails(run("inspect_checkpoint", tmp_path), "huggingface checkpoint that can't be opened")
    with pytest.raises(CheckpointError):
        inspection.inspect(tmp_path / "nothing")
    assert_fails(run("inspect_checkpoint"), "one path")


def test_checksums_are_written_once_and_verified_ever_after(run, tmp_path):  # noqa: F811
    path = pathlib.Path(tiny_model.write_checkpoint(tmp_path))
    code, out, _ = run("inspect_checkpoint", path, "--checksums")
    assert code == 0 and "files written" in out
    listed = dict(line.split("  ")[::-1] for line in (path / "SHA256SUMS").read_text().splitlines())
    for name, digest in listed.items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
    assert set(listed) == {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    code, out, _ = run("inspect_checkpoint", path, "--checksums")
    assert code == 0 and "files verified" in out
    digest = hashlib.sha256((path / "SHA256SUMS").read_bytes()).hexdigest()
    assert checksums.noted(open_checkpoint(path)) == {"sha256_of_checksums": digest}

    # zarr has no checksum: uncompressed, the weight would be another.
    chunk = path / "target.decoder.decoder_norm.scale" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    (path / "target.encoder.encoder_norm.scale" / "0").unlink()
    (path / "target.encoder.encoder_norm.scale" / "1").write_bytes(b"")
    code, _, errors = run("inspect_checkpoint", path, "--checksums")
    assert code == 1
    for what in ("changed: target.decoder.decoder_norm.scale/0", "missing: target.enc", "not listed: target.enc"):
        assert what in errors
