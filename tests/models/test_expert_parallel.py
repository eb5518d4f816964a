"""Experts over the devices of a mesh: the same results as on one, and no device has another's experts."""

import dataclasses
import functools

import distributed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from random_models import SWITCH, random_pairs, random_params
from test_compressed_experts import compress

import qmoe_jax
from qmoe_jax import codecs, streaming
from qmoe_jax.checkpoints import write_t5x
from qmoe_jax.codecs.experts import split
from qmoe_jax.models import expert_parallel
from qmoe_jax.models.expert_parallel import exchange, expert_mesh, place_experts, place_param
from qmoe_jax.models.experts import apply_experts
from qmoe_jax.models.switch.config import PLAIN
from qmoe_jax.models.switch.routing import route

KINDS = [None, *codecs.CODECS]


# --- exchange -------------------------------------------------------------------------------------------------------


def scaled(rows, expert, kernels):
    """A row's 'expert' is a factor: exact, whatever else is in the call."""
    (factors,) = kernels
    assert factors.shape == (2,)  # This device's own.
    return rows * factors[jnp.minimum(expert, 1)][:, None]


@pytest.mark.parametrize("least_slots", [1, 64], ids=["several rounds", "one round"])
@pytest.mark.parametrize("rows", [40, 33, 3, 1])
@pytest.mark.parametrize("routing", ["spread", "all to one", "sorted"])
def test_every_row_meets_its_expert(routing, rows, least_slots, monkeypatch):
    monkeypatch.setattr(expert_parallel, "LEAST_SLOTS", least_slots)
    rng = np.random.default_rng(rows)
    expert = np.full(rows, 5) if routing == "all to one" else rng.integers(0, 8, rows)
    expert = np.sort(expert) if routing == "sorted" else expert
    x, factors = rng.normal(size=(rows, 3)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    mesh = expert_mesh(4)
    run = jax.jit(functools.partial(exchange, scaled, mesh=mesh))
    found = run(x, expert.astype(np.int32), [place_experts(factors, mesh)])
    np.testing.assert_array_equal(found, x * factors[expert][:, None])


def test_rows_of_an_expert_come_in_the_order_of_all_tokens():
    def rank(rows, expert, kernels):  # How many earlier rows the expert has got, twice over.
        earlier = jnp.tril(expert[:, None] == expert, -1).sum(1)
        return jnp.stack([earlier, earlier], axis=1).astype(rows.dtype)

    expert = np.random.default_rng(0).integers(0, 8, 37).astype(np.int32)
    mesh = expert_mesh(4)
    found = jax.jit(functools.partial(exchange, rank, mesh=mesh))(
        np.zeros((37, 2), np.float32), expert, [place_experts(np.zeros(8, np.float32), mesh)]
    )
    np.testing.assert_array_equal(found[:, 0], [np.sum(expert[:i] == e) for i, e in enumerate(expert)])


# --- placing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_no_device_has_anothers_experts(codec):
    kernel = np.random.default_rng(0).normal(size=(8, 24, 40)).astype(np.float32)
    kernel[3] = 0  # Streams of very different lengths.
    whole = compress(kernel, codec)
    mesh = expert_mesh(4)
    placed = place_experts(whole, mesh)
    assert placed.shape == whole.shape
    for i, device in enumerate(mesh.devices):
        shards = jax.tree.map(lambda a, d=device: next(s.data for s in a.addressable_shards if s.device == d), placed)
        own = jax.tree.map(lambda a: a[0], shards.parts)
        np.testing.assert_array_equal(own.to_dense(), whole.to_dense()[2 * i : 2 * i + 2])
        longest = max(part.resident_nbytes for part in split(whole, 4))
        assert own.resident_nbytes <= longest  # With padding, a device holds no more than the largest part.


def test_devices_that_do_not_divide_the_experts():
    with pytest.raises(ValueError, match="6 experts on 4 devices: expected a number of devices that divides"):
        place_experts(np.zeros((6, 2, 2), np.float32), expert_mesh(4))


def test_more_devices_than_there_are():
    with pytest.raises(ValueError, match="99 devices; there are 8"):
        expert_mesh(99)


# --- model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [pytest.param(1, marks=pytest.mark.long), 2])
def test_apply_experts_is_that_of_one_device(top_k, kind):
    rng = np.random.default_rng(0)
    tokens, d_model, hidden = 61, 24, 40
    shapes = {"wi": (8, d_model, hidden), "wo": (8, hidden, d_model)}
    kernels = {m: rng.normal(size=s).astype(np.float32) for m, s in shapes.items()}
    kernels = {m: compress(k, kind) for m, k in kernels.items()} if kind else kernels
    x = rng.normal(size=(tokens, d_model)).astype(np.float32)
    routing = route(jax.nn.softmax(rng.normal(size=(tokens, 8)).astype(np.float32)), top_k)
    mesh = expert_mesh(8)
    apply = functools.partial(apply_experts, PLAIN)
    placed = {m: place_experts(k, mesh) for m, k in kernels.items()}
    found = jax.jit(functools.partial(apply, mesh=mesh))(x, routing, placed)
    np.testing.assert_allclose(found, jax.jit(apply)(x, routing, kernels), rtol=1e-5, atol=1e-5)


@functools.cache
def small_model(top_k=1, codec=None):
    """Config of 8 experts, and its parameters by '/'-joined name."""
    config = dataclasses.replace(SWITCH, num_experts=8, d_model=24, d_ff=40, top_k=top_k)
    flat = traverse_util.flatten_dict(random_params(config), sep="/")
    if codec:
        flat = {n: compress(v, codec) if "/mlp/expert/" in n else v for n, v in flat.items()}
    return config, flat


def on_mesh(config, flat, mesh):
    params = {n: place_param(n, v, mesh, "/mlp/expert/" in n) for n, v in flat.items()}
    return qmoe_jax.SwitchTransformer(config, mesh=mesh), traverse_util.unflatten_dict(params, sep="/")


def tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(2, SWITCH.vocab_size, (batch, length)).astype(np.int32)


@pytest.mark.parametrize(
    "kind, top_k, batch, devices, capacity_factor",
    [
        ("gap", 2, 3, 8, None),
        ("dictionary", 2, 8, 8, 1.25),
        pytest.param("gap", 1, 4, 4, None, marks=pytest.mark.long),
        pytest.param(None, 1, 3, 2, 1.25, marks=pytest.mark.long),
        pytest.param(None, 2, 8, 4, None, marks=pytest.mark.long),
    ],
)
def test_logits_are_those_of_one_device(kind, top_k, batch, devices, capacity_factor):
    model = small_model(top_k, kind)
    encoder, decoder = tokens(batch, 9), tokens(batch, 5, seed=1)
    one, many = (
        np.asarray(qmoe_jax.forward(*on_mesh(*model, mesh), encoder, decoder, capacity_factor=capacity_factor))
        for mesh in (None, expert_mesh(devices))
    )
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.long)])
def test_generated_tokens_are_those_of_one_device(batch):
    model = small_model(2, "gap")
    one, many = (
        qmoe_jax.generate(*on_mesh(*model, mesh), tokens(batch, 6), max_length=7, stop=())
        for mesh in (None, expert_mesh(4))
    )
    np.testing.assert_array_equal(many, one)


@pytest.mark.long
def test_streamed_losses_are_those_of_one_device(tmp_path):
    config, flat = small_model(top_k=2)
    checkpoint = qmoe_jax.open_checkpoint(write_t5x(tmp_path, flat), top_k=2)
    pairs = random_pairs(config, [(7, 5), (9, 4), (30, 9), (12, 8), (3, 2)])
    settings = streaming.Settings(tokens_per_batch=128, tokens_per_expert_call=24, experts_per_group=4)
    one, many = (streaming.run(checkpoint, pairs, settings._replace(mesh=mesh)) for mesh in (None, expert_mesh(8)))
    np.testing.assert_allclose(many.total, one.total, rtol=1e-5)


# --- processes ------------------------------------------------------------------------------------------------------

CODE = """
import numpy as np
from jax.experimental import multihost_utils
import qmoe_jax
import test_expert_parallel as t
model = t.on_mesh(*t.small_model(2, "gap"), qmoe_jax.expert_mesh(4))
logits = qmoe_jax.forward(*model, t.tokens(4, 9), t.tokens(4, 5, seed=1))
logits = multihost_utils.process_allgather(logits, tiled=True)
written = qmoe_jax.generate(*model, t.tokens(3, 6), max_length=7, stop=())
np.savez(f"{arguments[0]}/{index}.npz", logits=logits, written=np.asarray(written))
"""


@pytest.mark.long
def test_two_processes_have_the_results_of_one_device(tmp_path):
    distributed.run(2, CODE, tmp_path)
    model = on_mesh(*small_model(2, "gap"), None)
    logits = qmoe_jax.forward(*model, tokens(4, 9), tokens(4, 5, seed=1))
    written = qmoe_jax.generate(*model, tokens(3, 6), max_length=7, stop=())
    for i in range(2):
        found = np.load(tmp_path / f"{i}.npz")
        np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(found["written"], written)
