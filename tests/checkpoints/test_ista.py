"""The published models' layout: against what the reference's own code wrote and computed."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import tiny_model
from test_huggingface import convert, edit_config
from test_torch_files import CALLS, MARKER, write

import qmoe_jax
from qmoe_jax.checkpoints import TARGETS, CheckpointError, CompressedWriter, IstaCheckpoint, conversion, open_checkpoint
from qmoe_jax.checkpoints.torch_files import Tensor, TorchFile, save
from qmoe_jax.codecs import dictionary
from qmoe_jax.codecs.experts import CompressedExperts

# Every layer sparse, or every second one: what the layout holds.
FULL = dataclasses.replace(tiny_model.CONFIG, decoder_sparse_layers=(0, 1), tied=False, min_expert_capacity=2)
HALF = dataclasses.replace(tiny_model.CONFIG, encoder_sparse_layers=(1,))


def values_of(file):
    file = TorchFile(file)
    return {n: file.read(v) if isinstance(v, Tensor) else v for n, v in file.content.items()}


def write_compressed(directory, config, codec="dictionary", num_levels=2):
    rng = np.random.default_rng(0)
    with CompressedWriter(directory, config, {}, codec, {"origin": "nowhere"}) as writer:
        for layer in config.sparse_layers:
            experts = {}
            for matrix in config.expert_matrices:
                out, width = (config.d_model, config.d_ff) if matrix == "wo" else (config.d_ff, config.d_model)
                symbols = rng.choice(num_levels + 1, (config.num_experts, out, width)).astype(np.uint8)
                levels = np.sort(rng.normal(size=(config.num_experts, out, num_levels)), axis=-1)
                experts[matrix] = CompressedExperts.from_symbols(symbols, levels, codec)
            writer.write_layer(layer, experts)
        params = tiny_model.random_params(config)
        writer.finish({n: v for n, v in params.items() if "/mlp/expert/" not in n})
    return directory


def trits_of(kernel):
    """uint8 [experts, out, in], decoded codeword by codeword; quicker than compiling for a few small matrices."""
    table = dictionary.decode_table()  # which test_dictionary holds against the reference's
    stored, (experts, out, width) = kernel.stored(), kernel.shape
    digits = np.concatenate([table[:, :1] >> np.arange(4, 32, 2), table[:, 1:] >> np.arange(4, 32, 2)], axis=1) & 3
    pairs, trits, begin = table[:, 0] & 15, np.zeros(kernel.shape, np.uint8), 0
    for e in range(experts):
        offsets = begin + stored["row_offsets"][e].astype(int)
        begin = offsets[-1]
        for r in range(out):
            row = [digits[c, : 2 * pairs[c]] for c in stored["codewords"][offsets[r] : offsets[r + 1]]]
            trits[e, r] = np.concatenate(row)[:width]
    return trits


def dequantized(kernel):
    """bfloat16 [experts, out, in] of experts in the dictionary code."""
    zero_first = np.pad(np.asarray(kernel.levels), ((0, 0), (0, 0), (1, 0)))
    return np.take_along_axis(zero_first, trits_of(kernel).astype(int), axis=-1)


def assert_same_model(found, expected):
    """Everything in two compressed checkpoints, bitwise."""
    assert found.config == expected.config and set(found.specs) == set(expected.specs)
    for name in expected.specs:
        assert found.read(name).tobytes() == expected.read(name).tobytes(), name
    for layer in expected.config.sparse_layers:
        ((_, _, a),), ((_, _, b),) = found.experts(layer), expected.experts(layer)
        assert list(a) == list(b)
        for matrix in a:
            a_stored, b_stored = a[matrix].stored(), b[matrix].stored()
            assert {k: v.tobytes() for k, v in a_stored.items()} == {k: v.tobytes() for k, v in b_stored.items()}


# --- The published files ---------------------------------------------------------------------------------------------


@pytest.fixture
def published(fixture_path):
    return fixture_path("ista_base_tiny")


def test_experts_are_those_that_the_reference_decodes(published):
    checkpoint = open_checkpoint(published / "checkpoint")
    assert isinstance(checkpoint, IstaCheckpoint)
    assert checkpoint.config.tied and checkpoint.config.encoder_sparse_layers == (1, 3)
    with np.load(published / "dequantised.npz") as expected:
        assert len(expected.files) == 8
        for name in expected.files:
            stack, _, layer, matrix = name.split(".")
            for start, stop, kernels in checkpoint.experts(f"{stack}/layers_{layer}", 3):
                found = dequantized(kernels[matrix])
                np.testing.assert_array_equal(found.view(np.uint16), expected[name][start:stop])


def test_logits_are_those_of_the_reference(published):
    model, params = qmoe_jax.load(published / "checkpoint")
    io = np.load(published / "io.npz")
    logits = qmoe_jax.forward(model, params, io["encoder_input_tokens"], io["decoder_input_tokens"])
    mask = io["mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(logits)[mask], io["logits"][mask], rtol=0, atol=1e-4)


def test_what_is_stored_as_float32_is_rounded(published):
    checkpoint = open_checkpoint(published / "checkpoint")
    stored = values_of(published / "checkpoint" / "noexp.pt")
    assert stored["shared.weight"].dtype == np.float32
    embedding = checkpoint.read("token_embedder/embedding")
    assert embedding.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(embedding, stored["lm_head.weight"])  # which is bfloat16 on disk


def test_sizes_without_reading_experts(published):
    checkpoint = open_checkpoint(published / "checkpoint")
    for layer, matrices in checkpoint.expert_sizes.items():
        ((_, _, kernels),) = checkpoint.experts(layer)
        assert {m: (k.shape, k.nbytes) for m, k in kernels.items()} == matrices


def test_rows_that_lack_a_side(fixture_path):
    """All zero, one-sided, constant, of odd width: digits mean what ter_minmax says, be it 0."""
    rows = np.load(fixture_path("ista_edge_rows.npz"))
    cases = [name.removesuffix("_w_comp") for name in rows.files if name.endswith("_w_comp")]
    assert len(cases) >= 3
    for case in cases:
        decoded = rows[f"{case}_decoded_bf16_bits"]
        stored = {
            "codewords": rows[f"{case}_w_comp"].view(np.uint16),
            "row_offsets": rows[f"{case}_row_off"][None],
            "levels": rows[f"{case}_ter_minmax_bf16_bits"].view(ml_dtypes.bfloat16).reshape(1, -1, 2),
        }
        experts = CompressedExperts.from_stored(stored, "dictionary", (1, *decoded.shape))
        found = np.asarray(experts.expert(0)).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found, decoded.view(ml_dtypes.bfloat16), err_msg=case)


def test_exported_again_the_files_hold_the_same(published, tmp_path):
    """Through our own layout."""
    original = published / "checkpoint"
    convert(original, tmp_path / "ours", "compressed", codec="dictionary")
    found = convert(tmp_path / "ours", tmp_path / "ista", "ista")
    assert_same_model(found, open_checkpoint(original))
    assert {f.name for f in original.iterdir()} == {f.name for f in (tmp_path / "ista").iterdir()}
    for name in ("exp00.pt", "exp01.pt", "exp02.pt", "exp03.pt", "noexp.pt", "sizes.pt"):
        expected, written = values_of(original / name), values_of(tmp_path / "ista" / name)
        assert set(written) == set(expected)
        for key, value in expected.items():
            if name == "noexp.pt":
                value = value.astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(written[key], value, err_msg=key)
            assert getattr(written[key], "dtype", int) == getattr(value, "dtype", int)
    ours, theirs = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "ista", original))
    assert {k: ours[k] for k in theirs if k in ours} == {k: v for k, v in theirs.items() if k in ours}
    assert set(theirs) - set(ours) == {"num_selected_experts"}


@pytest.mark.parametrize("target", ["t5x", "huggingface"])
def test_published_models_become_dense_ones(published, target, tmp_path):
    expected = open_checkpoint(published / "checkpoint")
    found = convert(expected.path, tmp_path, target)
    assert found.config == expected.config
    for name, spec in found.specs.items():
        assert spec.dtype == ml_dtypes.bfloat16
        if name in expected.specs:
            np.testing.assert_array_equal(found.read(name), expected.read(name))
    for layer in expected.config.sparse_layers:
        ((_, _, kernels),) = expected.experts(layer)
        for matrix, kernel in kernels.items():
            weights = found.read(f"{layer}/mlp/expert/{matrix}/kernel")
            np.testing.assert_array_equal(weights.swapaxes(1, 2), dequantized(kernel))


# --- Ours, exported --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "codec"), [(FULL, "dictionary"), (HALF, "gap")], ids=["fully sparse, untied", "every second, tied, gap"]
)
def test_there_and_back(config, codec, tmp_path):
    original = open_checkpoint(write_compressed(tmp_path / "ours", config, codec))
    convert(original.path, tmp_path / "ista", "ista")
    assert_same_model(convert(tmp_path / "ista", tmp_path / "back", "compressed", codec=codec), original)
    assert values_of(tmp_path / "ista" / "sizes.pt") == {
        name.removesuffix(".w_comp"): len(value)
        for file in (tmp_path / "ista").glob("exp*.pt")
        for name, value in values_of(file).items()
        if name.endswith(".w_comp")
    }


def test_pytorch_loads_what_is_exported(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra 'torch')")
    convert(write_compressed(tmp_path / "ours", HALF), tmp_path / "ista", "ista")
    for file in (tmp_path / "ista").glob("*.pt"):
        loaded, expected = torch.load(file, weights_only=True), values_of(file)
        assert list(loaded) == list(expected)
        for name, value in expected.items():
            if isinstance(value, int):
                assert loaded[name] == value
            else:
                bits = loaded[name].view(torch.int16) if loaded[name].numel() else loaded[name].to(torch.int16)
                assert bits.numpy().tobytes() == np.ascontiguousarray(value).tobytes(), name


def test_config_of_the_published_fully_sparse_model(tmp_path):
    """Its steps say that no decoder layer is sparse, and keys are missing."""
    original = open_checkpoint(write_compressed(tmp_path / "ours", FULL))
    convert(original.path, tmp_path / "ista", "ista")
    file = tmp_path / "ista" / "config.json"
    described = json.loads(file.read_text())
    assert described["is_full_sparse"] is True and described["tie_word_embeddings"] is False
    for key in ("architectures", "decoder_start_token_id", "relative_attention_max_distance"):
        del described[key]
    file.write_text(json.dumps(described | {"decoder_sparse_step": 0}))
    assert_same_model(open_checkpoint(tmp_path / "ista"), original)


@pytest.mark.parametrize(
    ("change", "num_levels", "message"),
    [
        ({}, 3, "encoder/layers_1: .*3 in a row"),
        ({"gated": True}, 2, "gated"),
        ({"top_k": 2}, 2, "2 experts"),
        ({"relpos_per_layer": True}, 2, "position bias"),
        ({"encoder_sparse_layers": (0, 1)}, 2, "every layer of one stack"),
    ],
)
def test_models_that_the_layout_cannot_hold_are_refused(change, num_levels, message, tmp_path):
    config = dataclasses.replace(HALF, **change)
    checkpoint = open_checkpoint(write_compressed(tmp_path / "ours", config, "gap", num_levels))
    with pytest.raises(CheckpointError, match=rf"(?s){message}"):
        TARGETS["ista"](checkpoint, tmp_path / "out", conversion.Options())


def test_dense_experts_are_refused(tiny, tmp_path):
    for target in ("ista", "compressed"):
        with pytest.raises(CheckpointError, match=r"is not compressed.*compress\.py"):
            TARGETS[target](open_checkpoint(tiny.checkpoint), tmp_path / "out", conversion.Options())


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    convert(write_compressed(directory / "ours", HALF), directory / "ista", "ista")
    return directory / "ista"


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def change(file, **changes):
    """Replaces values, by the ends of their names; None: removes them."""
    values = values_of(file)
    for end, new in changes.items():
        name = next(n for n in values if n.endswith(end))
        values[name] = new(values[name]) if new else None
    save(file, {n: v for n, v in values.items() if v is not None})


def load(directory):
    return open_checkpoint(directory).load()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "exp01.pt").unlink(), r"(?s)files of sparse layers are missing.*exp01\.pt"),
        (lambda d: change(d / "sizes.pt", wi=lambda n: n + 1), r"sizes\.pt says"),
        (lambda d: change(d / "exp00.pt", w_comp=lambda v: v[:-1]), r"sizes\.pt says"),
        (
            lambda d: (d / "sizes.pt").unlink() or change(d / "exp00.pt", w_comp=lambda v: v[:-1]),
            r"exp00\.pt: .*codewords",
        ),
        (lambda d: change(d / "exp00.pt", row_off=None), r"row_off is missing"),
        (lambda d: change(d / "exp00.pt", row_off=lambda v: v[:-1]), r"exp00\.pt: .*experts"),
        (lambda d: change(d / "exp00.pt", ter_minmax=lambda v: np.full_like(v, np.nan)), "finite"),
        (lambda d: change(d / "noexp.pt", **{"q.weight": None}), "missing: .*query/kernel"),
        (lambda d: change(d / "noexp.pt", **{"q.weight": lambda v: np.full_like(v, np.nan)}), "NaN or Inf"),
        (lambda d: edit_config(d, d_ff=27), "encoder/layers_0/mlp/wi/kernel|wrong shape"),
        (lambda d: (d / "config.json").unlink(), "No checkpoint at .* or config.json"),
    ],
)
def test_broken_directories_are_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_the_numbers_of_files_mean_nothing(copy, exported):
    (copy / "exp00.pt").rename(copy / "other")
    (copy / "exp01.pt").rename(copy / "exp00.pt")
    (copy / "other").rename(copy / "exp01.pt")
    assert_same_model(open_checkpoint(copy), open_checkpoint(exported))


@pytest.mark.parametrize("name", ["noexp.pt", "exp01.pt", "sizes.pt"])
def test_a_file_that_would_run_code_is_refused(copy, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(copy / name, CALLS["os.system"])
    with pytest.raises(CheckpointError, match=rf"{name}: it asks for os\.system"):
        load(copy)
    assert not (tmp_path / MARKER).exists()
