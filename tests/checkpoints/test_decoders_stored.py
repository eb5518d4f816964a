"""Hugging Face's checkpoints of every decoder-only family: opened, streamed, compressed, and written again."""

import jax.numpy as jnp
import numpy as np
import pytest

import qmoe_jax
from qmoe_jax import streaming
from qmoe_jax.checkpoints import TARGETS, CheckpointError, conversion, open_checkpoint
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.models.families import mismatches
from qmoe_jax.quantization.settings import QuantizationSettings

FIXTURES = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v3_fp8", "gpt_oss", "gpt_oss_mxfp4"]


@pytest.fixture(scope="module", params=FIXTURES)
def case(request, fixture_path):
    path = fixture_path(f"{request.param}_tiny")
    return open_checkpoint(path / "checkpoint"), np.load(path / "io.npz")


def real(io):
    return np.arange(io["input_ids"].shape[1]) < io["lengths"][:, None]


def convert(checkpoint, output, target, **options):
    conversion.run(TARGETS[target](checkpoint, output, conversion.Options(**options)), output, "")
    return open_checkpoint(output)


def test_logits_are_those_of_transformers(case):
    checkpoint, io = case
    model = checkpoint.family.model(checkpoint.config, jnp.float32, None)
    logits = np.asarray(qmoe_jax.forward(model, checkpoint.load(), io["input_ids"]))
    np.testing.assert_allclose(logits[real(io)], io["logits"][real(io)], atol=2e-4, rtol=0)


def test_experts_come_in_groups(case):
    checkpoint, _ = case
    layers = checkpoint.config.sparse_layers
    for layer, start, stop, kernels in checkpoint.stream(layers, 3):
        for matrix, name in checkpoint.matrices(layer).items():
            np.testing.assert_array_equal(kernels[matrix], checkpoint.read(name)[start:stop])


@pytest.mark.parametrize("shard_bytes", [20_000, 1 << 30])
def test_written_again_it_is_the_same(case, shard_bytes, tmp_path):
    checkpoint, _ = case
    found = convert(checkpoint, tmp_path, "huggingface", shard_bytes=shard_bytes)
    assert mismatches(found.config, checkpoint.config) == []
    assert set(found.specs) == set(checkpoint.specs)
    for name, spec in checkpoint.specs.items():
        assert found.specs[name] == spec, name
        np.testing.assert_array_equal(found.read(name), checkpoint.read(name), err_msg=name)


def test_compressed_it_gives_the_loss_of_its_dequantized_weights(case, tmp_path):
    checkpoint, io = case
    examples = [(ids[:n],) for ids, n in zip(io["input_ids"].astype(np.int32), io["lengths"], strict=True)]
    settings = QuantizationSettings(method="rtn")
    report = compress_examples(
        checkpoint, None, None, examples, settings, streaming.Settings(experts_per_group=3), output=tmp_path / "out"
    )
    compressed = open_checkpoint(tmp_path / "out")
    assert compressed.family.name == checkpoint.family.name and compressed.config == checkpoint.config
    losses = streaming.run(compressed, examples, streaming.Settings()).summary()
    assert losses["loss"] == pytest.approx(report["loss"], abs=1e-5)
    dense = convert(compressed, tmp_path / "dense", "huggingface")
    assert streaming.run(dense, examples, streaming.Settings()).summary()["loss"] == pytest.approx(
        losses["loss"], abs=1e-5
    )


def test_layouts_without_it_refuse_it(case, tmp_path):
    checkpoint, _ = case
    with pytest.raises(CheckpointError, match=f"is {checkpoint.family.title}, which the layout 't5x' doesn't hold"):
        TARGETS["t5x"](checkpoint, tmp_path, conversion.Options())
