"""Decoder-only models: cache, streamed pass, devices and dtypes tell the same as a whole forward pass."""

import functools

import hugging_face
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from random_decoders import CONFIGS, model_and_params

import qmoe_jax
from qmoe_jax import streaming
from qmoe_jax.models.decoder.decoding import written
from qmoe_jax.models.expert_parallel import expert_mesh, place_experts, replicate
from qmoe_jax.models.families import family_of
from qmoe_jax.quantization.gptq import round_to_nearest

FAMILIES = sorted(CONFIGS)
LENGTHS = np.array([11, 3, 7, 1])
NEW = 9


# Those whose attention and routing are like no other's; all of them meet their fixtures in `make test` too.
UNLIKE = ("deepseek_v3", "gpt_oss")


@pytest.fixture(
    scope="module", params=[n if n in UNLIKE else pytest.param(n, marks=pytest.mark.long) for n in FAMILIES]
)
def name(request):
    return request.param


def prompts(config, seed=1):
    tokens = np.random.RandomState(seed).randint(3, config.vocab_size, (len(LENGTHS), LENGTHS.max()))
    return np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], tokens, 0)


def greedy_by_full_passes(model, params, tokens, lengths, new):
    """Tokens written one at a time, each from a forward pass over the whole text."""
    text = np.pad(tokens, ((0, 0), (0, new)))
    rows = np.arange(len(text))
    for i in range(new):
        logits = np.asarray(qmoe_jax.forward(model, params, text))
        text[rows, lengths + i] = logits[rows, lengths + i - 1].argmax(-1)
    return np.stack([row[n : n + new] for row, n in zip(text, lengths, strict=True)])


def test_shapes_are_those_of_the_modules(name):
    config = CONFIGS[name]
    family = family_of(config)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    variables = jax.eval_shape(family.model(config, jnp.float32, None).init, jax.random.key(0), tokens)
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    assert {n: p.shape for n, p in flat.items()} == family.param_shapes(config)


def test_padding_changes_nothing(name):
    """Neither what is there nor whether lengths are told."""
    model, params = model_and_params(name)
    tokens = prompts(model.config)
    other = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], tokens, 5)
    real = np.arange(LENGTHS.max()) < LENGTHS[:, None]
    logits = [
        np.asarray(qmoe_jax.forward(model, params, t, lengths=n))[real]
        for t, n in ((tokens, None), (other, None), (other, LENGTHS))
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_allclose(logits[0], logits[2], atol=1e-5)


def test_cached_generation_is_that_of_full_passes(name):
    """Prompts of different lengths in one batch, longer than the windows."""
    model, params = model_and_params(name)
    tokens = prompts(model.config)
    expected = greedy_by_full_passes(model, params, tokens, LENGTHS, NEW)
    found = qmoe_jax.generate(model, params, tokens, max_length=NEW, lengths=LENGTHS, stop=())
    np.testing.assert_array_equal(found, expected)


def test_cached_logits_are_those_of_full_passes(name):
    model, params = model_and_params(name)
    rng = np.random.RandomState(2)
    text = rng.randint(3, model.config.vocab_size, (len(LENGTHS), LENGTHS.max() + NEW))
    full = np.asarray(qmoe_jax.forward(model, params, text))
    apply = functools.partial(model.apply, {"params": params})
    lengths, rows = jnp.asarray(LENGTHS), np.arange(len(text))
    fill = jax.jit(functools.partial(apply, method="fill"), static_argnums=2)
    logits, caches = fill(text[:, : LENGTHS.max()], lengths, text.shape[1])
    step = jax.jit(functools.partial(apply, method="step"))
    for i in range(NEW):
        np.testing.assert_allclose(logits, full[rows, LENGTHS + i - 1], atol=2e-4)
        logits, caches = step(jnp.asarray(text[rows, LENGTHS + i]), lengths + i, caches)


def test_sliding_layers_keep_a_window():
    model, params = model_and_params("gpt_oss")
    fill = functools.partial(model.apply, {"params": params}, method="fill")
    _, caches = fill(prompts(model.config), jnp.asarray(LENGTHS), 40)
    assert [c.memory[0].shape[1] for c in caches] == [4, 40, 4]


def test_latents_are_what_is_cached():
    model, params = model_and_params("deepseek_v3")
    _, caches = model.apply({"params": params}, prompts(model.config), jnp.asarray(LENGTHS), 40, method="fill")
    c = model.config
    assert [m.shape for m in caches[0].memory] == [(4, 40, c.kv_lora_rank), (4, 40, c.qk_rope_head_dim)]


def test_stop_ban_and_pad():
    model, params = model_and_params("olmoe")
    tokens = prompts(model.config)
    generate = functools.partial(qmoe_jax.generate, model, params, tokens, max_length=NEW, lengths=LENGTHS)
    free = np.asarray(generate(stop=()))
    stop = int(free[0, 2])
    stopped = np.asarray(generate(stop=(stop,), pad=60))
    for row, found in zip(free, stopped, strict=True):
        end = np.flatnonzero(row == stop)[0] + 1 if stop in row else NEW
        np.testing.assert_array_equal(found[:end], row[:end])
        assert (found[end:] == 60).all()
    assert stop not in np.asarray(generate(stop=(), banned=(stop,)))


def test_sampling():
    model, params = model_and_params("olmoe")
    tokens = prompts(model.config)
    generate = functools.partial(qmoe_jax.generate, model, params, tokens, max_length=NEW, lengths=LENGTHS, stop=())
    sampled = np.asarray(generate(temperature=2.0, key=jax.random.key(3)))
    np.testing.assert_array_equal(sampled, generate(temperature=2.0, key=jax.random.key(3)))
    assert (sampled != np.asarray(generate(temperature=2.0, key=jax.random.key(4)))).any()
    # Of so small a set of tokens none but the likeliest is left.
    np.testing.assert_array_equal(generate(temperature=1.0, top_p=1e-6, key=jax.random.key(3)), generate())


def test_tokens_as_they_come():
    model, params = model_and_params("olmoe")
    tokens = prompts(model.config)
    options = dict(max_length=NEW, lengths=LENGTHS, temperature=2.0, key=jax.random.key(0), stop=())
    one_by_one = np.stack(list(written(model, params, tokens, **options)), axis=1)
    np.testing.assert_array_equal(one_by_one, qmoe_jax.generate(model, params, tokens, **options))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(lengths=[0, 1, 1, 1]), "lengths: found 0 to 1, expected 1 to 11"),
        (dict(lengths=[1, 1]), "lengths: int"),
        (dict(max_length=0), "max_length: found 0"),
        (dict(stop=(99,)), "stop"),
        (dict(temperature=1.0), "key"),
        (dict(tokens=np.full((1, 3), 61)), "tokens: found ids from 61"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    model, params = model_and_params("olmoe")
    arguments = {"tokens": prompts(model.config), "max_length": 3} | arguments
    with pytest.raises(ValueError, match=message):
        qmoe_jax.generate(model, params, arguments.pop("tokens"), **arguments)


def test_eight_devices_are_one(name):
    model, params = model_and_params(name)
    tokens = prompts(model.config)
    mesh = expert_mesh(8)
    family = family_of(model.config)

    def place(path, value):
        n = "/".join(k.key for k in path)
        return place_experts(value, mesh) if family.expert_of(n) else replicate(value, mesh)

    spread = family.model(model.config, jnp.float32, mesh)
    placed = jax.tree_util.tree_map_with_path(place, params)
    real = np.arange(LENGTHS.max()) < LENGTHS[:, None]
    one, eight = (
        np.asarray(qmoe_jax.forward(*pair, tokens, lengths=LENGTHS))[real]
        for pair in ((model, params), (spread, placed))
    )
    np.testing.assert_allclose(eight, one, atol=2e-5, rtol=0)
    if name == "gpt_oss":
        options = dict(max_length=NEW, lengths=LENGTHS, stop=())
        expected = qmoe_jax.generate(model, params, tokens, **options)
        np.testing.assert_array_equal(qmoe_jax.generate(spread, placed, tokens, **options), expected)
        one_by_one = list(family.written(spread, placed, tokens, **options))
        np.testing.assert_array_equal(np.stack(one_by_one, axis=1), expected)


def test_compressed_experts():
    """Logits and tokens are those of the matrices that they stand for."""
    model, params = model_and_params("gpt_oss")
    flat = traverse_util.flatten_dict(params, sep="/")
    dense, compressed = dict(flat), dict(flat)
    for name in filter(family_of(model.config).expert_of, flat):
        rounded = round_to_nearest(flat[name].swapaxes(1, 2), bits=1.5)
        experts = qmoe_jax.CompressedExperts.from_symbols(np.asarray(rounded.symbols), rounded.levels, "gap")
        compressed[name], dense[name] = experts, jnp.asarray(experts.to_dense(), jnp.float32).swapaxes(1, 2)
    dense, compressed = (traverse_util.unflatten_dict(p, sep="/") for p in (dense, compressed))
    tokens = prompts(model.config)
    logits = [np.asarray(qmoe_jax.forward(model, p, tokens)) for p in (dense, compressed)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    options = dict(max_length=NEW, lengths=LENGTHS, stop=())
    found = [qmoe_jax.generate(model, p, tokens, **options) for p in (dense, compressed)]
    np.testing.assert_array_equal(found[1], found[0])


# --- The streamed pass ------------------------------------------------------------------------------------------------

SETTINGS = {
    "all at once": streaming.Settings(),
    "a row, few tokens, groups of three experts": streaming.Settings(
        tokens_per_batch=1, tokens_per_expert_call=16, experts_per_group=3
    ),
}


def examples(config, lengths=(40, 9, 2, 33, 17)):
    rng = np.random.RandomState(5)
    return [(rng.randint(0, config.vocab_size, n).astype(np.int32),) for n in lengths]


def expected_losses(model, params, texts):
    """Of all examples in one padded batch."""
    lengths = np.array([len(tokens) - 1 for (tokens,) in texts])
    padded = np.stack([np.pad(tokens, (0, lengths.max() + 1 - len(tokens))) for (tokens,) in texts])
    logits = qmoe_jax.forward(model, params, padded[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, padded[:, 1:])
    return np.sum(np.where(np.arange(lengths.max()) < lengths[:, None], losses, 0), axis=1)


def test_streamed_losses_are_those_of_whole_passes(name):
    model, params = model_and_params(name)
    texts = examples(model.config)
    checkpoint = hugging_face.InMemory(model.config, params)
    expected = expected_losses(model, params, texts)
    for settings in SETTINGS.values():
        losses = streaming.run(checkpoint, texts, settings)
        np.testing.assert_allclose(losses.total, expected, rtol=2e-5)
        np.testing.assert_array_equal(losses.tokens, [len(t) - 1 for (t,) in texts])


def test_streamed_over_devices():
    model, params = model_and_params("gpt_oss")
    texts, checkpoint = examples(model.config), hugging_face.InMemory(model.config, params)
    settings = streaming.Settings(mesh=expert_mesh(4), experts_per_group=4)
    losses = streaming.run(checkpoint, texts, settings)
    np.testing.assert_allclose(losses.total, expected_losses(model, params, texts), rtol=2e-5)


def test_streamed_in_bfloat16():
    model, params = model_and_params("gpt_oss")
    texts, checkpoint = examples(model.config), hugging_face.InMemory(model.config, params)
    losses = streaming.run(checkpoint, texts, streaming.Settings(dtype=jnp.bfloat16))
    np.testing.assert_allclose(losses.total, expected_losses(model, params, texts), rtol=0.05)


def test_groups_of_experts_don_t_show():
    """What a token gets doesn't depend on which experts are computed together, to the bit, though it has three."""
    model, params = model_and_params("olmoe")
    texts, checkpoint = examples(model.config), hugging_face.InMemory(model.config, params)
    totals = [streaming.run(checkpoint, texts, streaming.Settings(experts_per_group=n)).total for n in (1, 3, 8)]
    np.testing.assert_array_equal(totals[0], totals[1])
    np.testing.assert_array_equal(totals[0], totals[2])
