"""The derivative of compressed_ragged_dot, against float64 NumPy and autodiff of the dense product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compressed_ragged_dot import KINDS, TERNARY, example

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.kernels import compressed_ragged_dot
from qmoe_jax.kernels.compressed_ragged_dot import cpu

# Of 12 tokens and 3 experts, and what is made of group sizes that can't be.
GROUPS = {
    "even": ([4, 4, 4], [4, 4, 4]),
    "one expert": ([0, 12, 0], [0, 12, 0]),
    "tokens without expert": ([2, 0, 3], [2, 0, 3]),
    "no token assigned": ([0, 0, 0], [0, 0, 0]),
    "more than there are": ([4, 50, 3], [4, 8, 0]),
    "below zero": ([-7, 4, -(2**31)], [0, 4, 0]),
    "beyond int32": ([3, 2**31 - 1, 2**31 - 1], [3, 9, 0]),
}


@pytest.fixture(
    params=[k if k != ("gap", 3) else pytest.param(k, marks=pytest.mark.long) for k in KINDS.values()], ids=KINDS.keys()
)
def kind(request):
    return request.param


# None, XLA, and the C++ code for each instruction set; GPU kernels are differentiated by XLA's.
@pytest.fixture(params=["default", "xla", *(f"cpu with {isa}" for isa in cpu.ISAS)])
def implementation(request, monkeypatch, kind):
    name, _, isa = request.param.partition(" with ")
    if isa:
        monkeypatch.setenv("QMOE_JAX_ISA", isa)
        _, rhs, _ = example(kind, 1, 1, out=1, width=1)
        if reason := cpu.why_not(rhs):
            pytest.skip(reason)
    return None if name == "default" else name


def differentiated(rhs, g, implementation):
    """Gradients of sum(g * product) with respect to lhs and levels, jitted; levels as float32 master copies."""

    def total(lhs, levels, group_sizes):
        y = compressed_ragged_dot(lhs, rhs.with_levels(levels), group_sizes, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) * g)

    of = jax.jit(jax.grad(total, argnums=(0, 1)))
    return lambda lhs, group_sizes: of(lhs, rhs.levels.astype(jnp.float32), jnp.array(group_sizes, jnp.int32))


def reference(lhs, rhs, weights, group_sizes, g):
    """The same in float64: [tokens, in], [experts, out, L]."""
    symbols, (experts, out, L) = np.asarray(rhs.symbols()), rhs.levels.shape
    d_lhs, d_levels = np.zeros(lhs.shape), np.zeros((experts, out, L))
    for token, e in enumerate(np.repeat(np.arange(experts), group_sizes)):
        x, dy = np.asarray(lhs[token], np.float64), np.asarray(g[token], np.float64)
        d_lhs[token] = dy @ weights[e].astype(np.float64)
        for k in range(L):
            d_levels[e, :, k] += dy * ((symbols[e] == k + 1) @ x)
    return d_lhs, d_levels


def random_g(tokens, out, seed=1):
    return np.random.default_rng(seed).standard_normal((tokens, out)).astype(np.float32)


def test_equals_the_reference(kind, implementation):
    lhs, rhs, weights = example(kind, 12, 3, out=10, width=37)
    g = random_g(12, 10)
    gradients = differentiated(rhs, g, implementation)
    for name, (promised, kept) in GROUPS.items():
        d_lhs, d_levels = gradients(lhs, promised)
        expected = reference(lhs, rhs, weights, kept, g)
        np.testing.assert_allclose(d_lhs, expected[0], rtol=1e-5, atol=1e-4, err_msg=name)
        assert d_levels.dtype == jnp.float32  # of master copies; bfloat16 on the way
        np.testing.assert_allclose(d_levels, expected[1], rtol=2**-8, atol=1e-4, err_msg=name)


def test_no_tokens(kind):
    lhs, rhs, _ = example(kind, 0, 3, out=10, width=37)
    d_lhs, d_levels = differentiated(rhs, random_g(0, 10), None)(lhs, [0, 5, 0])
    assert d_lhs.shape == (0, 37) and not np.any(d_levels)


# Several segments of the gap codec, several blocks of rows, more tokens than a piece has, from dense to sparse codes.
@pytest.mark.parametrize("zeros", [0.1, pytest.param(0.885, marks=pytest.mark.long), 0.99])
def test_many_rows_columns_and_tokens(kind, implementation, zeros):
    lhs, rhs, weights = example(kind, 150, 2, out=130, width=1100, zeros=zeros)
    g = random_g(150, 130)
    d_lhs, d_levels = differentiated(rhs, g, implementation)(lhs, [3, 140])
    expected = reference(lhs, rhs, weights, [3, 140], g)
    np.testing.assert_allclose(d_lhs, expected[0], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(d_levels, expected[1], rtol=2**-8, atol=1e-2)


def test_bfloat16_tokens_are_accumulated_in_float32(kind, implementation):
    lhs, rhs, weights = example(kind, 20, 3, out=300, width=33, zeros=0.5)
    lhs, g = jnp.asarray(lhs, jnp.bfloat16), random_g(20, 300).astype(jnp.bfloat16).astype(np.float32)
    d_lhs, d_levels = differentiated(rhs, g, implementation)(lhs, [15, 0, 5])
    assert d_lhs.dtype == jnp.bfloat16
    expected = reference(np.asarray(lhs, np.float32), rhs, weights, [15, 0, 5], g)
    np.testing.assert_allclose(np.asarray(d_lhs, np.float64), expected[0], rtol=2**-8, atol=1e-3)
    np.testing.assert_allclose(d_levels, expected[1], rtol=2**-8, atol=1e-2)


def test_two_products_in_a_row_as_autodiff_of_the_dense_ones():
    """An MLP, differentiated with respect to a tree of compressed experts: all leaves but levels have no derivative."""
    lhs, first, _ = example(TERNARY, 12, 2, out=20, width=9)
    _, second, _ = example(("gap", 2), 12, 2, out=9, width=20, seed=3)
    sizes = jnp.array([5, 7])

    def compressed(experts):
        h = jax.nn.relu(compressed_ragged_dot(lhs, experts["first"], sizes))
        return jnp.sum(compressed_ragged_dot(h, experts["second"], sizes) ** 2)

    def dense(levels):
        def product(x, rhs, levels):
            rows = jnp.pad(levels.astype(jnp.float32), ((0, 0), (0, 0), (1, 0)))
            W = jnp.take_along_axis(rows, rhs.symbols().astype(int), axis=-1)[np.repeat([0, 1], [5, 7])]
            return jnp.einsum("toi,ti->to", W, x)

        h = jax.nn.relu(product(lhs, first, levels["first"]))
        return jnp.sum(product(h, second, levels["second"]) ** 2)

    found = jax.grad(compressed, allow_int=True)({"first": first, "second": second})
    expected = jax.grad(dense)({"first": first.levels, "second": second.levels})
    for name, experts in found.items():
        assert isinstance(experts, CompressedExperts)
        assert all(leaf.dtype == jax.dtypes.float0 for leaf in experts.data.values())
        np.testing.assert_allclose(
            np.asarray(experts.levels, np.float32), np.asarray(expected[name], np.float32), rtol=2**-6, atol=1e-2
        )


def test_levels_of_another_shape_are_refused():
    _, rhs, _ = example(TERNARY, 1, 3, out=5, width=8)
    with pytest.raises(ValueError, match=r"levels: shape \[3, 5\], expected \[3, 5, 2\]"):
        rhs.with_levels(rhs.levels[..., 0])


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_cpu_survives_malformed_arrays_that_nobody_checked(kind, monkeypatch, isa):
    monkeypatch.setenv("QMOE_JAX_ISA", isa)
    _, rhs, _ = example(kind, 1, 3, out=40, width=1333, zeros=0.9)
    if reason := cpu.why_not(rhs):
        pytest.skip(reason)
    rng, g = np.random.default_rng(0), random_g(8, 40)
    for name in rhs.data:
        array = rhs.data[name]
        noise = rng.integers(0, 256, array.nbytes, np.uint8).view(array.dtype).reshape(array.shape)
        broken = dataclasses.replace(rhs, data={**rhs.data, name: jnp.asarray(noise)})
        assert np.isfinite(cpu.multiply_transposed(g, broken, jnp.array([3, 1, 4]))).all()
