"""Compressed checkpoints: the round trip, shards, and what opens still."""

import itertools
import json
import pickle
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from compressed_models import (
    CONFIG,
    DENSE,
    LAYERS,
    assert_refused,
    edit_manifest,
    random_layers,
    read_everything,
    write,
)

import qmoe_jax
from qmoe_jax.checkpoints import CheckpointError, compressed, open_checkpoint
from qmoe_jax.codecs.experts import CompressedExperts

# --- Round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "num_levels"),
    [("dictionary", 2), pytest.param("gap", 2, marks=pytest.mark.long), ("gap", 3), ("nibbles", 15)],
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
        pytest.param(8, "dictionary", marks=pytest.mark.long),
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
