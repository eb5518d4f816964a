"""Grids: what values a row may take, which one is nearest, and that symbols and grid give the values back."""

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.quantization import grids
from qmoe_jax.quantization.grids import Grid


def quantize_row(row, bits):
    w = jnp.asarray([row], jnp.float32)  # [1 row, columns]
    grid = grids.fit(w)
    values, symbols = grids.quantize(w, Grid(grid.low[:, None], grid.high[:, None]), bits)
    return np.asarray(values)[0].tolist(), np.asarray(symbols)[0].tolist()


def test_ternary_rounds_at_half_and_ties_go_to_zero():
    values, symbols = quantize_row([-2.0, -1.5, -1.0, -0.5, 0.0, 2.0, 2.5, 4.0], 1.5)
    assert values == [-2.0, -2.0, 0.0, 0.0, 0.0, 0.0, 4.0, 4.0]
    assert symbols == [1, 1, 0, 0, 0, 0, 2, 2]


def test_two_bit_has_four_equidistant_levels():
    values, symbols = quantize_row([-1.0, -0.6, -0.4, 0.0, 0.7, 1.4, 1.6, 2.0], 2)
    assert values == [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    assert symbols == [1, 1, 0, 0, 2, 2, 3, 3]  # 0 is zero; the others rise


def test_two_bit_grid_always_has_zero():
    # Step 4/3: the grid is shifted until zero is a level, so the minimum is not.
    values, _ = quantize_row([-1.0, 0.0, 3.0], 2)
    np.testing.assert_allclose(values, [-4 / 3, 0.0, 8 / 3], rtol=1e-6)


@pytest.mark.parametrize("bits", grids.BITS)
def test_symbols_and_levels_are_the_values(bits):
    """0 is zero, k the row's level k - 1, whatever the bits; of rows whose zero is anywhere, and one of zeros."""
    w = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    w = np.stack([abs(w[0]), np.append(-1.4, abs(w[1, 1:])), np.append(1.4, -abs(w[2, 1:])), -abs(w[3]), 0 * w[4]])
    grid = grids.fit(jnp.asarray(w))
    values, symbols = grids.quantize(jnp.asarray(w), Grid(grid.low[:, None], grid.high[:, None]), bits)
    levels = np.asarray(grids.levels(grid, bits))
    count = 2 if bits == 1.5 else 3
    assert levels.shape == (5, count) and levels.dtype == np.float32 and np.asarray(symbols).dtype == np.uint8
    assert (np.diff(levels[:4]) > 0).all() and not levels[4].any() and np.asarray(symbols).max() == count
    np.testing.assert_array_equal(np.asarray(symbols) == 0, np.asarray(values) == 0)
    found = np.take_along_axis(np.pad(levels, ((0, 0), (1, 0))), np.asarray(symbols, int), axis=1)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(grids.dequantize(symbols, jnp.asarray(levels)), values)


@pytest.mark.parametrize("bits", grids.BITS)
def test_row_of_zeros_stays_zero(bits):
    values, symbols = quantize_row([0.0, 0.0, 0.0], bits)
    assert values == [0.0, 0.0, 0.0]
    assert len(set(symbols)) == 1


def test_ternary_row_of_one_sign_has_no_symbol_for_the_other():
    w = jnp.asarray([[1.0, 2.0]])
    grid = grids.fit(w)
    assert (float(grid.low[0]), float(grid.high[0])) == (0.0, 2.0)
    # As in GPTQ, weights may have moved below the minimum since: zero is written as zero, not as "minimum".
    _, symbols = grids.quantize(jnp.asarray([[-0.5, 2.0]]), Grid(grid.low[:, None], grid.high[:, None]), 1.5)
    assert np.asarray(symbols).tolist() == [[0, 2]]


@pytest.mark.parametrize("bits", grids.BITS)
def test_nearest_value_and_round_trip_on_random_rows(bits):
    w = np.random.default_rng(0).normal(size=(20, 300)).astype(np.float32)
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    values, symbols = grids.quantize(jnp.asarray(w), Grid(jnp.asarray(low), jnp.asarray(high)), bits)
    step = (high - low) / 3
    choices = [low, 0 * low, high] if bits == 1.5 else [step * (k - np.round(-low / step)) for k in range(4)]
    nearest = np.min([np.abs(w - c) for c in choices], axis=0)
    np.testing.assert_allclose(np.abs(w - np.asarray(values)), nearest, atol=1e-6)
    levels = grids.levels(Grid(jnp.asarray(low[:, 0]), jnp.asarray(high[:, 0])), bits)
    np.testing.assert_array_equal(grids.dequantize(symbols, levels), values)
