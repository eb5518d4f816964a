"""Compressed checkpoints: nothing broken or unfinished opens."""

import ctypes
import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from compressed_models import (
    DENSE,
    LAYERS,
    assert_refused,
    edit_manifest,
    read_everything,
    write,
    writer,
)

from qmoe_jax.checkpoints import TARGETS, CheckpointError, compressed, conversion, open_checkpoint
from qmoe_jax.codecs.experts import CompressedExperts

# --- Refused ---------------------------------------------------------------------------------------------------------


def test_no_manifest(copy):
    (copy / "manifest.json").unlink()
    assert_refused(copy, str(copy), "no manifest.json", "interrupted")


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        ({"format_version": 3}, "version 3"),
        ({"format_version": None}, "version None"),
        ({"format": "safetensors"}, "'safetensors'"),
    ],
)
def test_foreign_format_or_version(copy, edit, found):
    edit_manifest(copy, lambda m: m.update(edit))
    assert_refused(copy, "manifest.json", found, "'qmoe_jax', 1 to 2")


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_manifest(copy, share):
    file = copy / "manifest.json"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert_refused(copy, "manifest.json")


@pytest.mark.parametrize("content", [b"[]", b'"a string"', b"\xff\xfe\x00", b"null", b'{"format": "qmoe_jax"}'])
def test_manifest_of_something_else(copy, content):
    (copy / "manifest.json").write_bytes(content)
    assert_refused(copy, "manifest.json")


@pytest.mark.parametrize("edit", ["model", "codec", "dense", "layers", "provenance"])
def test_manifest_without_a_field(copy, edit):
    edit_manifest(copy, lambda m: m.pop(edit))
    assert_refused(copy, "manifest.json", edit)


def test_manifest_with_a_changed_value(copy):
    edit_manifest(copy, lambda m: m["model"].update(num_heads=4), sign=False)
    assert_refused(copy, "manifest.json", "SHA-256")


@pytest.mark.parametrize("part", ["dense", "layers/encoder.layers_1", "layers"])
def test_missing_part(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(CheckpointError, match=f"missing .*{part}"):  # Opening is enough.
        open_checkpoint(copy)


def test_layer_that_the_manifest_forgets(copy):
    edit_manifest(copy, lambda m: m["layers"].pop("decoder/layers_1"))
    with pytest.raises(CheckpointError, match="missing decoder/layers_1"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("which", "part"),
    [("original", "dense"), ("original", "layers/encoder.layers_0"), ("gap_original", "layers/encoder.layers_0")],
)
def test_a_changed_byte_in_any_file(which, part, request, tmp_path):
    copy = shutil.copytree(request.getfixturevalue(which), tmp_path / "copy")
    files = sorted(p for p in (copy / part).rglob("*") if p.is_file() and p.stat().st_size)
    assert len(files) > 5
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        assert_refused(copy, str(copy / part), "changed")
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    read_everything(copy)


def test_a_changed_byte_anywhere_in_the_manifest(copy):
    file = copy / "manifest.json"
    content = file.read_bytes()
    # Letters and digits; white space means nothing.
    places = [i for i, c in enumerate(content) if chr(c).isalnum()]
    for i in places[:: len(places) // 60]:
        file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(CheckpointError, match="manifest"):
            open_checkpoint(copy)


@pytest.mark.parametrize("change", ["removed", "added", "renamed"])
def test_files_that_come_or_go(copy, change):
    part = copy / "layers" / "decoder.layers_1" / "0-of-1"
    chunk = part / "wo.codewords" / "0"
    if change == "added":
        shutil.copy(chunk, chunk.with_name("1"))
    elif change == "removed":
        chunk.unlink()
    else:
        (part / "wo.codewords").rename(part / "wx.codewords")
    assert_refused(copy, str(part), "changed")


def resave(copy, layer, change):
    """Replaces a layer's arrays by changed ones, with hashes that fit."""
    part = copy / "layers" / layer.replace("/", ".") / "0-of-1"
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        restored = checkpointer.restore(part)
        tree = jax.tree.map(np.array, restored)
        shutil.rmtree(part)
        change(tree)
        checkpointer.save(part, tree)
    edit_manifest(copy, lambda m: m["layers"][layer]["shards"][0].update(sha256=compressed.sha256(part)))


def negative_level(tree):
    tree["wi"]["levels"][2, 3] = (1, -1)


def not_a_number(tree):
    tree["wi"]["levels"][2, 3] = np.nan


def lost_codewords(tree):
    tree["wi"]["codewords"] = tree["wi"]["codewords"][:-5]


def offsets_out_of_order(tree):
    tree["wi"]["row_offsets"][2, 3] = 10_000


@pytest.mark.parametrize("change", [negative_level, not_a_number, lost_codewords, offsets_out_of_order])
def test_malformed_streams_whose_hash_fits(copy, change):
    resave(copy, "encoder/layers_1", change)
    assert_refused(copy, "encoder/layers_1/mlp/expert/wi", "expert")


def lost_words(tree):
    tree["wi"]["words"] = tree["wi"]["words"][:-5]


def changed_bits(tree):
    tree["wi"]["words"][::2] ^= 0x00FFFF00


def another_parameter(tree):
    tree["wi"]["parameters"][2] += 1


def early_block(tree):
    tree["wi"]["block_starts"][2, 0] = 3


@pytest.mark.parametrize("change", [lost_words, changed_bits, another_parameter, early_block])
def test_malformed_streams_of_the_gap_codec_whose_hash_fits(change, gap_original, tmp_path):
    copy = shutil.copytree(gap_original, tmp_path / "copy")
    resave(copy, "encoder/layers_1", change)
    assert_refused(copy, "encoder/layers_1/mlp/expert/wi", "found" if change is lost_words else "expert")


def test_arrays_that_lack_whose_hash_fits(copy, gap_original, tmp_path):
    resave(copy, "encoder/layers_1", lambda tree: tree["wi"].pop("levels"))
    assert_refused(copy, "encoder/layers_1/mlp/expert/wi", "levels")
    copy = shutil.copytree(gap_original, tmp_path / "gap")
    resave(copy, "encoder/layers_1", lambda tree: tree["wi"].pop("level_words"))
    assert_refused(copy, "encoder/layers_1/mlp/expert/wi", "level_words")


def test_a_manifest_that_names_another_codec(copy):
    edit_manifest(copy, lambda m: m["codec"].update(name="gap"))
    assert_refused(copy, "encoder/layers_0/mlp/expert/wi", "gap codec: found arrays", "row_offsets")
    edit_manifest(copy, lambda m: m["codec"].update(name="zip"))
    assert_refused(copy, "'zip'", "Known codecs")


# --- Interrupted -----------------------------------------------------------------------------------------------------


def test_an_exception_between_layers_leaves_other_files_only(tmp_path, experts):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt), writer(tmp_path) as w:
        w.write_layer(LAYERS[0], {m: e for m, (_, _, e) in experts[LAYERS[0]].items()})
        assert (tmp_path / "layers").exists()
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_checkpoint_lacking_a_layer_is_not_finished(tmp_path, experts):
    with pytest.raises(CheckpointError, match="decoder/layers_1"):
        write(tmp_path, {layer: experts[layer] for layer in LAYERS[:-1]})
    assert not any(tmp_path.iterdir())


KILLED = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[2])
import compressed_models as t

def stop(*args):
    print("ready", flush=True)
    import time; time.sleep(60)

experts = {
    layer: {"wi": t.random_experts(t.CONFIG.d_ff, t.CONFIG.d_model, 0),
            "wo": t.random_experts(t.CONFIG.d_model, t.CONFIG.d_ff, 1)} for layer in t.LAYERS
}
if sys.argv[3] == "manifest":
    os.replace = stop
else:
    t.CompressedWriter.finish = stop
t.write(pathlib.Path(sys.argv[1]), experts)
"""


@pytest.mark.parametrize("when", ["layers", "manifest"])
def test_a_kill_leaves_no_checkpoint(when, tmp_path, experts):
    tests = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), str(pathlib.Path(__file__).parent), when]
    environment = os.environ | {"PYTHONPATH": str(tests), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout.readline() == "ready\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert (tmp_path / "out" / "layers").is_dir()
    assert_refused(tmp_path / "out", str(tmp_path / "out"), "no manifest.json")
    write(tmp_path / "out", experts)
    read_everything(tmp_path / "out")
    assert not [p for p in (tmp_path / "out").iterdir() if "tmp" in p.name]


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_at_the_manifest(call, tmp_path, experts, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with monkeypatch.context() as m:
        m.setattr(f"qmoe_jax.files.os.{call}", no_space)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, experts)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if not sys.platform.startswith("linux") or libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, b"size=1m"):
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    libc.umount2(os.fsencode(disk), 2)


# Orbax leaves an unawaited callback behind when an array cannot be written, and at times a thread.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("part", ["layer", "dense"])
def test_a_full_disk_at_a_part(part, small_disk, experts):
    random = np.random.default_rng(0).standard_normal
    matrices = {m: e for m, (_, _, e) in experts[LAYERS[0]].items()}
    if part == "layer":
        trits = np.random.default_rng(0).integers(0, 3, (8, 1024, 1024)).astype(np.uint8)
        matrices["wi"] = CompressedExperts.from_symbols(trits, np.sort(random((8, 1024, 2))), codec="dictionary")
    out = small_disk / "out"
    with pytest.raises(
        CheckpointError, match=r"out/(dense|layers/encoder\.layers_0/0-of-1): cannot be written: .*No space"
    ):
        with writer(out) as w:
            w.write_layer(LAYERS[0], matrices)
            for layer in LAYERS[1:]:
                w.write_layer(layer, {m: e for m, (_, _, e) in experts[layer].items()})
            w.finish(DENSE | {"a": random((1000, 1000)).astype(np.float32)})
    assert not any(out.iterdir())


def test_a_compressed_model_goes_back_to_t5x_dequantized(original, experts, tmp_path):
    writer = TARGETS["t5x"](open_checkpoint(original), tmp_path, conversion.Options("float32"))
    conversion.run(writer, tmp_path, "")
    native = open_checkpoint(tmp_path)
    assert native.config == open_checkpoint(original).config
    for layer, matrices in experts.items():
        for matrix, (trits, levels, _) in matrices.items():
            by_symbol = np.concatenate([np.zeros_like(levels[..., :1]), levels], axis=-1)  # [experts, out, 3]
            expected = np.take_along_axis(by_symbol.astype(np.float32), trits, axis=2)  # [experts, out, in]
            found = native.read(f"{layer}/mlp/expert/{matrix}/kernel")  # [experts, in, out]
            np.testing.assert_array_equal(found, expected.swapaxes(1, 2))
    for name, value in DENSE.items():
        np.testing.assert_array_equal(native.read(name), np.asarray(value, ml_dtypes.bfloat16).astype(np.float32))
