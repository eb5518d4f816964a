"""The whole model: against Flaxformer's outputs, and against a float64 reference on random models."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy_switch import cross_entropy, forward
from random_models import CONFIGS, EXPERTS_CHOOSE, SWITCH, padded, random_pairs, random_params

import qmoe_jax
from qmoe_jax.quantization import round_to_nearest

TOKENS = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
TOKENS_CHOOSE = {"top_k": 2, "min_expert_capacity": 4}
# Checkpoint, whose io.npz, overrides, evaluation capacity factor.
FIXTURES = [
    ("switch_base_tiny", "switch_base_tiny", {}, 2.0),
    ("switch_base_tiny_orbax", "switch_base_tiny", {}, 2.0),
    ("switch_c_tiny", "switch_c_tiny", {}, 2.0),
    ("switch_xxl_tiny", "switch_xxl_tiny", {}, 4.0),
    ("tokens_choose_tiny", "tokens_choose_tiny", TOKENS_CHOOSE, 4.0),
    ("switch_base_scan_tiny", "switch_base_scan_tiny", {}, 2.0),
]


# Compiling is what takes time here, so the compiler is asked not to optimise.
@functools.partial(
    jax.jit, static_argnames=("model", "capacity_factor"), compiler_options={"xla_backend_optimization_level": 0}
)
def run(model, params, tokens, capacity_factor=None):
    """Logits and intermediates."""
    logits, state = model.apply({"params": params}, *tokens, capacity_factor, mutable=["intermediates"])
    return logits, state["intermediates"]


@pytest.mark.parametrize("capacity", ["unlimited", "gin"])
@pytest.mark.parametrize(("checkpoint", "expected", "overrides", "factor"), FIXTURES, ids=[f[0] for f in FIXTURES])
def test_every_activation_is_that_of_flaxformer(fixture_path, checkpoint, expected, overrides, factor, capacity):
    model, params = qmoe_jax.load(fixture_path(checkpoint), **overrides)
    suffix, factor = ("", None) if capacity == "unlimited" else ("_gin_capacity", factor)
    with np.load(fixture_path(expected) / "io.npz") as io:
        tokens = [io[name] for name in TOKENS]
        expected = {k.removesuffix(suffix): io[k] for k in io.files if k.endswith("_gin_capacity") == bool(suffix)}
    logits, found = run(model, params, tokens, factor)

    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["encoder_output"][0], expected["encoder_output"], rtol=0, atol=1e-4)
    for stack in ("encoder", "decoder"):
        if f"{stack}_hidden" in expected:
            np.testing.assert_allclose(found[stack]["hidden"], expected[f"{stack}_hidden"], rtol=0, atol=1e-4)
    for layer in model.config.sparse_layers if len(expected) > 5 else ():
        stack, name = layer.split("/")
        sown = found[stack][name]["mlp"]
        for what, compare in (
            ("expert_index", np.testing.assert_array_equal),
            ("router_logits", functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)),
            ("combine_weight", functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)),
        ):
            compare(sown[what][0], expected[f"{stack}_{name}_{what}"], err_msg=f"{layer} {what}")


def test_public_forward_gives_flaxformers_logits_of_a_top_2_model(fixture_path):
    path = fixture_path("tokens_choose_tiny")
    io = np.load(path / "io.npz")
    model, params = qmoe_jax.load(path, **TOKENS_CHOOSE)
    logits = qmoe_jax.forward(model, params, *(io[name] for name in TOKENS), capacity_factor=4.0)
    np.testing.assert_allclose(logits, io["logits_gin_capacity"], rtol=0, atol=1e-4)


def test_fixtures_at_finite_capacity_do_drop_tokens(fixture_path):
    for name in ("switch_base_tiny", "tokens_choose_tiny"):
        io = np.load(fixture_path(name) / "io.npz")
        weights = [io[k] for k in io.files if k.endswith("combine_weight_gin_capacity")]
        assert any((w == 0).any() for w in weights), name


def test_log_probabilities_of_a_trained_bfloat16_checkpoint(fixture_path):
    path = fixture_path("switch_mini")
    io = np.load(path / "io.npz")
    model, params = qmoe_jax.load(path)
    logits, found = run(model, params, [io[name] for name in TOKENS])
    np.testing.assert_allclose(found["encoder_output"][0], io["encoder_output"], rtol=0, atol=1e-4)
    for layer in model.config.sparse_layers:
        stack, name = layer.split("/")
        sown = found[stack][name]["mlp"]["expert_index"][0]
        np.testing.assert_array_equal(sown, io[f"{stack}_{name}_expert_index"], err_msg=layer)
    targets = io["decoder_target_tokens"]
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)[..., 0]
    expected = io["target_log_probability"]
    np.testing.assert_allclose(log_p[targets > 0], expected[targets > 0], rtol=0, atol=1e-4)
    assert np.mean(log_p[targets > 0]) == pytest.approx(-3.5486, abs=1e-4)


# --- a random model against float64 NumPy ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def random_model(request):
    model = qmoe_jax.SwitchTransformer(request.param)
    return model, random_params(request.param)


@pytest.fixture(scope="module")
def tokens():
    # One document fills all positions, one is short, one is shorter than what its router groups expect.
    return padded(random_pairs(SWITCH, [(21, 12), (9, 5), (14, 8)]))


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_random_model_agrees_with_float64_reference(random_model, tokens, capacity_factor):
    model, params = random_model
    encoded, expected = forward(params, model.config, *tokens, capacity_factor)
    logits, found = run(model, params, tokens, capacity_factor)
    np.testing.assert_allclose(found["encoder_output"][0], encoded, rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    dropped = [
        np.asarray(layer["mlp"]["combine_weight"][0]) == 0
        for stack in ("encoder", "decoder")
        for name, layer in found[stack].items()
        if name.startswith("layers")
    ]
    assert np.any([d.any() for d in dropped]) == (capacity_factor is not None)


def test_where_experts_choose_it_agrees_with_float64_reference(tokens):
    model, params = qmoe_jax.SwitchTransformer(EXPERTS_CHOOSE), random_params(EXPERTS_CHOOSE)
    encoded, expected = forward(params, EXPERTS_CHOOSE, *tokens)
    logits, found = run(model, params, tokens)
    np.testing.assert_allclose(found["encoder_output"][0], encoded, rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_padding_rows_are_zero(random_model, tokens):
    model, params = random_model
    encoder, inputs, targets = tokens
    logits, found = run(model, params, tokens)
    assert not np.any(np.asarray(found["encoder_output"][0])[encoder == 0])
    # The first position after a document's end is fed its last token, and is not masked.
    fed = (inputs > 0) | (np.arange(inputs.shape[1]) == 0)
    assert not np.any(np.asarray(logits)[~fed])


def test_without_targets_logits_at_real_positions_are_the_same(tokens):
    model, params = qmoe_jax.SwitchTransformer(SWITCH), random_params(SWITCH)
    encoder, inputs, targets = tokens
    with_targets, _ = run(model, params, tokens)
    without = qmoe_jax.forward(model, params, encoder, inputs)
    real = targets > 0
    np.testing.assert_allclose(np.asarray(without)[real], np.asarray(with_targets)[real], rtol=0, atol=2e-5)


def test_decoder_does_not_look_ahead(tokens):
    model, params = qmoe_jax.SwitchTransformer(SWITCH), random_params(SWITCH)
    encoder, inputs, targets = tokens
    changed_inputs, changed_targets = inputs.copy(), targets.copy()
    changed_inputs[0, 6:] = changed_targets[0, 5:-1] = 3
    before, _ = run(model, params, [encoder, inputs, targets])
    after, _ = run(model, params, [encoder, changed_inputs, changed_targets])
    np.testing.assert_allclose(after[0, :6], before[0, :6], rtol=0, atol=1e-5)
    assert np.abs(after[0, 6:] - before[0, 6:]).max() > 0.1


# --- dtypes -----------------------------------------------------------------------------------------------------------


def test_bfloat16_activations_with_float32_router_and_logits(random_model, tokens):
    model, params = random_model
    exact, _ = run(model, params, tokens)
    rounded = qmoe_jax.SwitchTransformer(model.config, jnp.bfloat16)
    logits, found = run(rounded, params, tokens)
    assert logits.dtype == jnp.float32
    assert found["encoder_output"][0].dtype == jnp.bfloat16
    assert {x.dtype for x in found["decoder"]["hidden"]} == {jnp.dtype(jnp.bfloat16)}
    for layer in model.config.sparse_layers:
        stack, name = layer.split("/")
        sown = found[stack][name]["mlp"]
        assert sown["router_logits"][0].dtype == sown["combine_weight"][0].dtype == jnp.float32
        # No router logit is one that bfloat16 could hold by chance throughout.
        as_bfloat16 = np.asarray(sown["router_logits"][0]).astype(ml_dtypes.bfloat16).astype(np.float32)
        assert (as_bfloat16 != np.asarray(sown["router_logits"][0])).mean() > 0.3
    error = np.abs(np.asarray(logits) - np.asarray(exact))
    assert 0 < np.median(error) < 0.05 * np.std(exact)


def test_bfloat16_parameters_in_float32_are_used_as_they_are_stored(tokens):
    model = qmoe_jax.SwitchTransformer(SWITCH)
    stored = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), random_params(SWITCH))
    _, expected = forward(stored, SWITCH, *tokens)
    logits, _ = run(model, stored, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# --- compressed experts -----------------------------------------------------------------------------------------------


def compressed_and_dequantized(params, config):
    """Two parameter trees with ternary experts: compressed, and dense with the same values."""
    compressed, dense = jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, params)
    for layer in config.sparse_layers:
        stack, name = layer.split("/")
        for matrix in config.expert_matrices:
            kernel = params[stack][name]["mlp"]["expert"][matrix]["kernel"]  # [experts, in, out]
            # Minima and maxima are weights, so the grid of bfloat16 weights is exact in bfloat16.
            kernel = kernel.astype(ml_dtypes.bfloat16).astype(np.float32)
            q = round_to_nearest(jnp.asarray(kernel.swapaxes(1, 2)), bits=1.5)
            experts = qmoe_jax.CompressedExperts.from_symbols(np.asarray(q.symbols), q.levels, codec="dictionary")
            compressed[stack][name]["mlp"]["expert"][matrix] = {"kernel": experts}
            dense[stack][name]["mlp"]["expert"][matrix] = {"kernel": np.asarray(q.Q).swapaxes(1, 2)}
    return compressed, dense


def test_compressed_experts_give_the_logits_of_their_dequantized_weights(random_model, tokens):
    model, params = random_model
    compressed, dense = compressed_and_dequantized(params, model.config)
    _, expected = forward(dense, model.config, *tokens)
    assert np.abs(expected - forward(params, model.config, *tokens)[1]).max() > 0.1, "rounding had no effect"
    for tree in (dense, compressed):
        logits, _ = run(model, tree, tokens)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_compressed_experts_with_bfloat16_activations(tokens):
    model = qmoe_jax.SwitchTransformer(SWITCH, jnp.bfloat16)
    # Levels are bfloat16, so casting the dense kernels for the product loses nothing.
    compressed, dense = compressed_and_dequantized(random_params(SWITCH), SWITCH)
    np.testing.assert_array_equal(run(model, compressed, tokens)[0], run(model, dense, tokens)[0])


# --- parameters -------------------------------------------------------------------------------------------------------


def test_initialised_parameters_are_those_of_a_checkpoint(random_model, tokens):
    model, params = random_model
    made = jax.eval_shape(model.init, jax.random.key(0), *tokens)["params"]
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, params)
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}


def test_cross_entropy_of_reference_is_log_likelihood():
    logits = np.log(np.array([[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]]))
    assert cross_entropy(logits, np.array([[2, 0]])) == pytest.approx(-np.log(0.3))
