"""Dense products of tokens grouped by expert, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.kernels import grouped_dot, ragged_dot
from qmoe_jax.kernels.grouped import group_ends

CASES = {
    "even": (6, [2, 2, 2]),
    "zeros": (5, [0, 5, 0]),
    "first expert only": (40, [40, 0, 0]),
    "last expert only": (40, [0, 0, 40]),
    "tokens without expert": (9, [2, 0, 3]),
    "no token assigned": (4, [0, 0, 0]),
    "no tokens": (0, [0, 0, 0]),
    "more than a block": (700, [1, 390, 309]),
    "one token": (1, [0, 1, 0]),
}


def reference(lhs, rhs, group_sizes):
    """float64 [tokens, out]: a loop over experts."""
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    ends = np.cumsum(group_sizes)
    for expert, (start, end) in enumerate(zip(ends - group_sizes, ends, strict=True)):
        out[start:end] = np.asarray(lhs[start:end], np.float64) @ np.asarray(rhs[expert], np.float64)
    return out


def operands(tokens, experts, width, out, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((tokens, width)).astype(np.float32),
        rng.standard_normal((experts, width, out)).astype(np.float32),
    )


@pytest.mark.parametrize("tokens, group_sizes", CASES.values(), ids=CASES.keys())
def test_equals_a_loop_over_experts(tokens, group_sizes):
    lhs, rhs = operands(tokens, 3, 13, 7)
    found = ragged_dot(lhs, rhs, jnp.array(group_sizes))
    np.testing.assert_allclose(found, reference(lhs, rhs, np.array(group_sizes)), rtol=1e-5, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=5),
    st.integers(0, 9),
    st.integers(1, 17),
    st.integers(1, 17),
)
def test_any_shape(group_sizes, unassigned, width, out):
    lhs, rhs = operands(sum(group_sizes) + unassigned, len(group_sizes), width, out)
    found = ragged_dot(lhs, rhs, jnp.array(group_sizes))
    np.testing.assert_allclose(found, reference(lhs, rhs, np.array(group_sizes)), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_accumulated_in_float32():
    lhs, rhs = operands(50, 3, 600, 5)
    lhs, rhs = jnp.asarray(lhs, jnp.bfloat16), jnp.asarray(rhs, jnp.bfloat16)
    group_sizes = np.array([10, 0, 40])
    found = ragged_dot(lhs, rhs, jnp.asarray(group_sizes))
    assert found.dtype == jnp.bfloat16
    expected = reference(np.asarray(lhs, np.float32), np.asarray(rhs, np.float32), group_sizes)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("tokens, group_sizes", CASES.values(), ids=CASES.keys())
def test_gradients_equal_those_of_the_one_hot_product(tokens, group_sizes):
    lhs, rhs = operands(tokens, 3, 13, 7)
    gradient = operands(tokens, 1, 7, 1, seed=1)[0]
    group_sizes = np.array(group_sizes)
    expert = np.repeat(np.arange(3), group_sizes)
    one_hot = np.zeros((tokens, 3))
    one_hot[np.arange(expert.size), expert] = 1

    @jax.jit
    def gradients(lhs, rhs):
        return jax.vjp(lambda lhs, rhs: ragged_dot(lhs, rhs, jnp.asarray(group_sizes)), lhs, rhs)[1](gradient)

    d_lhs, d_rhs = gradients(lhs, rhs)
    expected_lhs = np.einsum("te,to,eio->ti", one_hot, gradient, rhs)
    expected_rhs = np.einsum("te,ti,to->eio", one_hot, lhs, gradient)
    np.testing.assert_allclose(d_lhs, expected_lhs, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(d_rhs, expected_rhs, rtol=1e-5, atol=1e-4)


def test_more_tokens_promised_than_there_are_is_cut_off():
    lhs, rhs = operands(10, 3, 4, 6)
    found = ragged_dot(lhs, rhs, jnp.array([4, 50, 3]))
    np.testing.assert_allclose(found, reference(lhs, rhs, np.array([4, 6, 0])), rtol=1e-5, atol=1e-5)


def test_experts_without_tokens_are_not_asked_for():
    asked = []

    def matrix(expert):
        jax.debug.callback(lambda e: asked.append(int(e)), expert)
        return jnp.ones((2, 3))

    grouped_dot(jnp.ones((5, 2)), jnp.array([0, 2, 0, 3]), matrix, out_features=3).block_until_ready()
    jax.effects_barrier()
    assert sorted(asked) == [1, 3]


def test_shapes_that_do_not_fit_are_refused():
    lhs, rhs = operands(10, 3, 4, 6)
    with pytest.raises(ValueError, match=r"lhs \[10, 3\], rhs \[3, 4, 6\]"):
        ragged_dot(lhs[:, 1:], rhs, jnp.array([4, 5, 1]))


@pytest.mark.parametrize("tokens", [10, 2**30])  # The sum fits into int32, and doesn't.
def test_ends_of_groups_whatever_is_promised(tokens):
    sizes = np.array([3, -5, 2**31 - 1, 4, 2**31 - 1], np.int32)
    expected = np.minimum(np.cumsum(np.clip(sizes.astype(np.int64), 0, tokens)), tokens)
    np.testing.assert_array_equal(group_ends(jnp.asarray(sizes), tokens), expected)
    with pytest.raises(TypeError, match="group_sizes: found list"):
        ragged_dot(np.ones((1, 2), np.float32), np.ones((1, 2, 3), np.float32), [1])
