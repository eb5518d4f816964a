"""Compressed checkpoints: the round trip, and that nothing broken or unfinished opens."""

import ctypes
import errno
import itertools
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_model

import qmoe_jax
from qmoe_jax.checkpoints import TARGETS, CheckpointError, CompressedWriter, compressed, conversion, open_checkpoint
from qmoe_jax.codecs.experts import CompressedExperts

CONFIG = tiny_model.CONFIG
LAYERS = CONFIG.sparse_layers
DENSE = {n: v for n, v in tiny_model.random_params(CONFIG).items() if "/mlp/expert/" not in n}


def random_experts(out, in_, seed, codec="dictionary", num_levels=2):
    """Symbols, levels (bfloat16), and both compressed."""
    rng = np.random.default_rng(seed)
    p = [0.8] + [0.2 / num_levels] * num_levels
    symbols = rng.choice(num_levels + 1, (CONFIG.num_experts, out, in_), p=p).astype(np.uint8)
    levels = rng.standard_normal((CONFIG.num_experts, out, num_levels)).astype(ml_dtypes.bfloat16)
    levels = np.sort(levels, axis=-1)
    return symbols, levels, CompressedExperts.from_symbols(symbols, levels, codec)


def random_layers(*codec_and_levels):
    """{layer: {matrix: (symbols, levels, CompressedExperts)}}"""
    shapes = {"wi": (CONFIG.d_ff, CONFIG.d_model), "wo": (CONFIG.d_model, CONFIG.d_ff)}
    return {
        layer: {m: random_experts(*shape, 10 * i + j, *codec_and_levels) for j, (m, shape) in enumerate(shapes.items())}
        for i, layer in enumerate(LAYERS)
    }


@pytest.fixture(scope="module")
def experts():
    return random_layers()


def writer(directory, codec="dictionary", num_shards=None):
    return CompressedWriter(directory, CONFIG, {"bits": 1.5}, codec, {"checkpoint": "somewhere"}, num_shards)


def write(directory, experts, num_shards=None):
    (codec,) = {e.codec for matrices in experts.values() for _, _, e in matrices.values()}
    with writer(directory, codec, num_shards) as w:
        for layer, matrices in experts.items():
            w.write_layer(layer, {m: e for m, (_, _, e) in matrices.items()})
        w.finish(DENSE)
    return directory


@pytest.fixture(scope="module")
def original(experts, tmp_path_factory):
    return write(tmp_path_factory.mktemp("original") / "out", experts)


@pytest.fixture(scope="module")
def gap_original(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gap") / "out", random_layers("gap"))


@pytest.fixture
def copy(original, tmp_path):
    """A copy to damage; elsewhere than where it was written."""
    return shutil.copytree(original, tmp_path / "elsewhere" / "copy")


def read_everything(path):
    checkpoint = open_checkpoint(path)
    for name in checkpoint.specs:
        checkpoint.read(name)
    for layer in checkpoint.config.sparse_layers:
        for _ in checkpoint.experts(layer):
            pass


def assert_refused(path, *names):
    """Reading the checkpoint fails with one error that says where."""
    with pytest.raises(CheckpointError) as e:
        read_everything(path)
    for name in names:
        assert name in str(e.value), str(e.value)


def edit_manifest(path, edit, sign=True):
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    if sign:
        manifest["sha256"] = compressed.manifest_sha256(manifest)
    file.write_text(json.dumps(manifest))


# --- Round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "num_levels"), [("dictionary", 2), pytest.param("gap", 2, marks=pytest.mark.long), ("gap", 3)]
)
def test_what_is_read_is_what_was_written(codec, num_levels, tmp_path):
    experts = random_layers(codec, num_levels)
    write(tmp_path / "out", experts)
    checkpoint = open_checkpoint((tmp_path / "out").rename(tmp_path / "moved"))
    assert checkpoint.config == CONFIG
    assert checkpoint.provenance == {"checkpoint": "somewhere"}
    for layer, matrices in experts.items():
        ((start, stop, found),) = checkpoint.experts(layer)
        assert (start, stop, sorted(found)) == (0, CONFIG.num_experts, ["wi", "wo"])
        for matrix, (symbols, levels, written) in matrices.items():
            assert found[matrix].nbytes == written.nbytes
            assert jax.tree.structure(found[matrix]) == jax.tree.structure(written)
            for a, b in zip(jax.tree.leaves(found[matrix]), jax.tree.leaves(written), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            np.testing.assert_array_equal(found[matrix].symbols(), symbols)
            dense = np.take_along_axis(
                np.concatenate([np.zeros_like(levels[..., :1]), levels], -1).astype(np.float32),
                symbols.astype(np.int64),
                axis=-1,
            )
            np.testing.assert_array_equal(found[matrix].to_dense(), dense)
    assert set(checkpoint.specs) == set(DENSE)
    for name, value in DENSE.items():
        found = checkpoint.read(name)
        assert found.dtype == checkpoint.specs[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found, value.astype(ml_dtypes.bfloat16))
        np.testing.assert_array_equal(checkpoint.read(name, (slice(1, 3),)), found[1:3])


def test_a_layer_is_read_without_the_others(copy, experts):
    shutil.rmtree(copy / "layers" / "encoder.layers_1" / "0-of-1" / "wi.codewords")
    checkpoint = open_checkpoint(copy)
    for layer in ("encoder/layers_0", "decoder/layers_1"):
        assert len(list(checkpoint.experts(layer))) == 1
    with pytest.raises(CheckpointError, match="encoder.layers_1"):
        list(checkpoint.experts("encoder/layers_1"))


def test_the_public_loader_opens_it_and_the_model_runs(copy):
    model, params = qmoe_jax.load(copy)
    assert isinstance(params["encoder"]["layers_0"]["mlp"]["expert"]["wi"]["kernel"], CompressedExperts)
    tokens = np.arange(2, 12)[None]
    assert np.isfinite(qmoe_jax.forward(model, params, tokens, tokens)).all()


def test_the_manifest_accounts_for_bytes_and_hashes(copy, experts):
    manifest = json.loads((copy / "manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"]) == ("qmoe_jax", 2)
    assert manifest["family"] == "switch"
    assert set(manifest["layers"]) == set(LAYERS)
    for layer, part in manifest["layers"].items():
        assert part["bytes"] == sum(e.nbytes for _, _, e in experts[layer].values())
        (shard,) = part["shards"]
        files = [p for p in (copy / shard["directory"]).rglob("*") if p.is_file()]
        assert shard["bytes_on_disk"] == sum(p.stat().st_size for p in files)
        assert len(shard["sha256"]) == 64
    assert manifest["dense"]["bytes"] == 2 * sum(v.size for v in DENSE.values())
    assert manifest["quantization"] == {"bits": 1.5} and manifest["codec"] == {"name": "dictionary"}


def test_files_are_json_and_zarr(copy):
    for file in (p for p in copy.rglob("*") if p.is_file()):
        if file.name in ("manifest.json", ".zarray", "_METADATA", "_CHECKPOINT_METADATA"):
            json.loads(file.read_text())
        else:  # Chunks of zarr arrays are called 0, 0.1, ...; the other is Orbax's note that it is complete.
            assert file.name.replace(".", "").isdigit() or file.name == "commit_success.txt", file


def test_nothing_is_unpickled(copy, monkeypatch):
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    read_everything(copy)


def test_writing_again_replaces_what_was_there(copy, experts):
    (copy / "notes.txt").write_text("mine")
    (copy / "layers" / "encoder.layers_9").mkdir()
    write(copy, dict(reversed(experts.items())))
    read_everything(copy)
    assert not (copy / "layers" / "encoder.layers_9").exists()
    assert (copy / "notes.txt").read_text() == "mine"


# --- Shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_shards", "codec"),
    [
        pytest.param(3, "dictionary", marks=pytest.mark.long),
        (3, "gap"),
        (8, "dictionary"),
        pytest.param(8, "gap", marks=pytest.mark.long),
    ],
)
def test_shards_hold_consecutive_experts_and_are_read_alone(num_shards, codec, tmp_path):
    experts = random_layers(codec)
    write(tmp_path / "whole", experts)
    write(tmp_path / "out", experts, num_shards)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.expert_sizes == open_checkpoint(tmp_path / "whole").expert_sizes
    bounds = [0, 2, 5, 8] if num_shards == 3 else list(range(9))
    for layer, matrices in experts.items():
        names = [f"{i}-of-{num_shards}" for i in range(num_shards)]
        assert sorted(p.name for p in (tmp_path / "out/layers" / layer.replace("/", ".")).iterdir()) == names
        groups = [(start, stop) for start, stop, _ in checkpoint.experts(layer, 4)]
        assert groups == list(itertools.pairwise(bounds))
        for start, stop in [(0, 8), (3, 4), (1, 7)]:  # as for any number of readers
            found = checkpoint.read_experts(layer, start, stop)
            for matrix, (symbols, levels, _) in matrices.items():
                np.testing.assert_array_equal(found[matrix].symbols(), symbols[start:stop])
                np.testing.assert_array_equal(np.asarray(found[matrix].levels), levels[start:stop])
    # The others aren't touched.
    shutil.rmtree(tmp_path / "out/layers/encoder.layers_0" / f"0-of-{num_shards}" / "wo.levels", ignore_errors=True)
    shutil.rmtree(tmp_path / "out/layers/encoder.layers_0" / f"0-of-{num_shards}" / "wo.parameters", ignore_errors=True)
    checkpoint.read_experts("encoder/layers_0", 3, 8)
    wanted = [(layer, a, b) for layer, a, b, _ in checkpoint.stream(LAYERS[:1], 4, experts=range(3, 5))]
    assert wanted and all(a >= 2 for _, a, _ in wanted)
    assert_refused(tmp_path / "out", f"encoder.layers_0/0-of-{num_shards}", "changed")


@pytest.mark.parametrize("num_shards", [0, 9])
def test_more_shards_than_experts_are_refused(num_shards, tmp_path, experts):
    with pytest.raises(ValueError, match=f"num_shards: found {num_shards}, expected 1 to 8"):
        write(tmp_path / "out", experts, num_shards)
    assert not (tmp_path / "out").exists()


def test_shards_are_of_useful_size_by_default():
    assert compressed.default_shards(8, 10**6) == 1
    assert compressed.default_shards(128, 128 * 2 * 768 * 3072) == 1
    assert compressed.default_shards(2048, 2048 * 2 * 2080 * 6144) == 32
    assert compressed.default_shards(2, 10**12) == 2


def test_the_same_contents_are_the_same_files(experts, original, tmp_path):
    write(tmp_path / "somewhere" / "else", experts)
    files = [p.relative_to(original) for p in sorted(original.rglob("*")) if p.is_file()]
    for file in files:
        assert (tmp_path / "somewhere" / "else" / file).read_bytes() == (original / file).read_bytes(), file


def test_version_1_is_read(copy, experts):
    def to_version_1(manifest):
        manifest["format_version"] = 1
        for layer in manifest["layers"].values():
            (shard,) = layer.pop("shards")
            layer.update({k: shard[k] for k in ("directory", "sha256", "bytes_on_disk")})

    edit_manifest(copy, to_version_1)
    checkpoint = open_checkpoint(copy)
    ((_, _, found),) = checkpoint.experts(LAYERS[0])
    for matrix, (symbols, _, _) in experts[LAYERS[0]].items():
        np.testing.assert_array_equal(found[matrix].symbols(), symbols)


def test_a_manifest_from_before_there_were_families_is_read(copy):
    edit_manifest(copy, lambda m: m.pop("family"))
    read_everything(copy)
    assert open_checkpoint(copy).config == CONFIG


def test_an_unknown_family_is_refused(copy):
    edit_manifest(copy, lambda m: m.update(family="hydra"))
    assert_refused(copy, "manifest.json", "family 'hydra'", "'switch'")


def test_shards_that_lack_experts(copy):
    edit_manifest(copy, lambda m: m["layers"][LAYERS[0]]["shards"][0].update(stop=7))
    assert_refused(copy, "manifest", "don't hold each expert once")


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
import test_compressed as t

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
