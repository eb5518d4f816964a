"""Hidden units in order of use."""

import numpy as np
import pytest

from qmoe_jax.models.family import Expert
from qmoe_jax.quantization import grids
from qmoe_jax.quantization.gptq import Quantized
from qmoe_jax.quantization.hidden_units import classes_of_columns, in_order_of_use

D_MODEL, D_FF, EXPERTS = 6, 10, 3


def relu(products):
    return np.maximum(products[0], 0)


def gated(products):
    return np.tanh(products[0]) * products[1]


def quantized(rng, rows, columns):
    symbols = (
        rng.integers(1, 3, (EXPERTS, rows, columns)) * (rng.random((EXPERTS, 1, columns)) < rng.random())
    ).astype(np.uint8)
    levels = np.sort(rng.standard_normal((EXPERTS, rows, 2)).astype(np.float32))
    nothing = np.zeros(EXPERTS)
    return Quantized(np.asarray(grids.dequantize(symbols, levels)), symbols, levels, nothing, nothing)


@pytest.mark.parametrize("inner, activation", [(("wi",), relu), (("gate", "up"), gated)], ids=["relu", "gated"])
def test_experts_compute_the_same(inner, activation):
    rng = np.random.default_rng(0)
    expert = Expert((*inner, "down"), activation)
    before = {m: quantized(rng, D_FF, D_MODEL) for m in inner} | {"down": quantized(rng, D_MODEL, D_FF)}
    after = in_order_of_use(expert, before)
    counts = np.count_nonzero(np.asarray(after["down"].symbols), axis=1)
    assert (np.diff(counts, axis=-1) <= 0).all()
    x = rng.standard_normal((5, D_MODEL))
    for e in range(EXPERTS):

        def outputs(experts, e=e):
            hidden = activation([x @ np.asarray(experts[m].Q[e], np.float64).T for m in inner])
            return hidden @ np.asarray(experts["down"].Q[e], np.float64).T

        np.testing.assert_allclose(outputs(after), outputs(before), rtol=1e-12, atol=1e-12)
    for q in after.values():  # Symbols and levels went along.
        np.testing.assert_array_equal(grids.dequantize(q.symbols, q.levels), q.Q)


def test_only_where_it_can_pay():
    expert, biased = Expert(("wi", "wo"), relu), Expert(("wi", "wo"), relu, ("bi", "bo"))
    assert classes_of_columns(expert, "gap", 128, 384) == 4
    assert classes_of_columns(biased, "gap", 128, 384) == 1  # Biases would have to go along.
    assert classes_of_columns(expert, "dictionary", 128, 384) == classes_of_columns(expert, None, 128, 384) == 1
    assert classes_of_columns(expert, "gap", 64, 384) == 1  # Fewer rows than blocks of four classes have.
    assert classes_of_columns(expert, "gap", 128, 100) == 1


def test_levels_that_nothing_uses_are_zero():
    symbols = np.array([[[0, 0], [1, 0]]], np.uint8)
    levels = np.array([[[-1.0, 2], [-3, 4]]], np.float32)
    np.testing.assert_array_equal(grids.without_unused(symbols, levels), [[[0, 0], [-3, 4]]])
