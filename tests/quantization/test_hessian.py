"""Hessians against NumPy in float64, in one go and streamed."""

import jax.numpy as jnp
import numpy as np

from qmoe_jax.quantization import accumulate, hessian


def example():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(3, 50, 8)).astype(np.float32)
    mask = rng.random((3, 50)) < 0.6
    mask[2] = False
    expected = np.zeros((3, 8, 8))
    for e in range(2):
        rows = X[e][mask[e]].astype(np.float64)
        expected[e] = 2 / len(rows) * rows.T @ rows
    return X, mask, expected


def test_hessian_is_the_mean_over_valid_tokens_and_zero_without_any():
    X, mask, expected = example()
    X[~mask] = np.nan  # padding may hold anything
    np.testing.assert_allclose(hessian(jnp.asarray(X), jnp.asarray(mask)), expected, rtol=1e-5, atol=1e-6)


def test_streamed_chunks_give_the_hessian_of_all_tokens():
    X, mask, expected = example()
    H, n = jnp.zeros((3, 8, 8)), jnp.zeros(3, jnp.int32)
    for start in range(0, 50, 10):
        part = slice(start, start + 10)
        H, n = accumulate(H, n, jnp.asarray(X[:, part]), jnp.asarray(mask[:, part]))
    np.testing.assert_allclose(H, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(n, mask.sum(1))


def test_bfloat16_inputs_are_summed_in_float32():
    X = jnp.ones((1, 1000, 2), jnp.bfloat16)
    np.testing.assert_array_equal(hessian(X, jnp.ones((1, 1000), bool)), np.full((1, 2, 2), 2.0))
