"""GPTQ against the reference's outputs, a float64 optimal brain quantizer, and its own properties."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qmoe_jax.quantization import gptq, round_to_nearest

GOLDEN = {
    "tern": dict(bits=1.5),
    "tern_block16": dict(bits=1.5, block_size=16),
    "two_bit": dict(bits=2),
    "rtn": dict(bits=1.5),
    "relu": dict(bits=1.5),
    "deadcol": dict(bits=1.5),
    "fewtokens": dict(bits=1.5),
    "actorder": dict(bits=1.5, activation_order=True),
    "group16": dict(bits=2, group_size=16),
}


def problem(experts=2, rows=12, columns=40, seed=0):
    """Random W [experts, rows, columns], and H of correlated inputs of uneven size."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(experts, rows, columns)).astype(np.float32)
    mix = rng.normal(size=(experts, columns, columns)) * rng.lognormal(size=(experts, 1, columns))
    X = rng.normal(size=(experts, 3 * columns, columns)) @ mix
    return W, (X.swapaxes(1, 2) @ X).astype(np.float32)


def loss(W, Q, H):
    """tr (W - Q) H (W - Q)' per expert, float64."""
    E = W.astype(np.float64) - np.asarray(Q, np.float64)
    return np.einsum("erc,ecd,erd->e", E, H.astype(np.float64), E)


def round_column(w, low, high, bits):
    if bits == 1.5:
        return np.where(w > high / 2, high, np.where(w < low / 2, low, 0.0))
    step = (high - low) / 3
    zero = np.round(-low / step)
    return step * (np.clip(np.round(w / step) + zero, 0, 3) - zero)


def obq(W, H, bits, damping=0.1, group_size=None, order=None):
    """Optimal brain quantization of one matrix, column by column, float64.

    After each column the optimal weights of all columns to come are solved for afresh, given every error made: no
    Cholesky factor, no blocks, no running update.
    """
    W, H = W.astype(np.float64), H.astype(np.float64)
    columns = len(H)
    order = np.arange(columns) if order is None else order
    H = H + max(damping * np.mean(np.diag(H)), 1e-6) * np.eye(columns)
    Q = np.zeros_like(W)
    current = W.copy()
    low, high = np.minimum(W.min(1), 0), np.maximum(W.max(1), 0)
    for k, i in enumerate(order):
        if group_size and k % group_size == 0:
            group = current[:, order[k : k + group_size]]
            low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
        Q[:, i] = round_column(current[:, i], low, high, bits)
        done, rest = order[: k + 1], order[k + 1 :]
        # min over D_rest of tr D H D' with D_done given
        D = W[:, done] - Q[:, done]
        current[:, rest] = W[:, rest] + np.linalg.solve(H[np.ix_(rest, rest)], H[np.ix_(rest, done)] @ D.T).T
    return Q


def assert_same(Q, expected, W, H):
    """Equal but for ties: at most 0.1 % of the entries, and the loss within 0.1 %."""
    Q = np.asarray(Q)
    differ = ~np.isclose(Q, expected, rtol=1e-4, atol=1e-5)
    assert differ.mean() <= 1e-3
    np.testing.assert_allclose(loss(W, Q, H), loss(W, expected, H), rtol=1e-3)


@pytest.mark.parametrize("case", GOLDEN)
def test_equals_the_reference(case, fixture_path):
    golden = np.load(fixture_path("gptq_golden.npz"))
    W, H, expected = (golden[f"{case}_{name}"] for name in "WHQ")
    result = gptq(W, H, damping=0.1, **GOLDEN[case])
    assert result.Q.dtype == jnp.float32
    assert not np.any(result.fallback)
    assert_same(result.Q, expected, W, H)


@pytest.mark.parametrize(
    ("group_size", "block_size", "bits"),
    [
        (None, 16, 1.5),
        (8, 16, 2),
        (4, 2, 1.5),
        *(pytest.param(*case, marks=pytest.mark.long) for case in [(None, 16, 2), (None, 2, 2), (4, 2, 2)]),
    ],
)
def test_equals_optimal_brain_quantization(bits, group_size, block_size):
    W, H = problem()
    result = gptq(W, H, bits=bits, group_size=group_size, block_size=block_size)
    expected = np.stack([obq(w, h, bits, group_size=group_size) for w, h in zip(W, H, strict=True)])
    assert_same(result.Q, expected, W, H)


def test_activation_order_equals_optimal_brain_quantization_by_falling_diagonal():
    W, H = problem()
    result = gptq(W, H, bits=2, activation_order=True, group_size=8)
    orders = [np.argsort(-np.diag(h), kind="stable") for h in H]
    expected = [obq(w, h, 2, group_size=8, order=o) for w, h, o in zip(W, H, orders, strict=True)]
    assert_same(result.Q, np.stack(expected), W, H)


def test_activation_order_does_not_depend_on_the_order_of_the_columns():
    W, H = problem()
    p = np.random.default_rng(1).permutation(W.shape[-1])
    plain = gptq(W, H, bits=1.5, activation_order=True)
    permuted = gptq(W[:, :, p], H[:, p][:, :, p], bits=1.5, activation_order=True)
    assert np.mean(np.asarray(plain.Q)[:, :, p] != np.asarray(permuted.Q)) <= 1e-3


@pytest.mark.parametrize("bits", [1.5, 2])
def test_diagonal_hessian_is_rounding_to_nearest(bits):
    W, _ = problem()
    H = np.stack([np.diag(d) for d in np.random.default_rng(1).uniform(0.1, 9, size=(2, 40))])
    result, rounded = gptq(W, H, bits=bits), round_to_nearest(W, bits=bits)
    np.testing.assert_array_equal(result.symbols, rounded.symbols)
    np.testing.assert_array_equal(result.Q, rounded.Q)
    np.testing.assert_array_equal(result.levels, rounded.levels)
    assert not np.any(result.fallback)


@pytest.mark.parametrize("bits", [1.5, 2])
def test_round_to_nearest_takes_the_nearest_level(bits):
    W, _ = problem()
    low, high = np.minimum(W.min(-1), 0)[..., None], np.maximum(W.max(-1), 0)[..., None]
    result = round_to_nearest(W, bits=bits)
    np.testing.assert_allclose(result.Q, round_column(W, low, high, bits), atol=1e-6)
    np.testing.assert_allclose(result.loss, ((W - np.asarray(result.Q)) ** 2).sum((1, 2)), rtol=1e-5)


def test_beats_rounding_to_nearest_on_correlated_inputs():
    for seed in range(5):
        W, H = problem(seed=seed)
        ours = loss(W, gptq(W, H, bits=1.5).Q, H)
        assert np.all(ours < 0.9 * loss(W, round_to_nearest(W, bits=1.5).Q, H))


def test_reported_loss_is_that_of_the_damped_hessian():
    W, H = problem()
    result = gptq(W, H, bits=1.5, damping=0.2)
    mean = np.einsum("eii->e", H) / H.shape[1]
    damped = H + 0.2 * mean[:, None, None] * np.eye(H.shape[1])
    np.testing.assert_allclose(result.loss, loss(W, result.Q, damped), rtol=1e-4)


@pytest.mark.parametrize("quantizer", ["gptq", "round_to_nearest"])
def test_bfloat16_rows_take_three_values_that_bfloat16_holds(quantizer):
    W, H = problem()
    W = jnp.asarray(W, jnp.bfloat16)
    result = gptq(W, H, bits=1.5) if quantizer == "gptq" else round_to_nearest(W, bits=1.5)
    W = np.asarray(W, np.float32)
    np.testing.assert_array_equal(result.levels, np.stack([W.min(-1), W.max(-1)], -1))
    np.testing.assert_array_equal(result.levels, np.asarray(result.levels.astype(jnp.bfloat16), np.float32))
    values = np.concatenate([np.zeros((2, 12, 1), np.float32), result.levels], axis=-1)  # zero, min, max
    np.testing.assert_array_equal(result.Q, np.take_along_axis(values, np.asarray(result.symbols, int), -1))
    assert result.symbols.dtype == jnp.uint8


@pytest.mark.parametrize("quantizer", ["gptq", "round_to_nearest"])
def test_levels_of_groups_give_back_the_values(quantizer):
    W, H = problem()  # 40 columns: two groups of 16 and one of 8
    if quantizer == "gptq":
        result = gptq(W, H, bits=2, group_size=16, activation_order=True)
        order = np.argsort(-np.diagonal(H, axis1=1, axis2=2), kind="stable")
    else:
        result = round_to_nearest(W, bits=2, group_size=16)
        order = np.tile(np.arange(40), (2, 1))
    assert result.levels.shape == (2, 12, 3, 3)
    values = np.pad(result.levels, ((0, 0), (0, 0), (0, 0), (1, 0)))  # zero, and the three levels
    for e in range(2):
        for k, column in enumerate(order[e]):
            symbols = np.asarray(result.symbols[e, :, column], int)
            np.testing.assert_array_equal(result.Q[e, :, column], values[e, np.arange(12), k // 16, symbols])


@pytest.mark.parametrize("block_size", [7, 16, 512])
def test_block_size_is_a_matter_of_speed(block_size):
    W, H = problem()
    result = gptq(W, H, bits=1.5, block_size=block_size)
    assert_same(result.Q, gptq(W, H, bits=1.5).Q, W, H)


@pytest.mark.parametrize("block_size", [8, 24])
def test_block_size_is_a_matter_of_speed_with_groups(block_size):
    W, H = problem()
    result = gptq(W, H, bits=2, group_size=16, block_size=block_size)
    assert_same(result.Q, gptq(W, H, bits=2, group_size=16, block_size=16).Q, W, H)


def test_group_of_all_columns_is_one_grid_per_row():
    W, H = problem()
    one, grouped = gptq(W, H, bits=2), gptq(W, H, bits=2, group_size=40)
    assert_same(grouped.Q, one.Q, W, H)
    np.testing.assert_array_equal(grouped.levels[:, :, 0], one.levels)


def test_scale_of_the_hessian_is_immaterial():
    W, H = problem()
    np.testing.assert_array_equal(gptq(W, H, bits=1.5).Q, gptq(W, 1024 * H, bits=1.5).Q)


def test_dead_column_is_rounded_and_leaves_the_others_alone():
    W, H = problem()
    H[:, 5], H[:, :, 5] = 0, 0
    alive = np.delete(np.arange(40), 5)
    W[:, :, 5] = np.clip(W[:, :, 5], -1, 1)  # not the extreme of a row
    result = gptq(W, H, bits=1.5)
    np.testing.assert_array_equal(result.Q[:, :, 5], round_to_nearest(W, bits=1.5).Q[:, :, 5])
    H_alive = H[:, alive][:, :, alive]
    without = gptq(W[:, :, alive], H_alive, bits=1.5, damping=0.1 * 39 / 40)
    assert_same(result.Q[:, :, alive], without.Q, W[:, :, alive], H_alive)


@pytest.mark.parametrize("block_size", [4, 128], ids=["panels", "one_panel"])
@pytest.mark.parametrize("bad", ["nan", "inf", "indefinite", "starved"])
def test_unusable_hessian_falls_back_for_that_expert_alone(bad, block_size):
    W, H = problem(experts=3)
    good = gptq(W, H, bits=1.5, block_size=block_size)
    assert not np.any(good.fallback)
    if bad == "starved":
        H[1] = 0
    elif bad == "indefinite":
        H[1, 3, 4] = H[1, 4, 3] = 100 * np.sqrt(H[1, 3, 3] * H[1, 4, 4])
    else:
        H[1, 3, 3] = float(bad)
    result, rounded = gptq(W, H, bits=1.5, block_size=block_size), round_to_nearest(W, bits=1.5)
    assert np.asarray(result.fallback).tolist() == [False, True, False]
    np.testing.assert_array_equal(result.Q[1], rounded.Q[1])
    np.testing.assert_allclose(result.loss[1], rounded.loss[1], rtol=1e-5)
    for e in (0, 2):
        np.testing.assert_array_equal(result.Q[e], good.Q[e])
        np.testing.assert_array_equal(result.loss[e], good.loss[e])


def test_singular_hessian_without_damping_falls_back_or_stays_finite():
    W, _ = problem()
    X = np.random.default_rng(0).normal(size=(2, 5, 40)).astype(np.float32)  # 5 tokens, 40 columns
    result = gptq(W, X.swapaxes(1, 2) @ X, bits=1.5, damping=0.0)
    assert np.all(np.isfinite(result.Q))
    rounded = round_to_nearest(W, bits=1.5)
    for e in np.flatnonzero(result.fallback):
        np.testing.assert_array_equal(result.Q[e], rounded.Q[e])


@pytest.mark.parametrize(
    ("experts", "options"),
    [
        pytest.param(8, dict(bits=1.5), marks=pytest.mark.long),  # one expert per device
        pytest.param(16, dict(bits=1.5), marks=pytest.mark.long),
        pytest.param(16, dict(bits=1.5, activation_order=True), marks=pytest.mark.long),
        pytest.param(8, dict(bits=2, group_size=16), marks=pytest.mark.long),
        (8, dict(bits=1.5, block_size=8)),  # 72 columns: several panels
    ],
    ids=["one_per_device", "two_per_device", "activation_order", "groups", "panels"],
)
def test_sharded_over_experts_is_bitwise_the_same_without_collectives(experts, options):
    W, H = problem(experts=experts, rows=24, columns=72)
    H[3] = 0
    H[5, 0, 0] = np.nan
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("expert"))
    sharded = [jax.device_put(x, sharding) for x in (W, H)]
    compiled = jax.jit(lambda W, H: gptq(W, H, **options)).lower(*sharded).compile()
    result, single = compiled(*sharded), gptq(W, H, **options)
    assert result.Q.sharding.is_equivalent_to(sharding, 3)
    for name in single._fields:
        np.testing.assert_array_equal(getattr(result, name), getattr(single, name), err_msg=name)
    program = compiled.as_text()
    assert "num_partitions=8" in program
    assert not re.search(r"\b(all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter)", program)


# A single one: where each device has one, above.
@pytest.mark.parametrize("size", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2)), 3])
@pytest.mark.parametrize(
    "options", [pytest.param(dict(group_size=16), marks=pytest.mark.long), dict(block_size=8)], ids=["groups", "panels"]
)
def test_experts_per_call_do_not_change_a_bit(options, size):
    W, H = problem(experts=6, rows=24, columns=72)
    together = gptq(W, H, bits=2, **options)
    parts = [gptq(W[i : i + size], H[i : i + size], bits=2, **options) for i in range(0, 6, size)]
    for name in together._fields:
        found = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(found, getattr(together, name), err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(W=np.zeros((2, 3), np.float32)), r"W: found shape \(2, 3\)"),
        (dict(W=np.zeros((2, 0, 8), np.float32)), r"W: found shape \(2, 0, 8\)"),
        (dict(W=np.zeros((2, 4, 8), np.int32)), "W: found dtype int32"),
        (dict(H=np.zeros((2, 4, 4), np.float32)), r"H: found shape \(2, 4, 4\), expected .*\(2, 8, 8\)"),
        (dict(bits=3), "bits: found 3"),
        (dict(block_size=0), "block_size: found 0"),
        (dict(group_size=2.5), "group_size: found 2.5"),
        (dict(damping=-1.0), "damping: found -1.0"),
        (dict(damping=float("nan")), "damping: found nan"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_arguments_are_named(changes, message):
    arguments = dict(W=np.zeros((2, 4, 8), np.float32), H=np.zeros((2, 8, 8), np.float32), bits=1.5)
    with pytest.raises(ValueError, match=message):
        gptq(**{**arguments, **changes})
