"""The layer-by-layer pass over all documents: the same losses as whole forward passes."""

import functools
import pathlib
import re
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from numpy_switch import cross_entropy
from random_models import CONFIGS, EXPERTS_CHOOSE, SWITCH, padded, random_pairs, random_params
from watch import watched

import qmoe_jax
from qmoe_jax import streaming
from qmoe_jax.checkpoints import CompressedWriter, write_t5x
from qmoe_jax.models.switch import make_batches

# (encoder, decoder) tokens of six documents: two batch shapes, and lengths on both sides of their limits.
LENGTHS = [(33, 7), (5, 3), (32, 10), (12, 2), (21, 9), (31, 4)]
PAIRS = random_pairs(SWITCH, LENGTHS, seed=3)
ONE_SHAPE = PAIRS[1:]
SETTINGS = {
    "all at once": streaming.Settings(),
    "one document, one expert, five tokens at once": streaming.Settings(
        tokens_per_batch=1, tokens_per_expert_call=5, experts_per_group=1
    ),
    "groups of two experts": streaming.Settings(tokens_per_batch=100, experts_per_group=2),
}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """T5X checkpoint of a configuration by its name in `CONFIGS`, opened."""

    @functools.cache
    def make(name):
        config = CONFIGS[name]
        path = write_t5x(tmp_path_factory.mktemp("t5x"), random_params(config, seed=4))
        return qmoe_jax.open_checkpoint(path, top_k=config.top_k)

    return make


# Compiling is what takes time here, so the compiler is asked not to optimise.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def forward(model, params):
    """Logits and intermediates of all documents in one padded batch."""
    return model.apply({"params": params}, *padded(PAIRS), mutable=["intermediates"])


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def logits_of(model, params, tokens):
    return model.apply({"params": params}, *tokens)


def expected_losses(model, params):
    """Summed cross-entropy per document, from one padded forward pass."""
    return cross_entropy(forward(model, params)[0], padded(PAIRS)[2])


@pytest.fixture(scope="module")
def expected(native):
    @functools.cache
    def compute(name):
        checkpoint = native(name)
        return expected_losses(qmoe_jax.SwitchTransformer(checkpoint.config), checkpoint.load())

    return compute


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_whole_forward_passes(native, expected, name, settings):
    losses = streaming.run(native(name), PAIRS, settings)
    np.testing.assert_allclose(losses.total, expected(name), rtol=1e-5)
    np.testing.assert_array_equal(losses.tokens, [d - 1 for _, d in LENGTHS])


def test_documents_that_calibrate_have_no_losses(native, expected):
    name = next(iter(CONFIGS))
    losses = streaming.run(native(name), PAIRS, SETTINGS[next(iter(SETTINGS))], first_measured=2)
    np.testing.assert_allclose(losses.total, expected(name)[2:], rtol=1e-5)
    np.testing.assert_array_equal(losses.tokens, [d - 1 for _, d in LENGTHS[2:]])


def test_where_experts_choose_they_do_within_a_batch(tmp_path):
    """The losses are those of whole forward passes over the same batches; hooks see who took which token."""
    path = write_t5x(tmp_path, random_params(EXPERTS_CHOOSE, seed=4))
    untold = ("top_k", "experts_choose", "router_group_size", "min_expert_capacity")
    checkpoint = qmoe_jax.open_checkpoint(path, **{field: getattr(EXPERTS_CHOOSE, field) for field in untold})
    assert checkpoint.config == EXPERTS_CHOOSE
    model, params = qmoe_jax.SwitchTransformer(EXPERTS_CHOOSE), checkpoint.load()
    expected = np.zeros(len(PAIRS))
    for batch in make_batches(PAIRS, 70):
        real = batch.indices >= 0
        logits = logits_of(model, params, tuple(batch[1:]))
        expected[batch.indices[real]] = cross_entropy(logits, batch.decoder_target_tokens)[real]
    taken = {}

    def hook(group):
        assert all((g > 0).all() and len(g) == len(rows) for rows, g in zip(group.tokens, group.gates, strict=True))
        assert all((np.diff(rows) > 0).all() for rows in group.tokens)
        taken.setdefault(group.layer, []).extend(map(len, group.tokens))
        return group.kernels

    settings = streaming.Settings(tokens_per_batch=70, experts_per_group=2, tokens_per_expert_call=9)
    losses = watched(checkpoint, PAIRS, settings, hook)
    np.testing.assert_allclose(losses.total, expected, rtol=1e-5)
    tokens = sum(len(e) for e, _ in PAIRS)
    assert max(taken["encoder/layers_0"]) < tokens and sum(taken["decoder/layers_0"]) == 2 * sum(losses.tokens)


def test_compressed_checkpoint_gives_the_loss_of_its_dequantized_weights(tmp_path):
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), random_params(SWITCH, seed=4))
    flat = traverse_util.flatten_dict(params, sep="/")
    rng = np.random.default_rng(0)
    with CompressedWriter(tmp_path, SWITCH, {}, "dictionary", {}) as writer:
        for layer in SWITCH.sparse_layers:
            experts = {}
            for matrix in SWITCH.expert_matrices:
                name = f"{layer}/mlp/expert/{matrix}/kernel"
                count, width, out = flat[name].shape
                trits = rng.choice(3, (count, out, width), p=[0.6, 0.2, 0.2]).astype(np.uint8)
                levels = np.tile(np.float32([-0.5, 0.75]), (count, out, 1))
                experts[matrix] = qmoe_jax.CompressedExperts.from_symbols(trits, levels, codec="dictionary")
                flat[name] = np.float32([0, -0.5, 0.75])[trits].swapaxes(1, 2)  # [experts, in, out]
            writer.write_layer(layer, experts)
        writer.finish({name: value for name, value in flat.items() if "/mlp/expert/" not in name})

    dense = traverse_util.unflatten_dict(flat, sep="/")
    expected = expected_losses(qmoe_jax.SwitchTransformer(SWITCH), dense)
    losses = streaming.run(qmoe_jax.open_checkpoint(tmp_path), ONE_SHAPE, streaming.Settings())
    np.testing.assert_allclose(losses.total, expected[1:], rtol=1e-5)


def test_activations_in_files_give_the_same_to_the_bit_and_leave_nothing(native, tmp_path):
    checkpoint = native("relu, tied, top-1")
    settings = streaming.Settings(tokens_per_batch=100, experts_per_group=2)
    folder = tmp_path / "activations"
    losses = streaming.run(checkpoint, ONE_SHAPE, settings._replace(activations=str(folder)))
    np.testing.assert_array_equal(losses.total, streaming.run(checkpoint, ONE_SHAPE, settings).total)
    assert list(folder.iterdir()) == []


def test_inputs_of_experts_give_their_memory_back_while_experts_run(native, tmp_path, monkeypatch):
    """A buffer that nobody holds is not released, though its rows are still read."""
    made, buffer = [], streaming.Documents.buffer

    def watched_buffer(self, *args):
        found = buffer(self, *args)
        made.append((weakref.ref(found), found.data))
        return found

    def look(group):
        assert [ref() is not None for ref, data in made if data is group.inputs] == [True]
        return group.kernels

    monkeypatch.setattr(streaming.Documents, "buffer", watched_buffer)
    watched(native("relu, tied, top-1"), ONE_SHAPE, streaming.Settings(activations=str(tmp_path)), look)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_list_buffer_in_a_file_keeps_its_rows_but_not_the_memory(tmp_path, dtype):
    def mapped_bytes():
        status = pathlib.Path("/proc/self/status")
        if not status.exists():
            pytest.skip("/proc is Linux's")
        return 1024 * int(re.search(r"RssFile:\s+(\d+)", status.read_text())[1])

    buffer = streaming.ListBuffer([5000, 3], 4096 // np.dtype(dtype).itemsize, dtype, str(tmp_path))
    assert list(tmp_path.iterdir()) == []  # It has no name: nothing is left of it when the process is killed.
    before = mapped_bytes()
    positions = buffer.positions(np.array([1, 0]), 4000)
    values = np.random.default_rng(0).standard_normal((*positions.shape, buffer.data.shape[1])).astype(dtype)
    buffer.put(positions, values)
    assert mapped_bytes() > before + 10e6
    buffer.release()
    assert mapped_bytes() < before + 2e6
    np.testing.assert_array_equal(buffer.get(positions)[1], values[1])
    assert not buffer.get(positions)[0, 3:].any()


def test_no_room_for_activations_is_an_error_and_no_signal(tmp_path):
    with pytest.raises(OSError, match="bytes are wanted for activations"):
        streaming.ListBuffer([1 << 40], 1 << 10, np.float32, str(tmp_path))


def test_weights_are_rounded_to_bfloat16_when_asked(native):
    checkpoint = native("relu, tied, top-1")
    model = qmoe_jax.SwitchTransformer(checkpoint.config)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), checkpoint.load())
    losses = streaming.run(checkpoint, ONE_SHAPE, streaming.Settings(round_weights=True))
    np.testing.assert_allclose(losses.total, expected_losses(model, rounded)[1:], rtol=1e-5)


def test_bfloat16_activations_give_about_the_same_loss(native, expected):
    losses = streaming.run(native("relu, tied, top-1"), ONE_SHAPE, streaming.Settings(dtype=jnp.bfloat16))
    exact = expected("relu, tied, top-1")[1:].sum()
    assert 0 < abs(losses.total.sum() - exact) < 0.03 * exact


# --- the hook ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_hook_sees_every_expert_once_and_every_token_top_k_times(native, expected, name):
    checkpoint = native(name)
    config = checkpoint.config
    seen = {layer: [] for layer in config.sparse_layers}

    def hook(group):
        assert group.stream == group.layer.split("/")[0]
        assert group.inputs.shape == (
            sum(e if group.stream == "encoder" else d - 1 for e, d in LENGTHS),
            config.d_model,
        )
        assert len(group.tokens) == group.stop - group.start
        for kernel in group.kernels.values():
            assert kernel.shape[0] == group.stop - group.start
        assert list(group.kernels) == list(config.expert_matrices)
        seen[group.layer].append(group)
        return group.kernels

    losses = watched(checkpoint, PAIRS, streaming.Settings(experts_per_group=2), hook)
    np.testing.assert_allclose(losses.total, expected(name), rtol=1e-5)
    for layer, groups in seen.items():
        assert [e for g in groups for e in range(g.start, g.stop)] == list(range(config.num_experts)), layer
        tokens = np.concatenate([t for g in groups for t in g.tokens])
        np.testing.assert_array_equal(np.bincount(tokens), config.top_k, err_msg=layer)
        assert all(np.all(np.diff(t) > 0) for g in groups for t in g.tokens), "in order, and none twice"


def test_hook_sees_the_tokens_that_the_router_sends_to_each_expert(native):
    """Inputs and choices are those of a whole forward pass, in the order of the documents."""
    checkpoint = native("relu, tied, top-1")
    groups = {}

    def hook(group):
        groups[group.layer] = group
        return group.kernels

    watched(checkpoint, PAIRS, streaming.Settings(), hook)
    model, tokens = qmoe_jax.SwitchTransformer(checkpoint.config), padded(PAIRS)
    _, state = forward(model, checkpoint.load())
    for layer, real in (("encoder/layers_1", tokens[0] > 0), ("decoder/layers_0", tokens[2] > 0)):
        stack, name = layer.split("/")
        choice = np.asarray(state["intermediates"][stack][name]["mlp"]["expert_index"][0])[real][:, 0]
        for expert, rows in enumerate(groups[layer].tokens):
            np.testing.assert_array_equal(rows, np.flatnonzero(choice == expert), err_msg=f"{layer}, {expert}")
        logits = np.asarray(state["intermediates"][stack][name]["mlp"]["router_logits"][0])[real]
        router = checkpoint.read(f"{layer}/mlp/router/router_weights/w/kernel")
        np.testing.assert_allclose(groups[layer].inputs @ router, logits, rtol=1e-4, atol=1e-4)


def test_kernels_that_the_hook_returns_are_used(native):
    checkpoint = native("relu, tied, top-1")
    params = jax.tree.map(np.array, checkpoint.load())
    for stack, layer in (("encoder", "layers_1"), ("decoder", "layers_0")):
        params[stack][layer]["mlp"]["expert"]["wo"]["kernel"][2:] *= -3
    expected = expected_losses(qmoe_jax.SwitchTransformer(checkpoint.config), params)

    def hook(group):
        return group.kernels if group.start < 2 else {**group.kernels, "wo": -3 * group.kernels["wo"]}

    losses = watched(checkpoint, PAIRS, streaming.Settings(experts_per_group=2), hook)
    np.testing.assert_allclose(losses.total, expected, rtol=1e-5)


# --- sums and errors --------------------------------------------------------------------------------------------------


def test_loss_of_the_paper_weights_documents_by_their_decoder_length():
    losses = streaming.DocumentLosses(np.array([6.0, 10.0]), np.array([3, 2]))
    # Means 2 and 5 over 3 and 2 predicted tokens; decoders of 4 and 3 tokens.
    assert losses.summary() == {
        "loss": pytest.approx(16 / 5),
        "loss_paper": pytest.approx((4 * 2 + 3 * 5) / 7),
        "num_documents": 2,
        "num_tokens": 5,
    }


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        (
            "encoder/layers_1/mlp/expert/wo/kernel",
            (3, 0, 0),
            r"'encoder/layers_1/mlp/expert/wo/kernel', expert 3: .*NaN",
        ),
        ("decoder/layers_1/self_attention/key/kernel", (2, 1), r"'decoder/layers_1/self_attention/key/kernel': .*NaN"),
        ("token_embedder/embedding", (39, 0), r"'token_embedder/embedding': .*NaN"),
        ("decoder/decoder_norm/scale", (1,), r"'decoder/decoder_norm/scale': .*NaN"),
    ],
)
def test_nan_in_a_weight_names_parameter_and_expert(tmp_path, name, index, message):
    flat = traverse_util.flatten_dict(random_params(SWITCH), sep="/")
    flat[name][index] = np.nan
    checkpoint = qmoe_jax.open_checkpoint(write_t5x(tmp_path, flat))
    with pytest.raises(qmoe_jax.CheckpointError, match=message):
        streaming.run(checkpoint, PAIRS, streaming.Settings(experts_per_group=2))


@pytest.mark.parametrize("field", ["tokens_per_batch", "tokens_per_expert_call", "experts_per_group"])
def test_settings_below_one_are_refused(native, field):
    with pytest.raises(ValueError, match=f"{field}.* 0"):
        streaming.run(native("relu, tied, top-1"), PAIRS, streaming.Settings()._replace(**{field: 0}))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no documents"),
        ([([3, 4], [0, 2]), ([3, 40], [0, 2])], "Document 1 .* 0 to 40.* 0 to 39"),
        ([([3], [0, 40])], "Document 0 .*40"),  # A target is never embedded.
        ([([-1], [0, 2])], "Document 0 .*-1"),
        ([([3], [0])], "Document 0 has 1 encoder and 1 decoder tokens"),
        ([([], [0, 2])], "Document 0 has 0 encoder"),
    ],
)
def test_documents_that_do_not_fit_the_model_are_refused(native, pairs, message):
    pairs = [(np.array(e, np.int32), np.array(d, np.int32)) for e, d in pairs]
    with pytest.raises(ValueError, match=message):
        streaming.run(native("relu, tied, top-1"), pairs, streaming.Settings())


def test_losses_that_are_not_numbers_are_an_error(tmp_path):
    params = random_params(SWITCH)
    params["token_embedder"]["embedding"][5] = 3e38  # No document has it; its logit overflows.
    pairs = [(np.where(e == 5, 6, e), np.where(d == 5, 6, d)) for e, d in ONE_SHAPE]
    with pytest.warns(UserWarning, match="token_embedder/embedding.*weights beyond 10000"):
        checkpoint = qmoe_jax.open_checkpoint(write_t5x(tmp_path, params))
        with pytest.raises(ValueError, match="The loss of document 0 is .*logits are NaN or Inf"):
            streaming.run(checkpoint, pairs, streaming.Settings())
