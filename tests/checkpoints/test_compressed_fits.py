"""A compressed checkpoint's arrays and manifest, held against the architecture and each other when it is opened."""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from compressed_models import assert_refused, edit_manifest

import qmoe_jax
from qmoe_jax.checkpoints import CheckpointError, compressed, open_checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 1}, "wrong shape: decoder/relpos_bias/rel_embedding"),
        ({"vocab_size": 255}, "wrong shape: token_embedder/embedding"),
        ({"num_decoder_layers": 3}, "missing: decoder/layers_2/"),
        ({"d_model": 24}, "wrong shape: "),
    ],
)
def test_another_architecture_than_the_arrays(copy, change, message):
    with pytest.raises(CheckpointError, match=message):
        qmoe_jax.load(copy, **change)
    edit_manifest(copy, lambda m: m["model"].update(change))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


def resave_dense(path, change):
    """Replaces the dense part by a changed one, with a hash that fits."""
    part = path / "dense"
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        tree = jax.tree.map(np.array, checkpointer.restore(part))
        shutil.rmtree(part)
        change(tree)
        checkpointer.save(part, tree)
    edit_manifest(path, lambda m: m["dense"].update(sha256=compressed.sha256(part)))


def whole_numbers(tree):
    tree["token_embedder"]["embedding"] = tree["token_embedder"]["embedding"].astype(np.int32)


def narrow_router(tree):
    router = tree["encoder"]["layers_0"]["mlp"]["router"]["router_weights"]["w"]
    router["kernel"] = router["kernel"][:, :-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (whole_numbers, "wrong dtype: token_embedder/embedding, found int32"),
        (narrow_router, r"wrong shape: encoder/layers_0/mlp/router.*found \[20, 7\], expected \[20, 8\]"),
        (lambda tree: tree["decoder"].pop("decoder_norm"), "missing: decoder/decoder_norm/scale"),
        (lambda tree: tree.update(extra=np.zeros(3, np.float32)), r"unknown: extra \[3\]"),
    ],
)
def test_a_dense_part_of_another_model(copy, change, message):
    resave_dense(copy, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


def test_all_problems_of_a_manifest_are_told_at_once(copy):
    def edit(manifest):
        manifest["codec"] = "dictionary"
        manifest["layers"]["encoder/layers_0"]["matrices"]["wi"]["shape"] = [8, 28.0, 20]
        manifest["dense"]["directory"] = "../dense"
        del manifest["provenance"]

    edit_manifest(copy, edit)
    assert_refused(copy, "codec: found", "['wi'].shape: found", "dense.directory: found", "provenance: missing")
