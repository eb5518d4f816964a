"""Rate-distortion rounding to levels at equal steps, against float64 NumPy and its own properties."""

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.quantization import equal_steps
from qmoe_jax.quantization.account import entropy
from qmoe_jax.quantization.rate_distortion import rate_distortion
from qmoe_jax.quantization.trials import _steps_in_use

EXPERTS, ROWS, COLUMNS = 2, 12, 40
DAMPING = 0.1


def problem(seed=0):
    """Random W, and H of correlated inputs of uneven size, mean diagonal 1."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(EXPERTS, ROWS, COLUMNS)).astype(np.float32)
    mix = rng.normal(size=(EXPERTS, COLUMNS, COLUMNS)) * rng.lognormal(size=(EXPERTS, 1, COLUMNS))
    X = rng.normal(size=(EXPERTS, 3 * COLUMNS, COLUMNS)) @ mix
    H = X.swapaxes(1, 2) @ X
    return W, (H / np.einsum("eii->e", H)[:, None, None] * COLUMNS).astype(np.float32)


def damped(H):
    H = H.astype(np.float64)
    return H + DAMPING * np.einsum("eii->e", H)[:, None, None] / COLUMNS * np.eye(COLUMNS)


@pytest.fixture(scope="module")
def given():
    return problem()


@pytest.fixture(scope="module")
def quantized(given):
    """By steps and Lagrangian."""
    W, H = given
    found = {}

    def at(steps, lagrangian, **options):
        key = steps, lagrangian, *options.items()
        if key not in found:
            found[key] = rate_distortion(W, H, jnp.full(W.shape[:2], lagrangian), steps=steps, **options)
        return found[key]

    return at


def numbers_of(symbols, steps):
    """k of each symbol, -K .. K."""
    number = np.asarray(symbols, int) - steps
    return np.where(np.asarray(symbols) == 0, 0, np.where(number <= 0, number - 1, number))


def cost(W, H, result, lagrangian):
    """tr (W - Q) H (W - Q)' + lagrangian bits, of each expert, float64; and bits per weight."""
    E = W.astype(np.float64) - np.asarray(result.Q, np.float64)
    bits = np.array([entropy(np.asarray(s)) for s in result.symbols])
    return np.einsum("erc,ecd,erd->e", E, damped(H), E) + lagrangian * bits * W[0].size, bits


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_levels_are_multiples_of_a_step_of_few_bits_and_give_the_values(given, quantized, steps):
    W, H = given
    result = quantized(steps, 0.01)
    k = np.concatenate([np.arange(-steps, 0), np.arange(1, steps + 1)])
    levels = np.asarray(result.levels)
    step = levels[..., steps]
    assert levels.shape == (EXPERTS, ROWS, 2 * steps) and (step > 0).all()
    np.testing.assert_array_equal(levels, step[..., None] * k)
    assert not np.any(step.view(np.uint32) & np.uint32((1 << 20) - 1))  # 3 bits of mantissa
    np.testing.assert_array_equal(result.Q, numbers_of(result.symbols, steps) * step[..., None])
    E = W.astype(np.float64) - np.asarray(result.Q, np.float64)
    np.testing.assert_allclose(result.loss, np.einsum("erc,ecd,erd->e", E, damped(H), E), rtol=1e-4)


def test_choice_is_the_cheapest_symbol():
    rng = np.random.default_rng(0)
    w, weight = rng.normal(size=(30, 5)).astype(np.float32), rng.uniform(0.5, 2, size=(30, 1)).astype(np.float32)
    numbers = np.array([-3, -2, -1, 1, 2, 3])
    levels = (rng.uniform(0.2, 0.7, size=5) * numbers[:, None]).astype(np.float32)
    prices = rng.uniform(0, 0.2, size=(7, 5)).astype(np.float32)
    unused = np.abs(numbers)[:, None] > np.array([1, 2, 3, 3, 3])
    symbols, q = equal_steps.choose(jnp.asarray(w), jnp.asarray(weight), levels, prices, jnp.asarray(unused))
    values = np.concatenate([np.zeros((1, 5)), levels])
    costs = weight[None] * (w[None] - values[:, None]).astype(np.float64) ** 2 + prices[:, None]
    costs[1:] += np.where(unused, np.inf, 0)[:, None]
    np.testing.assert_array_equal(symbols, costs.argmin(0))
    np.testing.assert_array_equal(q, np.take_along_axis(values, costs.argmin(0), 0))


def test_each_rows_step_is_the_best_for_its_symbols(given, quantized):
    W, H = given
    result = quantized(7, 0.01, level_bits=7)
    k, h = numbers_of(result.symbols, 7).astype(np.float64), damped(H)
    best = np.einsum("erc,ecd,erd->er", k, h, W) / np.einsum("erc,ecd,erd->er", k, h, k)
    np.testing.assert_allclose(np.asarray(result.levels)[..., 7], best, rtol=2**-8)


def test_bits_that_cost_nothing_leave_the_least_error_of_any_single_change(given):
    """After many descents no symbol's neighbour is better, all others given."""
    W, H = given
    result = rate_distortion(W, H, jnp.zeros(W.shape[:2]), steps=3, refits=1, descents=30)
    # Refitted after the last descent: what a symbol would gain is small beside the whole.
    E, h = W.astype(np.float64) - np.asarray(result.Q, np.float64), damped(H)
    step = np.asarray(result.levels, np.float64)[..., 3:4]
    gradient, diagonal = np.einsum("erc,ecd->erd", E, h), np.einsum("ecc->ec", h)[:, None]
    k = numbers_of(result.symbols, 3)
    for change in (-1, 1):
        gain = 2 * change * step * gradient - step**2 * diagonal
        allowed = np.abs(k + change) <= 3
        assert np.where(allowed, gain, 0).max() < 0.02 * np.asarray(result.loss).max()


def test_descents_and_refits_lower_the_cost(given, quantized):
    W, H = given
    costs = [cost(W, H, quantized(7, 0.02, **o), 0.02)[0] for o in (dict(descents=0, refits=1), dict(refits=1), {})]
    assert (costs[1] < costs[0]).all() and (costs[2] < 1.01 * costs[1]).all()


def test_with_more_levels_the_error_falls_at_equal_entropy(given, quantized):
    W, H = given
    lagrangians = 2.0 ** np.arange(-14, 0)

    def loss_at(bits, steps):
        points = [cost(W, H, quantized(steps, float(lam)), 0.0) for lam in lagrangians]
        rates, losses = np.array([p[1].mean() for p in points]), np.log([p[0].sum() for p in points])
        assert rates.min() < bits < rates.max()
        order = np.argsort(rates)
        return np.interp(bits, rates[order], losses[order])

    losses = [loss_at(1.5, steps) for steps in (1, 2, 4)]
    assert losses[1] < losses[0] - 0.3 and losses[2] < losses[1]


def test_a_larger_lagrangian_costs_error_and_saves_bits(given, quantized):
    W, H = given
    points = [cost(W, H, quantized(7, float(lam)), 0.0) for lam in 4.0 ** np.arange(-5, 0)]
    assert (np.diff([p[1] for p in points], axis=0) < 0).all() and (np.diff([p[0] for p in points], axis=0) > 0).all()


def test_experts_and_codes_do_not_know_of_each_other(given):
    W, H = given
    lagrangian = np.geomspace(0.005, 0.1, ROWS).astype(np.float32) * np.ones((EXPERTS, 1), np.float32)
    codes = np.arange(ROWS) % 2
    together = rate_distortion(W, H, lagrangian, codes=codes, steps=7)
    for own in (codes == 0, codes == 1):
        alone = rate_distortion(W[1:, own], H[1:], lagrangian[1:, own], steps=7)
        np.testing.assert_array_equal(np.asarray(together.symbols)[1:, own], alone.symbols)
        np.testing.assert_array_equal(np.asarray(together.levels)[1:, own], alone.levels)


@pytest.mark.parametrize("steps", [1, 7])
def test_rows_of_zeros_and_of_no_importance_have_no_symbols(steps):
    W, H = problem()
    W[0, 3] = 0
    H[1] = 0  # falls back to the identity
    lagrangian = np.full((EXPERTS, ROWS), 0.01, np.float32)
    lagrangian[0, 5] = np.inf
    result = rate_distortion(W, H, lagrangian, steps=steps)
    assert result.fallback.tolist() == [False, True]
    assert not np.any(result.symbols[0, 3]) and not np.any(result.symbols[0, 5])
    assert all(np.isfinite(np.asarray(a)).all() for a in (result.Q, result.levels))


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_steps_cost_one_field_a_row(quantized, steps):
    result = quantized(steps, 0.01)
    experts = CompressedExperts.from_symbols(np.asarray(result.symbols), np.asarray(result.levels), "gap")
    np.testing.assert_array_equal(experts.to_dense(), result.Q)
    stored = experts.stored()
    assert stored["level_words"].nbytes <= EXPERTS * (ROWS + 4)  # at most a byte each
    again = CompressedExperts.from_stored(stored, "gap", experts.shape)
    np.testing.assert_array_equal(again.to_dense(), result.Q)


def test_narrowed_keeps_values_within():
    W, H = problem()
    wide = rate_distortion(W, H, jnp.full(W.shape[:2], 0.001), steps=7)
    narrow = equal_steps.narrowed(wide, 2)
    assert narrow.levels.shape[-1] == 4
    np.testing.assert_array_equal(numbers_of(narrow.symbols, 2), np.clip(numbers_of(wide.symbols, 7), -2, 2))
    assert _steps_in_use(np.asarray(wide.symbols)) > 2
    few = np.where(np.abs(numbers_of(wide.symbols, 7)) > 2, 0, wide.symbols)
    assert _steps_in_use(few.astype(np.uint8)) == 2


@pytest.mark.parametrize("value", [0, 8, 1.5, True])
def test_bad_steps_are_named(given, value):
    W, H = given
    with pytest.raises(ValueError, match=f"steps: found {value!r}, expected a whole number from 1 to 7"):
        rate_distortion(W, H, jnp.zeros(W.shape[:2]), steps=value)
