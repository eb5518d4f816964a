"""Cached decoding against full forward passes, and what `generate` and `sample` promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_switch import forward, softmax
from random_models import CONFIGS, SWITCH, random_params

import qmoe_jax
from qmoe_jax.models.switch.decoding import sample

LENGTH = 7
EOS = 1


def encoder_tokens():
    """Three prompts of 9, 4 and 1 tokens."""
    tokens = np.random.default_rng(5).integers(2, SWITCH.vocab_size, (3, 9)).astype(np.int32)
    tokens[1, 4:] = tokens[2, 1:] = 0
    return tokens


@functools.cache
def model_and_params(name="relu, tied, top-1"):
    return qmoe_jax.SwitchTransformer(CONFIGS[name]), random_params(CONFIGS[name], seed=2)


# Compiling is what takes time here, so the compiler is asked not to optimise.
unoptimised = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(unoptimised, static_argnums=0)
def full_pass(model, params, inputs):
    return model.apply({"params": params}, encoder_tokens(), inputs)


@functools.partial(unoptimised, static_argnums=(0, 2))
def init_cache(model, params, length):
    return model.apply({"params": params}, encoder_tokens(), length, method="init_cache")


@functools.partial(unoptimised, static_argnums=0)
def step(model, params, token, index, caches):
    return model.apply({"params": params}, token, index, caches, encoder_tokens(), method="step")


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_steps_give_the_logits_of_the_full_pass(name):
    model, params = model_and_params(name)
    targets = np.random.default_rng(6).integers(2, SWITCH.vocab_size, (3, LENGTH)).astype(np.int32)
    inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    full = full_pass(model, params, inputs)
    _, reference = forward(params, model.config, encoder_tokens(), inputs, targets)

    # The cache may be longer than what is written.
    caches = init_cache(model, params, LENGTH + 2)
    for index in range(LENGTH):
        logits, caches = step(model, params, inputs[:, index], jnp.int32(index), caches)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, full[:, index], rtol=0, atol=1e-4, err_msg=f"position {index}")
        np.testing.assert_allclose(logits, reference[:, index], rtol=0, atol=1e-4, err_msg=f"position {index}")


def likeliest(model, params, prefix=(), stop=(EOS,), banned=(0,)):
    """What `generate` should write greedily, by one full pass per token."""
    written = np.zeros((3, LENGTH), np.int32)
    ended = np.zeros(3, bool)
    for index in range(LENGTH):
        inputs = np.pad(written[:, :-1], ((0, 0), (1, 0)))
        logits = np.array(full_pass(model, params, inputs))[:, index]
        logits[:, list(banned)] = -np.inf
        token = np.full(3, prefix[index]) if index < len(prefix) else logits.argmax(-1)
        written[:, index] = np.where(ended, 0, token)
        ended |= (index >= len(prefix)) & np.isin(token, stop)
    return written


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_argmax_of_full_passes(name):
    model, params = model_and_params(name)
    written = qmoe_jax.generate(model, params, encoder_tokens(), max_length=LENGTH)
    assert written.dtype == jnp.int32
    np.testing.assert_array_equal(written, likeliest(model, params))


def test_stop_prefix_and_banned_tokens():
    model, params = model_and_params()
    banned = (0, int(likeliest(model, params)[2, 2]))
    prefix = (9, 7)
    free = likeliest(model, params, prefix, (), banned)
    stop = (int(free[0, 3]), int(free[1, 5]), 9)  # 9 is in the prefix, where it ends nothing.
    written = qmoe_jax.generate(
        model, params, encoder_tokens(), max_length=LENGTH, prefix=prefix, stop=stop, banned=banned
    )
    written = np.asarray(written)
    np.testing.assert_array_equal(written, likeliest(model, params, prefix, stop, banned))
    assert (written[:, :2] == prefix).all()
    assert not np.isin(written, banned[1:]).any()
    ends = [np.flatnonzero(np.isin(row[2:], stop)) for row in written]
    assert any(len(end) for end in ends), "no row was stopped"
    for row, end in zip(written[:, 2:], ends, strict=True):
        assert not row[end[0] + 1 :].any() if len(end) else row.all()


def test_generation_from_compressed_experts_equals_that_from_dense_ones():
    model, params = model_and_params()
    rng = np.random.default_rng(8)
    compressed, dense = jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, params)
    for stack, layer in (("encoder", "layers_1"), ("decoder", "layers_0")):
        for matrix, (width, out) in {"wi": (12, 20), "wo": (20, 12)}.items():
            trits = rng.integers(0, 3, (4, out, width)).astype(np.uint8)
            experts = qmoe_jax.CompressedExperts.from_symbols(
                trits, np.tile(np.float32([-0.5, 0.75]), (4, out, 1)), codec="dictionary"
            )
            compressed[stack][layer]["mlp"]["expert"][matrix]["kernel"] = experts
            values = np.float32([0, -0.5, 0.75])[trits]
            dense[stack][layer]["mlp"]["expert"][matrix]["kernel"] = values.swapaxes(1, 2)
    written = qmoe_jax.generate(model, compressed, encoder_tokens(), max_length=LENGTH)
    np.testing.assert_array_equal(written, likeliest(model, dense))


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_sampling_is_reproducible_by_its_key():
    model, params = model_and_params()
    write = functools.partial(
        qmoe_jax.generate, model, params, encoder_tokens(), max_length=LENGTH, temperature=1.5, top_p=0.95
    )
    first, again, other = write(key=jax.random.key(0)), write(key=jax.random.key(0)), write(key=jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert not np.any(np.asarray(first)[:, 0] == 0), "padding is banned unless asked for"


def test_sampled_tokens_follow_the_tempered_softmax():
    logits = jnp.array([[1.0, 0.0, 2.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda k: sample(logits, k, 0.7, 1.0)[0])(keys)
    frequency = np.bincount(np.asarray(drawn), minlength=4) / 4000
    np.testing.assert_allclose(frequency, softmax(np.asarray(logits[0]) / 0.7), atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(0.3, {1}), (0.5, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.81, {0, 1, 3}), (1.0, {0, 1, 2, 3})],
)
def test_sampling_stays_inside_the_nucleus_and_reaches_all_of_it(top_p, nucleus):
    # Probabilities .15, .5, .05, .3: the smallest set of likeliest tokens that reaches top_p.
    logits = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]]))
    keys = jax.random.split(jax.random.key(1), 500)
    drawn = jax.vmap(lambda k: sample(logits, k, 1.0, top_p)[0])(keys)
    assert set(np.asarray(drawn).tolist()) == nucleus


def test_nucleus_of_each_row_is_its_own():
    logits = jnp.log(jnp.array([[0.97, 0.01, 0.02], [0.02, 0.01, 0.97]]))
    keys = jax.random.split(jax.random.key(2), 50)
    drawn = np.asarray(jax.vmap(lambda k: sample(logits, k, 1.0, 0.9))(keys))
    assert (drawn == [0, 2]).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_little_or_no_temperature_is_greedy(temperature):
    logits = jax.random.normal(jax.random.key(3), (5, 30))
    token = sample(logits, jax.random.key(4), temperature, 1.0)
    assert token.dtype == jnp.int32
    np.testing.assert_array_equal(token, np.asarray(logits).argmax(-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"temperature": 0.5}, "PRNG key"),
        ({"max_length": 2, "prefix": (5, 6)}, "2 prefix tokens"),
        ({"max_length": 0}, "max_length: found 0"),
        ({"max_length": 10**8}, "max_length: found 100000000"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf"), "key": 0}, "temperature inf"),
        ({"top_p": float("nan")}, "top_p nan"),
        ({"stop": (40,)}, "stop .*40.* 0 to 39"),
        ({"banned": (0, -1)}, "banned .*-1.* 0 to 39"),
        ({"prefix": (1, 400)}, "prefix .*400.* 0 to 39"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    model, params = model_and_params()
    with pytest.raises(ValueError, match=message):
        qmoe_jax.generate(model, params, encoder_tokens(), **{"max_length": LENGTH, **settings})


@pytest.mark.parametrize("settings", [{"max_length": "7"}, {"temperature": "hot"}, {"stop": 1}, {"banned": [0.5]}])
def test_settings_of_another_kind_are_named(settings):
    model, params = model_and_params()
    with pytest.raises(TypeError, match=next(iter(settings))):
        qmoe_jax.generate(model, params, encoder_tokens(), **{"max_length": LENGTH, **settings})


def test_logits_that_are_not_numbers_are_an_error():
    model, params = model_and_params()
    embedding = np.array(params["token_embedder"]["embedding"])
    embedding[5] = 3e38  # A token that no prompt has; its logit overflows.
    broken = {**params, "token_embedder": {"embedding": embedding}}
    with pytest.raises(ValueError, match="Logits are NaN or Inf"):
        qmoe_jax.generate(model, broken, np.full((1, 3), 4, np.int32), max_length=LENGTH)
