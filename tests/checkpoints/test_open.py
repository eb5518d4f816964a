"""Which layout a path has, and what every layout offers."""

import dataclasses

import numpy as np
import pytest
import tiny_model
from compressed_models import CONFIG, LAYERS, random_experts, write

import qmoe_jax
from qmoe_jax.checkpoints import (
    CheckpointError,
    CompressedCheckpoint,
    CompressedWriter,
    NativeCheckpoint,
    open_checkpoint,
)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    shapes = {"wi": (CONFIG.d_ff, CONFIG.d_model), "wo": (CONFIG.d_model, CONFIG.d_ff)}
    experts = {layer: {m: random_experts(*shape, seed=0) for m, shape in shapes.items()} for layer in LAYERS}
    return write(tmp_path_factory.mktemp("compressed") / "out", experts)


def test_t5x_step_directory_and_parent(tiny):
    for path in (tiny.checkpoint, tiny.checkpoint.rpartition("/")[0]):
        checkpoint = open_checkpoint(path)
        assert isinstance(checkpoint, NativeCheckpoint)
        assert checkpoint.config == CONFIG
        assert checkpoint.provenance["step"] == 3


def test_compressed(compressed):
    assert isinstance(open_checkpoint(compressed), CompressedCheckpoint)
    assert isinstance(open_checkpoint(str(compressed) + "/"), CompressedCheckpoint)


def test_what_the_tree_does_not_tell_is_overridden_in_both(tiny, compressed):
    for path in (tiny.checkpoint, compressed):
        assert open_checkpoint(path, top_k=2).config == dataclasses.replace(CONFIG, top_k=2)
        with pytest.raises(ValueError, match="no_such_field"):
            open_checkpoint(path, no_such_field=1)


def test_a_compressed_checkpoint_remembers_top_k(tmp_path):
    config = dataclasses.replace(CONFIG, top_k=2, encoder_sparse_layers=(), decoder_sparse_layers=())
    with CompressedWriter(tmp_path, config, {}, "dictionary", {}) as w:
        w.finish(tiny_model.random_params(config))
    assert open_checkpoint(tmp_path).config == config


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match=f"{path}.*found nothing"):
            open_checkpoint(path)


def test_something_else_there(tmp_path):
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not the msgpack file of a T5X checkpoint"):
        open_checkpoint(tmp_path / "README.md")


def test_compression_that_was_interrupted(compressed, tmp_path):
    (tmp_path / "layers" / "encoder.layers_0.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no manifest\.json: writing it was interrupted"):
        open_checkpoint(tmp_path)


def test_a_t5x_checkpoint_beside_a_folder_called_layers(tmp_path):
    path = tiny_model.write_checkpoint(tmp_path)
    (tmp_path / "layers").mkdir()
    assert isinstance(open_checkpoint(path), NativeCheckpoint)


def test_experts_come_in_groups(tiny):
    checkpoint = open_checkpoint(tiny.checkpoint)
    everything = checkpoint.read("decoder/layers_1/mlp/expert/wi/kernel")
    for size, expected in ((None, [(0, 8)]), (3, [(0, 3), (3, 6), (6, 8)]), (100, [(0, 8)])):
        groups = list(checkpoint.experts("decoder/layers_1", size))
        assert [group[:2] for group in groups] == expected
        for start, stop, kernels in groups:
            np.testing.assert_array_equal(kernels["wi"], everything[start:stop])
            assert sorted(kernels) == ["wi", "wo"]


@pytest.mark.parametrize("size", [0, -1])
def test_groups_without_experts_are_refused(size, tiny):
    with pytest.raises(ValueError, match="group_size"):
        list(open_checkpoint(tiny.checkpoint).experts("decoder/layers_1", size))


def test_params_below_a_prefix_leave_out_experts(tiny, compressed):
    for path in (tiny.checkpoint, compressed):
        params = open_checkpoint(path).params("encoder/layers_0/")
        assert set(params) == {"attention", "mlp", "pre_attention_layer_norm", "pre_mlp_layer_norm"}
        assert set(params["mlp"]) == {"router"}


def test_the_whole_tree_is_that_of_the_checkpoint(tiny):
    _, params = qmoe_jax.load(tiny.checkpoint)
    kernel = params["encoder"]["layers_1"]["mlp"]["expert"]["wo"]["kernel"]
    np.testing.assert_array_equal(kernel, tiny_model.random_params()["encoder/layers_1/mlp/expert/wo/kernel"])
