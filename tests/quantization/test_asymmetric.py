"""Weights fitted to outputs, against matrix inverses and least squares in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.quantization.asymmetric import match_outputs


def problem(experts=3, rows=6, columns=40, tokens=120, seed=0):
    """W [experts, rows, columns], inputs before and now [experts, tokens, columns], and H, R of float64 sums."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(experts, rows, columns))
    mix = rng.normal(size=(experts, columns, columns)) * rng.lognormal(size=(experts, 1, columns))
    before = rng.normal(size=(experts, tokens, columns)) @ mix
    now = before + 0.5 * rng.normal(size=before.shape) @ mix
    H = 2 / tokens * np.einsum("etc,etd->ecd", now, now)
    R = 2 / tokens * np.einsum("erc,etc,etd->erd", W, before - now, now)
    return W, before, now, H, R


def match(W, H, R, **options):
    return np.asarray(match_outputs(*(jnp.asarray(x, jnp.float32) for x in (W, H, R)), **options))


def damp(H, damping):
    return damping * np.einsum("eii->e", H)[:, None, None] / H.shape[-1] * np.eye(H.shape[-1])


@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("block_size", [8, 128], ids=["panels", "one_panel"])
def test_equals_the_inverse(damping, block_size):
    W, _, _, H, R = problem()
    expected = W + R @ np.linalg.inv(H + damp(H, damping))
    np.testing.assert_allclose(match(W, H, R, damping=damping, block_size=block_size), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [1, 13, 72])  # padded; several panels of two blocks
def test_any_number_of_columns(columns):
    W, _, _, H, R = problem(columns=columns)
    expected = W + R @ np.linalg.inv(H + damp(H, 0.1))
    np.testing.assert_allclose(match(W, H, R, block_size=8), expected, rtol=1e-3, atol=1e-3)


def test_is_the_regression_of_outputs_on_inputs_that_stays_close_to_W():
    W, before, now, H, R = problem()
    found = match(W, H, R)
    for e in range(len(W)):
        tokens, columns = now[e].shape
        # H is twice a mean, so is the weight of a deviation from W.
        weight = np.sqrt(0.1 * np.trace(H[e]) / columns / 2)
        inputs = np.concatenate([now[e] / np.sqrt(tokens), weight * np.eye(columns)])
        targets = np.concatenate([before[e] @ W[e].T / np.sqrt(tokens), weight * W[e].T])
        expected, *_ = np.linalg.lstsq(inputs, targets, rcond=None)
        np.testing.assert_allclose(found[e], expected.T, rtol=1e-3, atol=1e-3)

        def error(V, e=e):
            return np.mean((before[e] @ W[e].T - now[e] @ V.T) ** 2)

        assert error(found[e]) < 0.9 * error(W[e])


def test_inputs_that_have_not_changed_leave_W():
    W, _, _, H, R = problem()
    np.testing.assert_array_equal(match(W, H, np.zeros_like(R)), W.astype(np.float32))


@pytest.mark.parametrize("bad", ["zero", "nan", "indefinite"])
def test_unusable_hessian_leaves_W_of_that_expert_alone(bad):
    W, _, _, H, R = problem()
    good = match(W, H, R)
    if bad == "zero":
        H[1], R[1] = 0, 0
    elif bad == "nan":
        H[1, 3, 3] = np.nan
    else:
        H[1, 3, 4] = H[1, 4, 3] = 100 * np.sqrt(H[1, 3, 3] * H[1, 4, 4])
    found = match(W, H, R)
    np.testing.assert_array_equal(found[1], W[1].astype(np.float32))
    np.testing.assert_array_equal(found[[0, 2]], good[[0, 2]])
