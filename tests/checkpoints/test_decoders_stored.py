"""Hugging Face's checkpoints of every decoder-only family: opened, streamed, compressed, and written again."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from models import hugging_face

import qmoe_jax
from qmoe_jax import streaming
from qmoe_jax.checkpoints import TARGETS, CheckpointError, conversion, open_checkpoint
from qmoe_jax.checkpoints.inspection import inspect
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.models.families import mismatches
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.reports.html import html_report

FIXTURES = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v3_fp8", "gpt_oss", "gpt_oss_mxfp4"]


@pytest.fixture(scope="module", params=FIXTURES)
def case(request, fixture_path):
    path = fixture_path(f"{request.param}_tiny")
    return open_checkpoint(path / "checkpoint"), np.load(path / "io.npz")


only_packed = pytest.mark.parametrize(
    "case",
    [f if f in ("deepseek_v3_fp8", "gpt_oss_mxfp4") else pytest.param(f, marks=pytest.mark.long) for f in FIXTURES],
    indirect=True,
)


def real(io):
    return np.arange(io["input_ids"].shape[1]) < io["lengths"][:, None]


def convert(checkpoint, output, target, **options):
    conversion.run(TARGETS[target](checkpoint, output, conversion.Options(**options)), output, "")
    return open_checkpoint(output)


# Of the others, which are stored as they are, models/test_decoder_fixtures.py has the logits.
@only_packed
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


@only_packed
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


def test_what_is_left_out_is_named_everywhere(fixture_path, tmp_path, caplog):
    """A DeepSeek-V3 with a multi-token head, as it is published: the layer after the last."""
    folder, layer = hugging_face.with_multi_token_head(
        fixture_path("deepseek_v3_tiny") / "checkpoint", tmp_path / "model"
    )
    with caplog.at_level("WARNING"):
        checkpoint = open_checkpoint(folder)
    (named,) = checkpoint.left_out.items()
    experts = f"model.layers.{layer}.mlp.experts.0-{checkpoint.config.num_experts - 1}.up_proj.weight"
    assert named[0] == "multi-token head" and {experts, f"model.layers.{layer}.enorm.weight"} <= set(named[1])
    assert "left out: multi-token head" in caplog.text and experts in caplog.text
    assert inspect(folder)["left_out"] == checkpoint.left_out

    examples = [(np.arange(1, 9, dtype=np.int32),)]
    report = compress_examples(
        checkpoint, None, None, examples, QuantizationSettings(method="rtn"), streaming.Settings(),
        output=tmp_path / "out", provenance=checkpoint.provenance,
    )  # fmt: skip
    assert report["left_out"] == inspect(tmp_path / "out")["left_out"] == checkpoint.left_out
    assert experts in html_report(report) and "multi-token head" in html_report(report)
    for account in report["layers"].values():
        assert len(account["tokens_per_expert"]) == checkpoint.config.num_experts
    assert list(report["layers"]) == list(checkpoint.config.sparse_layers)

    described = hugging_face.described(folder)
    (folder / "config.json").write_text(json.dumps(described | {"num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=f"are not of a DeepSeek-V3:\n  model.layers.{layer}"):
        open_checkpoint(folder)


def test_files_that_are_not_all_there_or_packed(fixture_path, tmp_path):
    from safetensors.numpy import save_file

    source = fixture_path("deepseek_v3_fp8_tiny") / "checkpoint"
    described = json.loads((source / "config.json").read_text())
    # Kimi-K2 is a DeepSeek-V3 by another name.
    kimi = shutil.copytree(source, tmp_path / "kimi")
    (kimi / "config.json").write_text(json.dumps(described | {"model_type": "kimi_k2"}))
    checkpoint = open_checkpoint(kimi)
    assert checkpoint.config.model_type == "kimi_k2"
    assert mismatches(checkpoint.config, open_checkpoint(source).config) == []
    (kimi / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing, which tells the architecture: copy it from"):
        open_checkpoint(kimi)
    # Kimi-K2-Thinking: int4, in tensors of dtypes that no weight has.
    packed = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors = {f"{packed}_packed": np.zeros((4, 2), np.int32), f"{packed}_shape": np.zeros(2, np.int64)}
    folder = tmp_path / "thinking"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    for settings in ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, None):
        (folder / "config.json").write_text(json.dumps(described | {"quantization_config": settings}))
        with pytest.raises(CheckpointError, match="compressed-tensors.*Take the model as it is published in bfloat16"):
            open_checkpoint(folder)
