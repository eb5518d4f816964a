"""Every implementation of compressed_ragged_dot, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels import compressed_ragged_dot, ragged_dot
from qmoe_jax.kernels.compressed_ragged_dot.api import IMPLEMENTATIONS

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


def example(tokens, experts, out, width, zeros=0.8, seed=0):
    """lhs float32 [tokens, in], the compressed experts, and their weights, float32 [experts, out, in]."""
    rng = np.random.default_rng(seed)
    p = [zeros, (1 - zeros) / 2, (1 - zeros) / 2]
    trits = rng.choice(3, (experts, out, width), p=p).astype(np.uint8)
    steps = rng.integers(1, 128, (experts, out, 2)) / 64 * [-1, 1]  # exact in bfloat16
    weights = np.where(trits == 0, 0, np.where(trits == 1, steps[..., :1], steps[..., 1:]))
    lhs = rng.standard_normal((tokens, width)).astype(np.float32)
    return lhs, CompressedExperts.from_trits(trits, steps), weights.astype(np.float32)


def reference(lhs, weights, group_sizes):
    """float64 [tokens, out]."""
    expert = np.repeat(np.arange(len(group_sizes)), group_sizes)
    out = np.zeros((lhs.shape[0], weights.shape[1]))
    for token, e in enumerate(expert):
        out[token] = weights[e].astype(np.float64) @ np.asarray(lhs[token], np.float64)
    return out


@pytest.fixture(params=[None, *IMPLEMENTATIONS])
def implementation(request):
    return request.param


@pytest.mark.parametrize("tokens, group_sizes", CASES.values(), ids=CASES.keys())
def test_equals_the_reference(implementation, tokens, group_sizes):
    lhs, rhs, weights = example(tokens, 3, out=10, width=37)
    found = compressed_ragged_dot(lhs, rhs, jnp.array(group_sizes), implementation=implementation)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference(lhs, weights, group_sizes), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(
    group_sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    unassigned=st.integers(0, 5),
    out=st.sampled_from([1, 2, 7, 32]),
    width=st.sampled_from([1, 2, 15, 64]),
    zeros=st.sampled_from([0.0, 0.885, 1.0]),
)
def test_any_shape_and_density(name, group_sizes, unassigned, out, width, zeros):
    lhs, rhs, weights = example(sum(group_sizes) + unassigned, len(group_sizes), out, width, zeros)
    found = compressed_ragged_dot(lhs, rhs, jnp.array(group_sizes), implementation=name)
    np.testing.assert_allclose(found, reference(lhs, weights, group_sizes), rtol=1e-5, atol=1e-4)


def test_bfloat16_is_accumulated_in_float32(implementation):
    lhs, rhs, weights = example(20, 3, out=9, width=600, zeros=0.5)
    lhs = jnp.asarray(lhs, jnp.bfloat16)
    group_sizes = [15, 0, 5]
    found = compressed_ragged_dot(lhs, rhs, jnp.array(group_sizes), implementation=implementation)
    assert found.dtype == jnp.bfloat16
    expected = reference(np.asarray(lhs, np.float32), weights, group_sizes)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-3)


def test_agrees_with_the_dense_product_to_float_precision(implementation):
    lhs, rhs, _ = example(50, 4, out=24, width=50)
    group_sizes = jnp.array([20, 0, 3, 25])
    found = compressed_ragged_dot(lhs, rhs, group_sizes, implementation=implementation)
    dense = ragged_dot(lhs, rhs.to_dense().swapaxes(1, 2), group_sizes)
    np.testing.assert_allclose(found, dense, rtol=1e-6, atol=1e-5)


def test_inside_jit_and_scan(implementation):
    lhs, rhs, weights = example(6, 3, out=5, width=8)
    sizes = np.array([[6, 0, 0], [1, 2, 3], [0, 0, 0]], np.int32)

    @jax.jit
    def run(rhs, sizes):
        def step(_, group_sizes):
            return None, compressed_ragged_dot(lhs, rhs, group_sizes, implementation=implementation)

        return jax.lax.scan(step, None, sizes)[1]

    expected = np.stack([reference(lhs, weights, s) for s in sizes])
    np.testing.assert_allclose(run(rhs, sizes), expected, rtol=1e-5, atol=1e-5)


def test_unknown_implementation_is_refused_with_the_known_ones():
    lhs, rhs, _ = example(6, 3, out=5, width=8)
    with pytest.raises(ValueError, match="'cuda'. Known: .*xla"):
        compressed_ragged_dot(lhs, rhs, jnp.array([6, 0, 0]), implementation="cuda")


def test_arguments_that_do_not_fit_are_refused_by_name():
    lhs, rhs, weights = example(6, 3, out=5, width=8)
    sizes = jnp.array([6, 0, 0])
    with pytest.raises(TypeError, match="rhs: found ndarray"):
        compressed_ragged_dot(lhs, weights, sizes)
    with pytest.raises(ValueError, match=r"lhs: shape \[6, 7\], expected \[tokens, 8\]"):
        compressed_ragged_dot(lhs[:, 1:], rhs, sizes)
    with pytest.raises(ValueError, match="lhs: dtype float16"):
        compressed_ragged_dot(lhs.astype(np.float16), rhs, sizes)
    with pytest.raises(ValueError, match=r"group_sizes: int32 \[2\], expected int32 \[3\]"):
        compressed_ragged_dot(lhs, rhs, sizes[1:])
    with pytest.raises(ValueError, match="group_sizes: float32"):
        compressed_ragged_dot(lhs, rhs, sizes.astype(jnp.float32))
