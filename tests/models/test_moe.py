"""Routing, capacity and experts, each by itself, against plain loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_switch import mlp, slots
from random_models import SWITCH

from qmoe_jax import CompressedExperts
from qmoe_jax.models import experts as moe_experts
from qmoe_jax.models.switch import routing as moe
from qmoe_jax.models.switch.config import GATED, PLAIN


def test_routing_takes_the_likeliest_experts_and_their_raw_probabilities():
    probabilities = jnp.array([[0.1, 0.2, 0.6, 0.1], [0.4, 0.1, 0.2, 0.3]])
    routing = moe.route(probabilities, 2)
    np.testing.assert_array_equal(routing.expert, [[2, 1], [0, 3]])
    np.testing.assert_allclose(routing.gate, [[0.6, 0.2], [0.4, 0.3]], rtol=1e-6)  # They don't add up to one.


def test_ties_go_to_the_lowest_expert():
    routing = moe.route(jnp.array([[0.25, 0.25, 0.25, 0.25], [0.2, 0.4, 0.0, 0.4]]), 2)
    np.testing.assert_array_equal(routing.expert, [[0, 1], [1, 3]])


# --- capacity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "length", "multiple", "expected"),
    [
        (3, 24, 16, (3, 32)),  # 24 tokens more either way: a tie goes to the length
        (3, 24, 8, (3, 24)),
        (1, 5, 8, (1, 8)),
        (7, 8, 16, (8, 8)),  # one row of 8 instead of 8 columns of 7
        (5, 7, 1, (5, 7)),
    ],
)
def test_padding_of_tokens_for_routing(batch, length, multiple, expected):
    assert moe.padded_shape(batch, length, multiple) == expected


def test_padding_of_tokens_adds_the_fewest():
    for batch in range(1, 9):
        for length in range(1, 13):
            for multiple in (1, 3, 4, 8):
                new_batch, new_length = moe.padded_shape(batch, length, multiple)
                sizes = [(b, length) for b in range(batch, batch + multiple)]
                sizes += [(batch, n) for n in range(length, length + multiple)]
                assert (new_batch, new_length) in sizes
                assert new_batch * new_length == min(b * n for b, n in sizes if b * n % multiple == 0)


@pytest.mark.parametrize(
    ("tokens", "group_size", "experts", "groups"),
    [
        (72, 8192, 8, 8),  # at least one group per expert
        (65_536, 4096, 8, 16),
        (65_536 + 8, 8192, 8, 8),  # 65_544 / 8 groups
        (96, 8, 8, 16),  # 12 would be enough, but isn't a multiple of the experts
        (8 * 13, 2, 8, 104),  # 52 is none either
    ],
)
def test_number_of_routing_groups(tokens, group_size, experts, groups):
    assert moe.num_groups(tokens, group_size, experts) == groups


@pytest.mark.parametrize(
    ("factor", "tokens_per_group", "experts", "least", "capacity"),
    [
        (2.0, 9, 8, 4, 4),  # the least
        (2.0, 64, 8, 4, 16),
        (1.25, 8192, 128, 4, 80),
        (1.0, 20, 8, 2, 2),  # 2.5: Python rounds to even
        (1.0, 28, 8, 2, 4),  # 3.5: too
        (4.0, 6, 4, 2, 6),
    ],
)
def test_capacity_of_an_expert(factor, tokens_per_group, experts, least, capacity):
    assert moe.expert_capacity(factor, tokens_per_group, experts, least) == capacity


@pytest.mark.parametrize("prioritized", [False, True], ids=["token order", "by probability"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_slots_go_to_the_choices_a_loop_gives_them_to(top_k, prioritized):
    rng = np.random.default_rng(0)
    experts, groups, tokens = 4, 3, 3 * 11
    for capacity in (1, 3, 5, 11):
        probabilities = rng.dirichlet(np.ones(experts) / 2, tokens)
        probabilities[5] = probabilities[6] = 1 / experts  # Equal probabilities keep the tokens' order.
        routing = moe.route(jnp.asarray(probabilities, jnp.float32), top_k)
        kept = moe.kept(routing, experts, groups, capacity, prioritized)
        first = np.asarray(routing.gate)[:, 0]
        expected = slots(np.asarray(routing.expert), first, groups, capacity, experts, prioritized)
        np.testing.assert_array_equal(kept, expected, err_msg=f"capacity {capacity}")
        assert np.all(kept[:, 0]) or capacity < 11


def test_first_choices_come_before_second_ones_and_groups_are_separate():
    # Expert 0 is wanted by all of group 0; second as well as first. Group 1 has slots of its own.
    expert = jnp.array([[1, 0], [0, 1], [0, 1], [0, 1]], jnp.int32)
    routing = moe.Routing(expert, jnp.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.5, 0.5]]))
    in_order = moe.kept(routing, experts=2, groups=1, capacity=2, prioritized=False)
    np.testing.assert_array_equal(in_order, [[True, False], [True, True], [True, False], [False, False]])
    two_groups = moe.kept(routing, experts=2, groups=2, capacity=1, prioritized=False)
    np.testing.assert_array_equal(two_groups, [[True, False], [True, False], [True, True], [False, False]])
    by_probability = moe.kept(routing, experts=2, groups=2, capacity=1, prioritized=True)
    np.testing.assert_array_equal(by_probability, [[True, False], [True, False], [True, True], [False, False]])
    later_first = moe.Routing(expert, jnp.array([[0.9, 0.1], [0.6, 0.4], [0.5, 0.3], [0.7, 0.1]]))
    by_probability = moe.kept(later_first, experts=2, groups=2, capacity=1, prioritized=True)
    np.testing.assert_array_equal(by_probability, [[True, False], [True, False], [False, False], [True, True]])


# --- experts ----------------------------------------------------------------------------------------------------------


def expert_kernels(gated, experts=4, width=6, hidden=10):
    rng = np.random.default_rng(1)
    names = ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
    shapes = [(experts, width, hidden)] * (len(names) - 1) + [(experts, hidden, width)]
    return {n: rng.normal(size=shape).astype(np.float32) for n, shape in zip(names, shapes, strict=True)}


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated gelu"])
@pytest.mark.parametrize(
    "choices",
    [[[0], [2], [3], [2], [0]], [[2], [2], [2], [2], [2]], [[0, 1], [1, 0], [3, 2], [0, 3], [2, 1]]],
    ids=["top-1", "one expert gets all", "top-2"],
)
def test_experts_are_applied_to_the_tokens_routed_to_them(choices, gated):
    kernels = expert_kernels(gated)
    choices = np.array(choices, np.int32)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(len(choices), 6)).astype(np.float32)
    gate = rng.uniform(size=choices.shape).astype(np.float32)
    gate[1] = 0  # Dropped.
    expert = GATED if gated else PLAIN
    y = moe_experts.apply_experts(expert, x, moe.Routing(jnp.asarray(choices), jnp.asarray(gate)), kernels)
    expected = np.zeros_like(x)
    for token, experts in enumerate(choices):
        for choice, expert in enumerate(experts):
            own = {name: {"kernel": kernel[expert]} for name, kernel in kernels.items()}
            expected[token] += gate[token, choice] * mlp(x[token], own)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert not np.any(y[1])


def test_dense_and_compressed_experts_stand_side_by_side():
    """Each matrix may be either; compressed ones are [experts, out, in], dense ones [experts, in, out]."""
    rng = np.random.default_rng(3)
    dense, compressed = {}, {}
    for name, kernel in expert_kernels(gated=False).items():
        experts, columns, out = kernel.shape
        trits = rng.integers(0, 3, (experts, out, columns)).astype(np.uint8)
        levels = np.sort(rng.integers(-8, 8, (experts, out, 2)) / 4, -1).astype(np.float32)
        compressed[name] = CompressedExperts.from_symbols(trits, levels, codec="dictionary")
        rows = np.concatenate([np.zeros((experts, out, 1)), levels], -1)  # value of trit 0, 1, 2
        dense[name] = np.take_along_axis(rows, trits.astype(int), -1).swapaxes(1, 2).astype(np.float32)
    x = rng.normal(size=(9, 6)).astype(np.float32)
    routing = moe.Routing(jnp.asarray(rng.integers(0, 4, (9, 1)), jnp.int32), jnp.ones((9, 1)))
    apply = jax.jit(functools.partial(moe_experts.apply_experts, PLAIN))
    expected = apply(x, routing, dense)
    for kernels in (compressed, compressed | {"wi": dense["wi"]}, compressed | {"wo": dense["wo"]}):
        np.testing.assert_allclose(apply(x, routing, kernels), expected, rtol=1e-5, atol=1e-5)


def test_capacity_counts_padding_and_drops_to_zero():
    """All tokens want one expert; the two slots of each group go to its first tokens, padding or not."""
    config = dataclasses.replace(SWITCH, num_experts=2, min_expert_capacity=1)
    layer = moe.MoeMlp(config, jnp.float32, False)
    kernels = {n: {"kernel": np.ones(s, np.float32)} for n, s in (("wi", (2, 12, 20)), ("wo", (2, 20, 12)))}
    router = np.zeros((12, 2), np.float32)  # Uniform probabilities: expert 0.
    params = {"expert": kernels, "router": {"router_weights": {"w": {"kernel": router}}}}
    x = np.ones((1, 8, 12), np.float32)
    x[0, 0] = 0  # Masked, yet it takes a slot of the first group.
    y = np.asarray(layer.apply({"params": params}, x, 1.0))  # 2 groups of 4 tokens, capacity 2
    used = [False, True, False, False, True, True, False, False]
    np.testing.assert_array_equal(y[0].any(-1), used)
    np.testing.assert_allclose(y[0, 1], 0.5 * 12 * 20)
    assert np.asarray(layer.apply({"params": params}, x, None))[0, 1:].all()


def test_experts_in_slots_do_the_same_for_the_choices_that_are_kept():
    kernels = expert_kernels(gated=True)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(12, 6)).astype(np.float32)
    routing = moe.route(jnp.asarray(rng.dirichlet(np.ones(4), 12), jnp.float32), 2)
    kept = moe.kept(routing, experts=4, groups=3, capacity=2, prioritized=False)
    assert 0 < np.sum(kept) < kept.size
    routing = moe.Routing(routing.expert, jnp.where(kept, routing.gate, 0.0))
    expected = moe_experts.apply_experts(GATED, x, routing, kernels)
    found = moe_experts.apply_experts_in_slots(GATED, x, routing, kernels, 6)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)], ids=["both", "wi only", "wo only"])
def test_compressed_experts_at_finite_capacity(which):
    rng = np.random.default_rng(5)
    dense, mixed = {}, {}
    for (name, kernel), is_compressed in zip(expert_kernels(False, width=12, hidden=20).items(), which, strict=True):
        trits = rng.integers(0, 3, kernel.swapaxes(1, 2).shape).astype(np.uint8)
        levels = np.broadcast_to(np.float32([-0.5, 1.0]), (*trits.shape[:2], 2))
        dense[name] = {"kernel": np.float32([0, -0.5, 1.0])[trits].swapaxes(1, 2)}
        compressed = {"kernel": CompressedExperts.from_symbols(trits, levels, codec="dictionary")}
        mixed[name] = compressed if is_compressed else dense[name]
    router = {"router_weights": {"w": {"kernel": rng.normal(size=(12, 4)).astype(np.float32)}}}
    layer = moe.MoeMlp(SWITCH, jnp.float32, False)
    x = rng.normal(size=(3, 8, 12)).astype(np.float32)
    y, expected = (layer.apply({"params": {"expert": kernels, "router": router}}, x, 1.0) for kernels in (mixed, dense))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about XLA's CPU compiler, which widens bfloat16")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_experts_are_not_widened_all_at_once(dtype):
    shapes = {"wi": (64, 24, 48), "wo": (64, 48, 24)}
    kernels = {m: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for m, shape in shapes.items()}
    routing = moe.Routing(jax.ShapeDtypeStruct((2, 1), jnp.int32), jax.ShapeDtypeStruct((2, 1), jnp.float32))
    apply = jax.jit(functools.partial(moe_experts.apply_experts, PLAIN))
    program = apply.lower(jax.ShapeDtypeStruct((2, 24), dtype), routing, kernels).compile()
    assert program.memory_analysis().temp_size_in_bytes < 64 * 24 * 48 * 2 / 2


# --- experts choose -------------------------------------------------------------------------------------------------


def test_each_expert_takes_its_most_probable_tokens():
    probabilities = jnp.array([[[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]], [[0.2, 0.8], [0.1, 0.9], [0.3, 0.7]]])
    token, gate = moe.experts_choose(probabilities, 2)  # 2 groups of 3 tokens
    np.testing.assert_array_equal(token, [[0, 1, 5, 3], [1, 2, 4, 3]])  # a tie: the first
    np.testing.assert_allclose(gate, [[0.9, 0.6, 0.3, 0.2], [0.4, 0.4, 0.9, 0.8]])


def test_a_token_adds_up_all_experts_that_chose_it():
    x = jnp.array([[1.0], [2.0], [3.0]])
    kernels = {"wi": jnp.array([[[1.0]], [[10.0]]]), "wo": jnp.array([[[1.0]], [[1.0]]])}  # relu(x wi) wo
    token, gate = jnp.array([[0, 2], [0, 0]]), jnp.array([[0.5, 1.0], [0.25, 0.5]])
    y = moe_experts.apply_experts_to_chosen(PLAIN, x, token, gate, kernels)
    np.testing.assert_allclose(y, [[0.5 + 2.5 + 5], [0], [3]])


def test_compressed_experts_choose_as_dense_ones_do():
    rng = np.random.default_rng(0)
    symbols = {m: rng.choice(3, (4, *shape)).astype(np.uint8) for m, shape in (("wi", (6, 5)), ("wo", (5, 6)))}
    levels = lambda s: np.sort(rng.normal(size=(*s.shape[:2], 2)), axis=-1)
    compressed = {m: CompressedExperts.from_symbols(s, levels(s)) for m, s in symbols.items()}
    dense = {m: k.to_dense().swapaxes(1, 2) for m, k in compressed.items()}
    x = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    chosen = (jnp.asarray(rng.integers(0, 7, (4, 3)), jnp.int32), jnp.asarray(rng.random((4, 3)), jnp.float32))
    apply = functools.partial(moe_experts.apply_experts_to_chosen, PLAIN, x, *chosen)
    np.testing.assert_allclose(apply(compressed), apply(dense), atol=1e-5)
