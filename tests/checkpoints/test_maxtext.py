"""MaxText's checkpoints: some that it wrote itself, with its logits, and some in other ways that Orbax has.

`maxtext.tar.gz` was made by MaxText 0.2.5: its `to_maxtext.py` converted the checkpoints in `huggingface/` (random
weights), scanned and not, and its model computed the logits in float32. Its converter fails on a scanned Mixtral: that
one it wrote from the layers of the other, stacked to the shapes of its model.
"""

import json
import pathlib
import shutil
import tarfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

import qmoe_jax
from qmoe_jax.checkpoints import TARGETS, CheckpointError, conversion, open_checkpoint
from qmoe_jax.models.families import FAMILIES, PRESETS

ARCHIVE = pathlib.Path(__file__).with_name("maxtext.tar.gz")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What MaxText wrote, config.json in place."""
    folder = tmp_path_factory.mktemp("maxtext")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    for config in folder.glob("maxtext/*/huggingface/config.json"):
        for layout in ("scanned", "unscanned"):
            shutil.copy(config, config.parents[1] / layout)
    return folder / "maxtext"


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_what_maxtext_wrote(written, family, layout):
    found, source = (open_checkpoint(written / family / name) for name in (layout, "huggingface"))
    assert found.config == source.config and found.provenance["step"] == 0
    assert {n: s.shape for n, s in found.specs.items()} == {n: s.shape for n, s in source.specs.items()}
    for name in source.specs:
        np.testing.assert_allclose(found.read(name), source.read(name), rtol=1e-6, err_msg=name)
    io = np.load(written / family / "io.npz")
    model = found.family.model(found.config, jnp.float32, None)
    logits = qmoe_jax.forward(model, found.load(), io["input_ids"])
    np.testing.assert_allclose(logits, io["logits"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_slices_and_groups_of_experts(written, layout):
    checkpoint = open_checkpoint(written / "mixtral" / layout / "0")
    for name, spec in checkpoint.specs.items():
        whole = checkpoint.read(name)
        for index in ((1,), (..., slice(1, 3)), (slice(3, 9, 2), slice(2, 8))):
            if len(index) <= len(spec.shape):
                np.testing.assert_array_equal(checkpoint.read(name, index), whole[index], err_msg=name)
    layers = checkpoint.config.sparse_layers
    assert checkpoint.sources(layers[0])["gate_proj"].grid.layers == (2 if layout == "scanned" else 1)
    seen = []
    for layer, start, stop, kernels in checkpoint.stream(layers, 3):
        seen += [(layer, e) for e in range(start, stop)]
        for matrix, name in checkpoint.matrices(layer).items():
            np.testing.assert_array_equal(kernels[matrix], checkpoint.read(name)[start:stop])
    assert seen == [(layer, e) for layer in layers for e in range(4)]


def test_converted_it_is_the_checkpoint_that_maxtext_was_given(written, tmp_path):
    checkpoint = open_checkpoint(written / "qwen3_moe" / "scanned")
    conversion.run(TARGETS["huggingface"](checkpoint, tmp_path, conversion.Options()), tmp_path, "")
    found, source = open_checkpoint(tmp_path), open_checkpoint(written / "qwen3_moe" / "huggingface")
    for name, spec in source.specs.items():
        assert found.specs[name] == spec
        np.testing.assert_array_equal(found.read(name), source.read(name))
    with pytest.raises(CheckpointError, match="'huggingface'|doesn't hold"):
        TARGETS["t5x"](checkpoint, tmp_path, conversion.Options())


# --- Other ways that Orbax and MaxText have ---------------------------------------------------------------------------


def as_maxtext(tensors, config):
    """Arrays of an unscanned Mixtral in MaxText, by '/'-joined name, from Hugging Face's tensors."""
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or dim // heads
    tree = {
        "token_embedder/embedding": tensors["model.embed_tokens.weight"],
        "decoder/decoder_norm/scale": tensors["model.norm.weight"],
        "decoder/logits_dense/kernel": tensors["lm_head.weight"].T,
    }
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}.", f"decoder/layers_{i}/"
        attention, moe = f"{theirs}self_attn.", f"{theirs}block_sparse_moe."
        query = tensors[attention + "q_proj.weight"].astype(np.float32).T / np.float32(np.sqrt(head_dim))
        tree |= {
            ours + "pre_self_attention_layer_norm/scale": tensors[theirs + "input_layernorm.weight"],
            ours + "post_self_attention_layer_norm/scale": tensors[theirs + "post_attention_layernorm.weight"],
            ours + "self_attention/query/kernel": query.reshape(dim, heads, head_dim),
            ours + "self_attention/key/kernel": tensors[attention + "k_proj.weight"].T.reshape(dim, kv_heads, head_dim),
            ours + "self_attention/value/kernel": tensors[attention + "v_proj.weight"].T.reshape(
                dim, kv_heads, head_dim
            ),
            ours + "self_attention/out/kernel": tensors[attention + "o_proj.weight"].T.reshape(heads, head_dim, dim),
            ours + "MoeBlock_0/gate/kernel": tensors[moe + "gate.weight"].T,
        }
        for name, matrix in (("wi_0", "w1"), ("wi_1", "w3"), ("wo", "w2")):
            every = [tensors[f"{moe}experts.{e}.{matrix}.weight"].T for e in range(config["num_local_experts"])]
            tree[f"{ours}MoeBlock_0/{name}"] = np.stack(every)
    return tree


def scanned(tree, layers, axis):
    """The same with layers stacked."""
    rest = {n: a for n, a in tree.items() if "/layers_" not in n}
    inner = [n.removeprefix("decoder/layers_0/") for n in tree if "/layers_0/" in n]
    stack = lambda name: np.stack([tree[f"decoder/layers_{i}/{name}"] for i in range(layers)], axis)
    return rest | {f"decoder/layers/{name}": stack(name) for name in inner}


def save(directory, tree, **options):
    tree = traverse_util.unflatten_dict({n: np.ascontiguousarray(a) for n, a in tree.items()}, sep="/")
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(directory / "items", tree)


def prefixed(tree, prefix, suffix=""):
    return {f"{prefix}{name}{suffix}": array for name, array in tree.items()}


@pytest.fixture(scope="module")
def mixtral(fixture_path):
    """The fixture's config.json, its tensors as MaxText has them, and its inputs and logits."""
    from safetensors.numpy import load_file

    path = fixture_path("mixtral_tiny")
    tensors = {n: t for file in (path / "checkpoint").glob("*.safetensors") for n, t in load_file(file).items()}
    described = json.loads((path / "checkpoint" / "config.json").read_text())
    return described, as_maxtext(tensors, described), np.load(path / "io.npz")


def lists(tree):
    """As NNX has it: layers in lists, leaves called 'value'."""
    return {f"{n}/value".replace("/layers_", "/layers/"): a for n, a in tree.items()}


WAYS = {
    "a training state": (
        lambda tree: {
            **prefixed(scanned(tree, 3, 1), "params/params/"),
            **prefixed(scanned(tree, 3, 1), "opt_state/mu/params/"),
            "step": np.int32(7),
        },
        dict(use_ocdbt=True, use_zarr3=True),
    ),
    "zarr directories, scanned along axis 0": (
        lambda tree: prefixed(scanned(tree, 3, 0), "params/params/"),
        dict(use_ocdbt=False, use_zarr3=False),
    ),
    "NNX": (lists, dict(use_ocdbt=True, use_zarr3=False)),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways(mixtral, tmp_path, way):
    described, tree, io = mixtral
    change, options = WAYS[way]
    save(tmp_path / "7", change(tree), **options)
    (tmp_path / "config.json").write_text(json.dumps(described))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.provenance["step"] == 7
    model = checkpoint.family.model(checkpoint.config, jnp.float32, None)
    logits = np.asarray(qmoe_jax.forward(model, checkpoint.load(), io["input_ids"]))
    real = np.arange(io["input_ids"].shape[1]) < io["lengths"][:, None]
    np.testing.assert_allclose(logits[real], io["logits"][real], atol=2e-4, rtol=0)


def test_a_published_one_may_be_named(mixtral, tmp_path, monkeypatch, caplog):
    described, tree, _ = mixtral
    save(tmp_path / "3", prefixed(scanned(tree, 3, 1), "params/params/"))
    family = FAMILIES["mixtral"]
    monkeypatch.setitem(PRESETS, "mixtral_8x7b", family.huggingface.from_described(described))
    assert open_checkpoint(tmp_path, preset="mixtral_8x7b").config.num_layers == 3
    assert "taken for mixtral_8x7b as first published" in caplog.text


def test_the_newest_step_and_where_config_json_may_be(mixtral, tmp_path):
    described, tree, _ = mixtral
    for step in (9, 10):
        save(
            tmp_path / str(step), prefixed({n: a.astype(ml_dtypes.bfloat16) for n, a in tree.items()}, "params/params/")
        )
    with pytest.raises(
        CheckpointError, match=r"don't tell the architecture.*config\.json.*mixtral_8x7b.*qwen3_30b_a3b"
    ):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no 'olmoe_1b_7b' that is read"):
        open_checkpoint(tmp_path, preset="olmoe_1b_7b")
    with pytest.raises(CheckpointError, match=r"missing: model/layers_3/input_layernorm/scale, expected \[4096\]"):
        open_checkpoint(tmp_path, preset="mixtral_8x7b")
    for place in (tmp_path / "10" / "items", tmp_path / "10", tmp_path):
        (place / "config.json").write_text(json.dumps(described))
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.provenance["step"] == 10 and checkpoint.config.num_layers == 3
        (place / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(described | {"model_type": "olmoe"}))
    with pytest.raises(CheckpointError, match=r"config\.json: model_type 'olmoe', expected 'mixtral', 'qwen3_moe'"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match="unknown: model/layers_2/"):
        open_checkpoint(tmp_path / "9" / "items")
    # Queries come as float32: what they are multiplied by isn't rounded away.
    (tmp_path / "config.json").write_text(json.dumps(described))
    specs = open_checkpoint(tmp_path / "9").specs
    assert {str(s.dtype) for n, s in specs.items() if "q_proj" in n} == {"float32"}
    assert {str(s.dtype) for n, s in specs.items() if "q_proj" not in n} == {"bfloat16"}


def test_what_is_wrong_is_named(mixtral, tmp_path):
    described, tree, _ = mixtral
    (tmp_path / "config.json").write_text(json.dumps(described))
    wi = next(n for n in tree if n.endswith("layers_1/MoeBlock_0/wi_0"))
    for step, change, message in (
        (1, {wi: tree[wi].astype(np.int8)}, "must be bfloat16, float16, float32.*\n.*wi_0: int8"),
        (
            2,
            {"decoder/layers_1/mlp/bias": np.ones(3, np.float32)},
            "1 arrays are not of a Mixtral in MaxText:\n  decoder",
        ),
        (3, {wi: tree[wi][:, 1:]}, "wrong shape: model/layers_1/mlp/experts/gate_proj/kernel"),
    ):
        save(tmp_path / str(step), prefixed(tree | change, "params/params/"), use_ocdbt=False, use_zarr3=True)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)
    save(tmp_path / "4", prefixed(tree, "params/params/"), use_ocdbt=False, use_zarr3=True)
    array = tmp_path / "4" / "items" / f"params.params.{wi.replace('/', '.')}"
    for chunk in [p for p in array.rglob("*") if p.is_file() and p.name != "zarr.json"]:
        chunk.unlink()
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read parameter 'decoder/layers_1/MoeBlock_0/wi_0'"):
        checkpoint.read("model/layers_1/mlp/experts/gate_proj/kernel")
    shutil.rmtree(array)
    with pytest.raises(CheckpointError, match="1 arrays cannot be opened"):
        open_checkpoint(tmp_path)
    (tmp_path / "4" / "items" / "_METADATA").write_text("{\"tree_metadata\": {\"('params', 'token_embedder'\": 3}}")
    with pytest.raises(CheckpointError, match="no tree of arrays in it"):
        open_checkpoint(tmp_path)
