"""Other methods' re-implementations: properties that follow from their definitions."""

import pathlib
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ways():
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        from studies import other_ways
    finally:
        sys.path.pop(0)
    return other_ways


@pytest.fixture(scope="module")
def matrix():
    """W [16, 96], H [96, 96] of correlated inputs."""
    random = np.random.default_rng(0)
    X = random.standard_normal((500, 96)) @ random.standard_normal((96, 96))
    return random.standard_normal((16, 96)), 2 / len(X) * X.T @ X


def output_error(W, Q, H):
    return np.trace((W - Q) @ H @ (W - Q).T)


@pytest.mark.parametrize("n", [1, 12, 96, 128])
def test_rotations_are_orthogonal_and_spread_every_direction(ways, n):
    R = ways.rotation(n, seed=3)
    np.testing.assert_allclose(R @ R.T, np.eye(n), atol=1e-12)
    if n == 128:
        np.testing.assert_allclose(np.abs(R), 128**-0.5)


def test_turning_keeps_products_and_turns_back(ways, matrix):
    W, H = matrix
    t = ways.turned(W, H, seed=0)
    np.testing.assert_allclose(np.trace(t.W @ t.H @ t.W.T), np.trace(W @ H @ W.T))
    np.testing.assert_allclose(t.back(t.W), W, atol=1e-12)


def test_errors_are_fed_back_to_later_columns(ways, matrix):
    W, H = matrix
    rounded = ways.error_feedback(W, np.eye(96), lambda i, W, _: np.round(W[:, i]))
    np.testing.assert_array_equal(rounded, np.round(W))  # Nothing to feed back to.
    fed = ways.error_feedback(W, H, lambda i, W, _: np.round(W[:, i]))
    assert output_error(W, fed, H) < 0.7 * output_error(W, np.round(W), H)


def test_half_quadratic_beats_the_extremes_grid(ways, matrix):
    W = np.random.default_rng(1).laplace(size=(64, 256))  # Heavy tails: that is what its norm is for.
    found = ways.half_quadratic(W, 4, group=64)
    G = W.reshape(64, 4, 64)
    low, step = G.min(-1, keepdims=True), (G.max(-1, keepdims=True) - G.min(-1, keepdims=True)) / 3
    plain = (low + step * np.round((G - low) / step)).reshape(W.shape)
    assert np.mean(np.abs(W - found.Q) ** 0.7) < np.mean(np.abs(W - plain) ** 0.7)
    assert all(len(np.unique(group)) <= 4 for group in found.Q.reshape(-1, 64))
    assert found.bits <= (2 + 32 / 64) * W.size


def test_outliers_stay_and_the_rest_is_on_grids(ways, matrix):
    W, H = matrix
    W = W.copy()
    W[3, 40] = 30.0
    none, few = (ways.sparse_outliers(W, H, 4, share=share) for share in (0.0, 0.01))
    assert output_error(W, few.Q, H) < 0.8 * output_error(W, none.Q, H)
    assert few.bits - none.bits <= 32 * np.ceil(0.01 * W.size)


def test_score_of_an_expert_without_tokens(ways):
    assert ways.reap(np.array([]), np.array([])) == 0.0
    assert ways.reap(np.array([2.0, 4.0]), np.array([0.5, 1.0])) == 2.5
