"""Matrices whose columns are in classes, in every implementation, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compressed_ragged_dot import reference

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels import compressed_ragged_dot
from qmoe_jax.kernels.compressed_ragged_dot import cpu

# Classes, levels, out, in: several blocks of rows; several segments in a class.
SHAPES = ((4, 2, 70, 192), (2, 3, 9, 1600), (4, 6, 140, 64))
# Of 9 tokens and 3 experts, and what is made of group sizes that can't be.
GROUPS = {
    "one and several": ([1, 0, 8], [1, 0, 8]),
    "tokens without expert": ([2, 0, 3], [2, 0, 3]),
    "more than there are": ([4, 50, 3], [4, 5, 0]),
    "below zero": ([-7, 4, -(2**31)], [0, 4, 0]),
}


def example(classes, num_levels, out, width, tokens=9, experts=3):
    """lhs float32 [tokens, in], experts whose columns are ever sparser, their weights float32 [experts, out, in]."""
    rng = np.random.default_rng(0)
    zeros = np.linspace(0.3, 0.99, width)
    symbols = rng.integers(1, num_levels + 1, (experts, out, width)) * (rng.random((experts, out, width)) >= zeros)
    levels = np.sort(rng.integers(-127, 128, (experts, out, num_levels)) / 64)
    weights = np.take_along_axis(np.insert(levels, 0, 0, axis=-1), symbols, axis=-1).astype(np.float32)
    lhs = rng.standard_normal((tokens, width)).astype(np.float32)
    return lhs, CompressedExperts.from_symbols(symbols.astype(np.uint8), levels, classes=classes), weights


@pytest.fixture(params=["xla", *(f"cpu with {isa}" for isa in cpu.ISAS)])
def implementation(request, monkeypatch):
    name, _, isa = request.param.partition(" with ")
    if isa:
        monkeypatch.setenv("QMOE_JAX_ISA", isa)
        if reason := cpu.why_not(example(4, 2, 1, 64)[1]):
            pytest.skip(reason)
    return name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, implementation):
    lhs, rhs, weights = example(*shape)
    product = jax.jit(lambda lhs, sizes: compressed_ragged_dot(lhs, rhs, sizes, implementation=implementation))
    for sizes, real in GROUPS.values():
        found = product(lhs, jnp.array(sizes))
        np.testing.assert_allclose(found, reference(lhs, weights, real), rtol=1e-5, atol=1e-3)
    for sizes in ([0, 1, 0], [0, 0, 0]):
        found = compressed_ragged_dot(lhs[:1], rhs, jnp.array(sizes), implementation=implementation)
        np.testing.assert_allclose(found, reference(lhs[:1], weights, sizes), rtol=1e-5, atol=1e-3)


def test_bfloat16_is_rounded_once(implementation):
    lhs, rhs, weights = example(4, 2, 20, 512)
    lhs = jnp.asarray(lhs, jnp.bfloat16)
    found = compressed_ragged_dot(lhs, rhs, jnp.array([4, 0, 5]), implementation=implementation)
    assert found.dtype == jnp.bfloat16
    expected = reference(np.asarray(lhs, np.float32), weights, [4, 0, 5])
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-4)


def test_the_derivative_for_tokens(implementation):
    lhs, rhs, weights = example(4, 2, 70, 192)
    g = np.random.default_rng(1).standard_normal((9, 70)).astype(np.float32)
    gradient = jax.jit(
        jax.grad(lambda x, n: jnp.sum(g * compressed_ragged_dot(x, rhs, n, implementation=implementation)))
    )
    for sizes, real in GROUPS.values():
        expected = reference(g, weights.swapaxes(1, 2), real)
        np.testing.assert_allclose(gradient(lhs, jnp.array(sizes)), expected, rtol=1e-5, atol=1e-3)
