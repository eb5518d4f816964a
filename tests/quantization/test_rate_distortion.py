"""Rounding by rate and distortion against a float64 column loop, brute force, and its own properties."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qmoe_jax.quantization import gptq
from qmoe_jax.quantization import rate_distortion as module
from qmoe_jax.quantization.rate_distortion import rate_distortion, refit_levels

SHAPE = (2, 12, 40)


def problem(experts=2, rows=12, columns=40, seed=0):
    """Random W [experts, rows, columns], and H of correlated inputs of uneven size, mean diagonal about 1."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(experts, rows, columns)).astype(np.float32)
    mix = rng.normal(size=(experts, columns, columns)) * rng.lognormal(size=(experts, 1, columns))
    X = rng.normal(size=(experts, 3 * columns, columns)) @ mix
    H = X.swapaxes(1, 2) @ X
    return W, (H / np.einsum("eii->e", H)[:, None, None] * columns).astype(np.float32)


def lagrangians(value, W):
    return jnp.full(W.shape[:2], value, jnp.float32)


def damped(H, damping=0.1):
    H = H.astype(np.float64)
    columns = H.shape[-1]
    damp = np.maximum(damping * np.einsum("eii->e", H) / columns, 1e-6)
    return H + damp[:, None, None] * np.eye(columns)


def row_losses(W, Q, H):
    """(w - q) H (w - q)' of each row, float64 [experts, rows]."""
    E = W.astype(np.float64) - np.asarray(Q, np.float64)
    return np.einsum("erc,ecd,erd->er", E, H.astype(np.float64), E)


def values(symbols, levels):
    """[..., rows, columns] from symbols and levels [..., rows, 2]."""
    table = np.concatenate([np.zeros((*levels.shape[:-1], 1), np.float32), np.asarray(levels)], -1)
    return np.take_along_axis(table, np.asarray(symbols, int), -1)


def zeros(result):
    return (np.asarray(result.symbols) == 0).mean((1, 2))


# --- The column loop in float64 --------------------------------------------------------------------------------------


def bits_of(share):
    """Bits of the symbols 0, 1, 2 where so many are zero and the others are equally frequent."""
    share = np.clip(share, module.LEAST_ZEROS, module.MOST_ZEROS)
    return -np.log2([share, (1 - share) / 2, (1 - share) / 2])


def cheapest(w, weight, levels, lagrangian, bits):
    """Brute force over the three symbols of each row: w [rows], levels [rows, 2], lagrangian [rows]."""
    symbols = np.zeros(len(w), int)
    for r in range(len(w)):
        values = (0.0, *levels[r])
        costs = [weight * (w[r] - v) ** 2 + lagrangian[r] * b for v, b in zip(values, bits, strict=True)]
        symbols[r] = np.argmin(costs)
    return symbols


def scalar_start(W, weights, lagrangian):
    """Entropy-constrained scalar quantization of one matrix: levels [rows, 2] and the share of zeros."""
    levels = module.START_LEVEL * np.sqrt((W**2).mean(1))[:, None] * [-1, 1]
    share = module.START_ZEROS
    for _ in range(module.START_STEPS):
        bits = bits_of(share)
        S = np.stack([cheapest(w, h, levels, lagrangian, bits) for w, h in zip(W.T, weights, strict=True)], axis=1)
        for r, k in np.ndindex(levels.shape):
            if (S[r] == k + 1).any():
                levels[r, k] = np.average(W[r, S[r] == k + 1], weights=weights[S[r] == k + 1])
        share = (S == 0).mean()
    return levels, share


def column_loop(W, H, lagrangian, levels, share, order):
    """Rounds column by column; the columns to come are solved for afresh after each. Symbols [rows, columns]."""
    bits = bits_of(share)
    current, symbols = W.copy(), np.zeros(W.shape, int)
    D = np.zeros_like(W)
    for k, i in enumerate(order):
        left, rest, done = order[k:], order[k + 1 :], order[: k + 1]
        weight = 1 / np.linalg.inv(H[np.ix_(left, left)])[0, 0]  # of an error that the rest makes up for
        symbols[:, i] = cheapest(current[:, i], weight, levels, lagrangian, bits)
        D[:, i] = W[:, i] - values(symbols[:, i : i + 1], levels)[:, 0]
        current[:, rest] = W[:, rest] + np.linalg.solve(H[np.ix_(rest, rest)], H[np.ix_(rest, done)] @ D[:, done].T).T
    return symbols


@pytest.mark.long
def test_rows_of_different_codes_do_not_know_of_each_other():
    W, H = problem()
    lagrangian = np.geomspace(0.005, 0.1, 12) * np.ones((2, 1))
    codes = np.arange(12) % 3 * 5 % 7  # 0, 5, 3
    together = rate_distortion(W, H, lagrangian, codes=codes)
    for code in (0, 3, 5):
        own = codes == code
        alone = rate_distortion(W[:, own], H, lagrangian[:, own])
        np.testing.assert_array_equal(np.asarray(together.symbols)[:, own], alone.symbols)
        np.testing.assert_array_equal(np.asarray(together.levels)[:, own], alone.levels)
    assert (np.asarray(rate_distortion(W, H, lagrangian).symbols) != np.asarray(together.symbols)).any()


@pytest.mark.parametrize("activation_order", [False, True])
def test_equals_a_column_loop_in_float64(activation_order):
    W, H = problem()
    lagrangian = np.geomspace(0.005, 0.1, 12) * np.ones((2, 1))
    result = rate_distortion(W, H, lagrangian, refits=0, level_bits=7, activation_order=activation_order)
    for e in range(2):
        w, h = W[e].astype(np.float64), damped(H)[e]
        order = np.argsort(-np.diag(H[e]), kind="stable") if activation_order else np.arange(40)
        weights = np.zeros(40)
        for k, i in enumerate(order):
            weights[i] = 1 / np.linalg.inv(h[np.ix_(order[k:], order[k:])])[0, 0]
        levels, share = scalar_start(w, weights, lagrangian[e])
        found = np.asarray(result.levels[e], np.float64)
        np.testing.assert_allclose(found, levels, rtol=2**-8)  # half a unit of the last place
        expected = column_loop(w, h, lagrangian[e], found, share, order)
        assert np.mean(np.asarray(result.symbols[e]) != expected) <= 2e-3  # ties


@pytest.mark.parametrize("shape", [(3, 12, 1), SHAPE], ids=["one_column", "identity"])
def test_without_correlations_each_weight_takes_its_cheapest_symbol(shape):
    rng = np.random.default_rng(1)
    W = rng.normal(size=shape).astype(np.float32)
    H = np.broadcast_to(np.eye(shape[-1], dtype=np.float32), (shape[0], shape[-1], shape[-1]))
    lagrangian = rng.uniform(0.01, 0.5, size=shape[:2]).astype(np.float32)
    result = rate_distortion(W, H, lagrangian, refits=0, damping=0.0, level_bits=7)
    for e in range(shape[0]):
        levels = np.asarray(result.levels[e], np.float64)
        _, share = scalar_start(W[e].astype(np.float64), np.ones(shape[-1]), lagrangian[e])
        expected = [cheapest(w, 1.0, levels, lagrangian[e], bits_of(share)) for w in W[e].T.astype(np.float64)]
        np.testing.assert_array_equal(result.symbols[e], np.stack(expected, axis=1))


def test_bits_that_cost_nothing_leave_the_nearest_level():
    W, _ = problem()
    H = np.stack([np.diag(d) for d in np.random.default_rng(1).uniform(0.1, 9, size=(2, 40))]).astype(np.float32)
    result = rate_distortion(W, H, lagrangians(0, W), refits=0)
    candidates = np.concatenate([np.zeros((2, 12, 1)), result.levels], -1)  # [experts, rows, 3]
    nearest = np.abs(W[..., None] - candidates[:, :, None]).argmin(-1)
    np.testing.assert_array_equal(result.symbols, nearest)


# --- What is returned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("refits", "activation_order"), [(0, False), (1, True), (2, False)])
def test_loss_is_that_of_the_damped_hessian_and_levels_give_the_values(refits, activation_order):
    W, H = problem()
    result = rate_distortion(W, H, lagrangians(0.02, W), refits=refits, damping=0.2, activation_order=activation_order)
    np.testing.assert_allclose(result.loss, row_losses(W, result.Q, damped(H, 0.2)).sum(1), rtol=1e-4)
    np.testing.assert_array_equal(result.Q, values(result.symbols, result.levels))
    assert result.symbols.dtype == jnp.uint8 and set(np.unique(result.symbols)) == {0, 1, 2}
    assert result.Q.dtype == result.levels.dtype == jnp.float32
    assert not np.any(result.fallback)


@pytest.mark.parametrize("level_bits", [pytest.param(0, marks=pytest.mark.long), 3, 7])
def test_levels_have_few_bits_of_mantissa(level_bits):
    W, H = problem()
    levels = np.asarray(rate_distortion(W, H, lagrangians(0.02, W), level_bits=level_bits).levels)
    assert levels.shape == (2, 12, 2)
    assert np.all(levels[..., 0] <= 0) and np.all(levels[..., 1] >= 0) and np.all(np.any(levels, -1))
    assert not np.any(levels.view(np.uint32) & np.uint32((1 << (23 - level_bits)) - 1))
    np.testing.assert_array_equal(levels, np.asarray(jnp.asarray(levels).astype(jnp.bfloat16), np.float32))


def least_losses(W, symbols, H, levels):
    """Least (w - q) H (w - q)' of each row over its levels, and what rounding these to bfloat16 may add."""
    least, rounding = np.zeros(W.shape[:2]), np.zeros(W.shape[:2])
    for e, r in np.ndindex(W.shape[:2]):
        patterns = np.stack([np.asarray(symbols[e, r]) == s for s in (1, 2)], -1).astype(np.float64)
        root = np.linalg.cholesky(H[e]).T
        fitted, *_ = np.linalg.lstsq(root @ patterns, root @ W[e, r].astype(np.float64), rcond=None)
        assert fitted[0] <= 0 <= fitted[1]
        error = W[e, r] - patterns @ fitted
        least[e, r] = error @ H[e] @ error
        sizes = np.linalg.norm(root @ patterns, axis=0) * np.abs(levels[e, r])
        rounding[e, r] = (2.0**-8 * sizes.sum()) ** 2
    return least, rounding


def test_refit_levels_of_each_row_are_the_best_for_its_symbols():
    W, H = problem()
    result = rate_distortion(W, H, lagrangians(0.02, W), level_bits=7)
    least, rounding = least_losses(W, result.symbols, damped(H), np.asarray(result.levels, np.float64))
    found = row_losses(W, result.Q, damped(H))
    assert np.all(found <= least + 1.1 * rounding + 1e-4 * least)
    for change in (0.97, 1.03):
        for k in range(2):
            levels = np.asarray(result.levels, np.float64)
            levels[..., k] *= change
            moved = row_losses(W, values(result.symbols, levels), damped(H))
            assert np.all(moved >= found - rounding)


# --- Rate and distortion ---------------------------------------------------------------------------------------------


def test_a_larger_lagrangian_gives_more_zeros_and_more_error():
    W, H = problem()
    results = [rate_distortion(W, H, lagrangians(4.0**k, W)) for k in range(-4, 3)]
    shares, losses = np.array([zeros(r) for r in results]), np.array([r.loss for r in results])
    assert np.all(np.diff(shares, axis=0) >= 0)
    assert np.all(shares[0] < 0.6) and np.all(shares[-1] > 0.95)
    # Where bits are almost free, it is a matter of luck.
    assert np.all(np.diff(losses[:3], axis=0) > -0.05 * losses[0])
    assert np.all(np.diff(losses[2:], axis=0) >= 0) and np.all(losses[-1] > 4 * losses[0])


def test_errs_less_than_gptq_at_as_many_zeros():
    W, H = problem()
    plain = gptq(W, H, bits=1.5)
    for e in range(2):
        low, high = -14.0, 4.0
        for _ in range(14):
            middle = (low + high) / 2
            result = rate_distortion(W, H, lagrangians(2.0**middle, W))
            low, high = (middle, high) if zeros(result)[e] < zeros(plain)[e] else (low, middle)
        result = rate_distortion(W, H, lagrangians(2.0**high, W))
        assert zeros(result)[e] >= zeros(plain)[e]
        assert result.loss[e] < 0.6 * plain.loss[e]


def test_refits_lower_the_cost():
    W, H = problem()
    lagrangian = 0.05

    def cost(refits):
        result = rate_distortion(W, H, lagrangians(lagrangian, W), refits=refits)
        counts = np.stack([(np.asarray(result.symbols) == s).mean((1, 2)) for s in range(3)])
        entropy = -np.sum(counts * np.log2(counts), axis=0)
        return np.asarray(result.loss) + lagrangian * entropy * W[0].size

    assert np.all(cost(1) < cost(0)) and np.all(cost(2) < cost(0))


def test_each_row_has_its_own_lagrangian():
    W, H = problem()
    lagrangian = np.full((2, 12), 0.02, np.float32)
    lagrangian[0, 3] = lagrangian[1, 7] = 1e6
    symbols = np.asarray(rate_distortion(W, H, lagrangian).symbols)
    empty = np.zeros((2, 12), bool)
    empty[0, 3] = empty[1, 7] = True
    np.testing.assert_array_equal(~symbols.any(-1), empty)


def test_scale_of_rows_and_hessian_is_that_of_their_lagrangians():
    W, H = problem()
    plain = rate_distortion(W, H, lagrangians(0.02, W))
    scale = 2.0 ** np.random.default_rng(0).integers(-3, 4, size=(2, 12)).astype(np.float32)
    scaled = rate_distortion(W * scale[..., None], 1024 * H, lagrangians(0.02 * 1024, W) * scale**2)
    np.testing.assert_array_equal(scaled.symbols, plain.symbols)
    np.testing.assert_array_equal(scaled.Q, plain.Q * scale[..., None])


# --- Rows and Hessians of no use -------------------------------------------------------------------------------------


def test_a_row_of_zeros_stays_so():
    W, H = problem()
    W[1, 4] = 0
    result = rate_distortion(W, H, lagrangians(0.02, W))
    assert not np.any(result.symbols[1, 4]) and not np.any(result.Q[1, 4])
    assert np.all(np.isfinite(result.levels)) and np.all(np.isfinite(result.loss))
    np.testing.assert_array_equal(result.Q[0], rate_distortion(*problem(), lagrangians(0.02, W)).Q[0])


@pytest.mark.parametrize("refits", [0, 2])
@pytest.mark.parametrize("bad", ["nan", "inf", "indefinite", "starved"])
def test_unusable_hessian_falls_back_for_that_expert_alone(bad, refits):
    W, H = problem()
    good = rate_distortion(W, H, lagrangians(0.02, W), refits=refits)
    make_unusable(H, bad)
    result = rate_distortion(W, H, lagrangians(0.02, W), refits=refits)
    assert np.asarray(result.fallback).tolist() == [False, True]
    assert all(np.all(np.isfinite(a)) for a in (result.Q, result.levels, result.loss))
    # The identity in place of the Hessian.
    np.testing.assert_allclose(result.loss[1], np.sum((W[1] - np.asarray(result.Q[1])) ** 2), rtol=1e-4)
    assert result.loss[1] < np.sum(W[1] ** 2)
    np.testing.assert_array_equal(result.Q[0], good.Q[0])
    np.testing.assert_array_equal(result.loss[0], good.loss[0])


def make_unusable(H, bad):
    if bad == "starved":
        H[1] = 0
    elif bad == "indefinite":
        H[1, 3, 4] = H[1, 4, 3] = 100 * np.sqrt(H[1, 3, 3] * H[1, 4, 4])
    else:
        H[1, 3, 3] = float(bad)


# --- Batches and devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize(
    "options",
    [dict(activation_order=True), pytest.param(dict(block_size=16), marks=pytest.mark.long)],
    ids=["order", "panels"],
)
def test_experts_per_call_do_not_change_a_bit(options, size):
    W, H = problem(experts=4)
    lagrangian = np.random.default_rng(0).uniform(0.01, 0.1, size=(4, 12)).astype(np.float32)
    together = rate_distortion(W, H, lagrangian, **options)
    slices = [slice(i, i + size) for i in range(0, 4, size)]
    parts = [rate_distortion(W[s], H[s], lagrangian[s], **options) for s in slices]
    for name in together._fields:
        found = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(found, getattr(together, name), err_msg=name)


def test_sharded_over_experts_is_bitwise_the_same_without_collectives():
    W, H = problem(experts=8, rows=24, columns=72)
    H[3] = 0
    lagrangian = np.full((8, 24), 0.02, np.float32)
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("expert"))
    sharded = [jax.device_put(x, sharding) for x in (W, H, lagrangian)]
    compiled = jax.jit(lambda *arguments: rate_distortion(*arguments, activation_order=True)).lower(*sharded).compile()
    result, single = compiled(*sharded), rate_distortion(W, H, lagrangian, activation_order=True)
    assert result.Q.sharding.is_equivalent_to(sharding, 3)
    for name in single._fields:
        np.testing.assert_array_equal(getattr(result, name), getattr(single, name), err_msg=name)
    program = compiled.as_text()
    assert "num_partitions=8" in program
    assert not re.search(r"\b(all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter)", program)


# --- Refitting what GPTQ made ----------------------------------------------------------------------------------------


def test_refit_levels_lowers_the_loss_of_gptq_and_keeps_its_symbols():
    W, H = problem()
    plain = gptq(W, H, bits=1.5, activation_order=True)
    result = refit_levels(W, H, plain)
    for name in ("symbols", "fallback"):
        np.testing.assert_array_equal(getattr(result, name), getattr(plain, name))
    assert np.all(np.asarray(result.loss) < 0.9 * np.asarray(plain.loss))
    np.testing.assert_allclose(result.loss, row_losses(W, result.Q, damped(H)).sum(1), rtol=1e-4)
    np.testing.assert_array_equal(result.Q, values(result.symbols, result.levels))
    least, rounding = least_losses(W, result.symbols, damped(H), np.asarray(result.levels, np.float64))
    assert np.all(row_losses(W, result.Q, damped(H)) <= least + 1.1 * rounding + 1e-4 * least)


@pytest.mark.parametrize("bad", ["nan", "indefinite", "starved"])
def test_refit_levels_of_a_fallback_have_the_loss_of_the_identity(bad):
    W, H = problem()
    make_unusable(H, bad)
    plain = gptq(W, H, bits=1.5)
    result = refit_levels(W, H, plain)
    assert np.asarray(result.fallback).tolist() == [False, True]
    np.testing.assert_allclose(result.loss[1], np.sum((W[1] - np.asarray(result.Q[1])) ** 2), rtol=1e-4)
    assert result.loss[1] <= plain.loss[1] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(W=np.zeros((2, 3), np.float32)), r"W: found shape \(2, 3\)"),
        (dict(W=np.zeros((2, 4, 8), np.int32)), "W: found dtype int32"),
        (dict(H=np.zeros((2, 4, 4), np.float32)), r"H: found shape \(2, 4, 4\), expected .*\(2, 8, 8\)"),
        (dict(lagrangian=0.1), r"lagrangian: found shape \(\), expected .*\(2, 4\)"),
        (dict(lagrangian=np.zeros((2, 8))), r"lagrangian: found shape \(2, 8\), expected .*\(2, 4\)"),
        (dict(refits=-1), "refits: found -1"),
        (dict(refits=1.0), "refits: found 1.0"),
        (dict(level_bits=8), "level_bits: found 8, expected .* 0 to 7"),
        (dict(level_bits=True), "level_bits: found True"),
        (dict(block_size=0), "block_size: found 0"),
        (dict(damping=-1.0), "damping: found -1.0"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_arguments_are_named(changes, message):
    arguments = dict(
        W=np.zeros((2, 4, 8), np.float32), H=np.zeros((2, 8, 8), np.float32), lagrangian=np.zeros((2, 4), np.float32)
    )
    with pytest.raises(ValueError, match=message):
        rate_distortion(**{**arguments, **changes})
