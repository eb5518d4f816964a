"""Hugging Face's layout: read and written, against Flaxformer's logits and against the transformers package itself."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tiny_model
from safetensors.numpy import save_file
from test_torch_files import CALLS, write

import qmoe_jax
from qmoe_jax.checkpoints import TARGETS, CheckpointError, HuggingFaceCheckpoint, conversion, open_checkpoint, write_t5x
from qmoe_jax.checkpoints.torch_files import save
from qmoe_jax.models.switch import FAMILY
from qmoe_jax.models.switch.config import mixed
from qmoe_jax.models.switch.huggingface import EMBEDDING, sparse_step

CONFIG = tiny_model.CONFIG
FIXTURES = ["switch_base_tiny", "switch_c_tiny", "switch_base_scan_tiny"]


def convert(checkpoint, output, target, **options):
    """The new checkpoint, opened."""
    checkpoint = open_checkpoint(checkpoint)
    writer = TARGETS[target](checkpoint, output, conversion.Options(**options))
    conversion.run(writer, output, "test")
    return open_checkpoint(output)


def assert_same_parameters(found, expected):
    assert set(found.specs) == set(expected.specs)
    for name, spec in expected.specs.items():
        assert found.specs[name] == spec, name
        assert found.read(name).tobytes() == expected.read(name).tobytes(), name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny model in Hugging Face's layout, in several files."""
    directory = tmp_path_factory.mktemp("huggingface")
    convert(tiny_model.write_checkpoint(directory / "t5x"), directory / "hf", "huggingface", shard_bytes=20_000)
    return directory / "hf"


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy to be damaged."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


# --- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXTURES)
def test_t5x_to_hugging_face_to_t5x_is_the_identity(fixture_path, name, tmp_path):
    original = open_checkpoint(fixture_path(name))
    hf = convert(original.path, tmp_path / "hf", "huggingface", shard_bytes=300_000)
    assert isinstance(hf, HuggingFaceCheckpoint) and len(list((tmp_path / "hf").glob("*.safetensors"))) > 5
    assert_same_parameters(hf, original)
    back = convert(tmp_path / "hf", tmp_path / "t5x", "t5x", shard_bytes=100_000)
    assert_same_parameters(back, original)
    assert back.config == hf.config == original.config
    assert back.provenance["step"] == hf.provenance["step"] == 1000


def test_orientation_and_experts(checkpoint):
    """Against the arrays that were written, with names and transposes spelled out."""
    expected, found = tiny_model.random_params(), open_checkpoint(checkpoint)
    query = expected["decoder/layers_1/encoder_decoder_attention/query/kernel"]
    name = "decoder.block.1.layer.1.EncDecAttention.q.weight"
    np.testing.assert_array_equal(found.store.read(name), query.T)
    wo = expected["decoder/layers_1/mlp/expert/wo/kernel"]
    name = "decoder.block.1.layer.2.mlp.experts.expert_5.wo.weight"
    np.testing.assert_array_equal(found.store.read(name), wo[5].T)
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    np.testing.assert_array_equal(found.store.read(name), expected["encoder/relpos_bias/rel_embedding"].T)
    kernel = "decoder/layers_1/mlp/expert/wo/kernel"
    np.testing.assert_array_equal(found.read(kernel, (slice(2, 7, 2), slice(None), 3)), wo[2:7:2, :, 3])
    np.testing.assert_array_equal(found.read(kernel, (6,)), wo[6])
    for start, stop, kernels in found.experts("decoder/layers_1", 3):
        np.testing.assert_array_equal(kernels["wo"], wo[start:stop])


@pytest.mark.parametrize("name", ["switch_base_tiny", "switch_c_tiny"])
def test_logits_are_flaxformers(fixture_path, name, tmp_path):
    convert(fixture_path(name), tmp_path, "huggingface")
    io = np.load(fixture_path(name) / "io.npz")
    model, params = qmoe_jax.load(tmp_path)
    tokens = [io[n] for n in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")]
    np.testing.assert_allclose(qmoe_jax.forward(model, params, *tokens), io["logits"], rtol=0, atol=1e-4)


# The package and this project's compiled libraries each bring threads of their own: hence a process for it.
TRANSFORMERS = """
import sys
import numpy as np
import torch
import transformers

directory, tokens, output = sys.argv[1:]
Model = transformers.SwitchTransformersForConditionalGeneration
model, info = Model.from_pretrained(directory, output_loading_info=True)
assert not info["missing_keys"] and not info["mismatched_keys"], info
assert not info["unexpected_keys"], info
encoder, decoder = (torch.tensor(a.astype(np.int64)) for a in np.load(tokens).values())
with torch.no_grad():
    result = model.float().eval()(input_ids=encoder, attention_mask=encoder > 0, decoder_input_ids=decoder)
np.save(output, result.logits.numpy())
"""


def transformers_logits(directory, io, tmp_path):
    pytest.importorskip("transformers", reason="the transformers package is not installed (extra 'torch')")
    pytest.importorskip("torch", reason="PyTorch is not installed (extra 'torch')")
    np.savez(tmp_path / "tokens.npz", encoder=io["encoder_input_tokens"], decoder=io["decoder_input_tokens"])
    script = [sys.executable, "-c", TRANSFORMERS, directory, tmp_path / "tokens.npz", tmp_path / "logits.npy"]
    result = subprocess.run(list(map(str, script)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return np.load(tmp_path / "logits.npy")


@pytest.mark.parametrize("name", ["switch_base_tiny", "switch_c_tiny"])
def test_the_transformers_package_computes_flaxformers_logits(fixture_path, name, tmp_path):
    convert(fixture_path(name), tmp_path / "hf", "huggingface", shard_bytes=500_000)
    io = np.load(fixture_path(name) / "io.npz")
    real = io["decoder_target_tokens"] > 0
    logits = transformers_logits(tmp_path / "hf", io, tmp_path)
    np.testing.assert_allclose(logits[real], io["logits"][real], rtol=0, atol=1e-4)


def test_hugging_faces_sparse_layers(tmp_path):
    """Its rule against T5X's MIXED placement: they agree for steps of 1 and 2."""
    assert sparse_step(12, mixed(12, 6)) == 2
    assert sparse_step(15, mixed(15, 15)) == 1
    assert sparse_step(3, ()) == 0
    assert sparse_step(12, (1, 4, 7, 10)) == 3
    assert sparse_step(12, mixed(12, 4)) is None and sparse_step(2, (0,)) is None


def test_dtype_is_cast(checkpoint, tmp_path):
    found = convert(checkpoint, tmp_path, "t5x", dtype="bfloat16")
    for name, value in tiny_model.random_params().items():
        np.testing.assert_array_equal(found.read(name), value.astype(ml_dtypes.bfloat16))


# --- Other people's files --------------------------------------------------------------------------------------------


def tensors_of(checkpoint):
    store = open_checkpoint(checkpoint).store
    return {name: store.read(name) for name in store.specs}


def described(**changes):
    """config.json of the tiny model."""
    return FAMILY.names["huggingface"].describe(CONFIG, {EMBEDDING: np.dtype(np.float32)}, None) | changes


def write_one_file(directory, tensors, **config):
    directory.mkdir(exist_ok=True)
    save_file({n: np.ascontiguousarray(v) for n, v in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(described(**config)))
    return directory


def test_one_file_with_the_embedding_three_times(checkpoint, tmp_path):
    tensors = tensors_of(checkpoint)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors["shared.weight"]
    found = open_checkpoint(write_one_file(tmp_path, tensors))
    assert found.config == dataclasses.replace(CONFIG, tied=True)
    assert_same_parameters(found, open_checkpoint(checkpoint))


@pytest.mark.parametrize("files", [1, 3])
def test_bin_files(checkpoint, files, tmp_path):
    """Of torch.save, one or several with an index, are read as safetensors are."""
    tensors = tensors_of(checkpoint)
    names = ["pytorch_model.bin"] if files == 1 else [f"pytorch_model-{i}-of-{files}.bin" for i in range(files)]
    where = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
    for name in names:
        save(tmp_path / name, {t: v for t, v in tensors.items() if where[t] == name}, ordered=True)
    if files > 1:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text(json.dumps(described()))
    assert_same_parameters(open_checkpoint(tmp_path), open_checkpoint(checkpoint))
    write(tmp_path / names[-1], CALLS["os.system"])
    with pytest.raises(CheckpointError, match=rf"{names[-1]}: it asks for os\.system"):
        open_checkpoint(tmp_path)


def test_an_untied_head_under_both_of_its_names(checkpoint, tmp_path):
    tensors = tensors_of(checkpoint)
    head = np.arange(CONFIG.vocab_size * CONFIG.d_model, dtype=np.float32).reshape(CONFIG.vocab_size, CONFIG.d_model)
    for i, (name, config) in enumerate(
        (("lm_head.weight", {"tie_word_embeddings": False}), ("decoder.lm_head.weight", {}))
    ):
        found = open_checkpoint(write_one_file(tmp_path / str(i), tensors | {name: head}, **config))
        assert not found.config.tied
        np.testing.assert_array_equal(found.read("decoder/logits_dense/kernel"), head.T)


def test_mixed_precision_reads_as_float32_where_experts_differ(checkpoint, tmp_path):
    tensors = tensors_of(checkpoint)
    name = "encoder.block.0.layer.1.mlp.experts.expert_3.wi.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    tensors["shared.weight"] = tensors["shared.weight"].astype(np.float16)
    found = open_checkpoint(write_one_file(tmp_path, tensors))
    assert found.specs["token_embedder/embedding"].dtype == np.float16
    kernel = found.read("encoder/layers_0/mlp/expert/wi/kernel")
    assert kernel.dtype == found.specs["encoder/layers_0/mlp/expert/wi/kernel"].dtype == np.float32
    np.testing.assert_array_equal(kernel[3].T, tensors[name].astype(np.float32))


# --- What can't be held, and what is broken --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gated": True}, "gated"),
        ({"top_k": 2}, "2 experts"),
        ({"encoder_sparse_layers": (0,)}, r"sparse layers \(0,\) of 2 in the encoder"),
    ],
)
def test_models_that_hugging_face_cannot_compute_are_refused(change, reason, tmp_path):
    config = dataclasses.replace(CONFIG, **change)
    path = write_t5x(tmp_path / "t5x", tiny_model.random_params(config))
    checkpoint = open_checkpoint(path, top_k=config.top_k)
    with pytest.raises(CheckpointError, match=rf"(?s)can't hold this model.*{reason}"):
        TARGETS["huggingface"](checkpoint, tmp_path / "hf", conversion.Options())
    assert not (tmp_path / "hf").exists()


def test_biases_of_a_scanned_model_are_named_as_lost(fixture_path, tmp_path):
    checkpoint = open_checkpoint(fixture_path("switch_base_scan_tiny"))
    lost = TARGETS["huggingface"](checkpoint, tmp_path, conversion.Options()).lost
    assert any("position biases" in what for what in lost)


def edit_config(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edit_config(d, model_type="t5"), "model_type 't5', expected 'switch_transformers'"),
        (
            lambda d: edit_config(d, d_ff=29, num_heads=4),
            r"(?s)doesn't fit.*d_ff: 29, but the tensors say 28.*num_heads",
        ),
        (lambda d: edit_config(d, tie_word_embeddings=False), "lm_head.weight is missing"),
        (
            lambda d: edit_config(d, layer_norm_epsilon=1e-3, dense_act_fn="gelu_new"),
            r"(?s)doesn't fit.*layer_norm_epsilon: 0.001, supported is 1e-06.*dense_act_fn: 'gelu_new', supported",
        ),
        (
            lambda d: edit_config(d, d_ff="28", num_experts=True, vocab_size=256.0),
            r"(?s)config\.json doesn't describe.*vocab_size.*d_ff: found '28'.*num_experts: found True",
        ),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda d: next(iter(sorted(d.glob("*.safetensors")))).unlink(), "files of .* are missing"),
        (lambda d: truncate(sorted(d.glob("*.safetensors"))[1]), "not a safetensors file, or damaged"),
        (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'), "beside it"),
    ],
    ids=[
        "model type",
        "sizes",
        "no head",
        "settings",
        "kinds",
        "config",
        "missing file",
        "truncated file",
        "file outside",
    ],
)
def test_broken_directories_are_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


def truncate(file: pathlib.Path):
    file.write_bytes(file.read_bytes()[:-7])


def test_missing_experts_and_foreign_tensors_are_listed(checkpoint, tmp_path):
    tensors = tensors_of(checkpoint)
    removed = {n: v for n, v in tensors.items() if "block.1.layer.1.mlp.experts.expert_2." not in n}
    with pytest.raises(
        CheckpointError, match=r"(?s)Of 8 experts some are missing.*encoder/layers_1/mlp/expert/wi/kernel: 2"
    ):
        open_checkpoint(write_one_file(tmp_path / "a", removed))
    foreign = {"visual.weight": tensors["shared.weight"]}
    with pytest.raises(CheckpointError, match=r"(?s)1 tensors are not of a switch_transformers model.*visual\.weight"):
        open_checkpoint(write_one_file(tmp_path / "b", tensors | foreign))
    name = "encoder.block.0.layer.1.mlp.experts.expert_2.wi.weight"
    with pytest.raises(CheckpointError, match=r"expert_2\.wi\.weight.*has shape"):
        open_checkpoint(write_one_file(tmp_path / "c", tensors | {name: tensors[name][:-1]}))


def test_half_a_conversion_is_no_checkpoint(checkpoint, tmp_path, monkeypatch):
    """It stops, is no checkpoint, goes on with the same files, and ends with the same bytes."""
    source, options = open_checkpoint(checkpoint), conversion.Options(shard_bytes=20_000)
    written = []

    def run(stop_after=None):
        writer = TARGETS["huggingface"](source, tmp_path, options)
        write = writer.write

        def counted(part):
            if len(written) == stop_after:
                raise OSError("no space left")
            written.append(part)
            return write(part)

        monkeypatch.setattr(writer, "write", counted)
        return conversion.run(writer, tmp_path, "same")

    with pytest.raises(OSError, match="no space"):
        run(stop_after=4)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    first = sorted(tmp_path.glob("*.safetensors"))
    first[2].write_bytes(b"changed since")
    files = run()
    assert len(written) == len(set(written)) + 1 and written.count(first[2].name) == 2
    for file in checkpoint.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert set(files) == {f.name for f in checkpoint.iterdir()} == {f.name for f in tmp_path.iterdir()}
