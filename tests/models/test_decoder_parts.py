"""Routing, positions, masks and caches of decoders by themselves."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.models.common import mixed
from qmoe_jax.models.decoder.attention import visible
from qmoe_jax.models.decoder.cache import LayerCache
from qmoe_jax.models.decoder.config import Rope
from qmoe_jax.models.decoder.rotary import frequencies, rotate
from qmoe_jax.models.decoder.routing import choose_then_softmax, sigmoid_in_groups, softmax_then_choose

LOGITS = jnp.asarray(np.random.RandomState(0).standard_normal((5, 8)), jnp.float32)


def test_softmax_then_choose():
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)[:, :3]
    expert, gate = softmax_then_choose(LOGITS, 3, False)
    np.testing.assert_array_equal(expert, order)
    np.testing.assert_allclose(gate, np.take_along_axis(p, order, -1), rtol=1e-5)
    np.testing.assert_allclose(softmax_then_choose(LOGITS, 3, True).gate.sum(-1), 1, rtol=1e-6)


def test_choosing_first_is_renormalising():
    first, then = choose_then_softmax(LOGITS, 3), softmax_then_choose(LOGITS, 3, True)
    np.testing.assert_array_equal(first.expert, then.expert)
    np.testing.assert_allclose(first.gate, then.gate, rtol=1e-5)


def test_groups_and_corrections():
    """Experts 0 and 1 have the best pair; 7 is the best of all, but its group's second is bad."""
    scores = np.array([0.6, 0.6, 0.1, 0.1, 0.5, 0.4, 0.05, 0.9])
    logits = jnp.asarray(np.log(scores / (1 - scores)), jnp.float32)[None]
    none = jnp.zeros(8)
    expert, gate = sigmoid_in_groups(logits, none, 2, 4, 1, False, 1.0)
    assert sorted(expert[0].tolist()) == [0, 1]
    expert, gate = sigmoid_in_groups(logits, none, 3, 4, 2, False, 2.0)
    assert sorted(expert[0].tolist()) == [0, 1, 7]
    np.testing.assert_allclose(sorted(gate[0].tolist()), [1.2, 1.2, 1.8], rtol=1e-5)
    # A correction decides, and the gate is the score without it.
    expert, gate = sigmoid_in_groups(logits, none.at[2].set(5.0), 1, 4, 1, False, 1.0)
    assert expert.tolist() == [[2]]
    np.testing.assert_allclose(gate, [[0.1]], rtol=1e-5)
    gate = sigmoid_in_groups(logits, none, 3, 1, 1, True, 2.5).gate
    np.testing.assert_allclose(gate.sum(-1), 2.5, rtol=1e-5)


def test_products_of_rotated_vectors_depend_on_distance():
    rng = np.random.RandomState(1)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))
    for neighbours in (False, True):
        at = functools.partial(rotate, rope=Rope(100.0), neighbours=neighbours)
        near, far = (jnp.sum(at(q, jnp.array([[p]])) * at(k, jnp.array([[p + 3]]))) for p in (0, 20))
        np.testing.assert_allclose(near, far, rtol=1e-4)


def test_yarn_keeps_fast_dimensions_and_stretches_slow_ones():
    plain, one = frequencies(Rope(1e4), 64)
    stretched, factor = frequencies(Rope(1e4, "yarn", 8.0, 4096), 64)
    assert one == 1 and factor == pytest.approx(0.1 * np.log(8) + 1)
    np.testing.assert_allclose(stretched[:10], plain[:10], rtol=1e-6)
    np.testing.assert_allclose(stretched[-4:], plain[-4:] / 8, rtol=1e-6)
    assert frequencies(Rope(1e4, "yarn", 8.0, 4096, mscale=1.0, mscale_all_dim=1.0), 64)[1] == 1
    with pytest.raises(ValueError, match="rope kind"):
        Rope(kind="dynamic")


def test_a_window_holds_the_query_itself():
    seen = visible(jnp.arange(5)[None], jnp.arange(5)[None], 2)[0]
    np.testing.assert_array_equal(seen, np.tri(5, dtype=bool) & ~np.tri(5, k=-2, dtype=bool))
    np.testing.assert_array_equal(visible(jnp.array([[3]]), jnp.array([[-1, 3, 4, 0]]), None)[0, 0], [0, 1, 0, 1])


def test_sinks_take_weight():
    logits = jnp.array([[1.0, 2.0, -jnp.inf]])
    e = np.exp([1.0, 2.0, 2.0])
    weights = mixed(logits, jnp.eye(3), jnp.array([[2.0]]))
    np.testing.assert_allclose(weights, [[e[0] / e.sum(), e[1] / e.sum(), 0]], rtol=1e-6)
    np.testing.assert_allclose(mixed(logits, jnp.eye(3)), [[e[0] / e[:2].sum(), e[1] / e[:2].sum(), 0]], rtol=1e-6)


def test_a_cache_keeps_each_row_s_last_tokens():
    memory = jnp.arange(12.0).reshape(2, 6, 1)
    cache = LayerCache.of((memory,), jnp.array([5, 2]), 3)
    assert [sorted(row) for row in cache.positions.tolist()] == [[2, 3, 4], [-1, 0, 1]]
    cache = cache.put((jnp.array([[[50.0]], [[20.0]]]),), jnp.array([[5], [2]]))
    rows = zip(cache.positions.tolist(), cache.memory[0][..., 0].tolist(), strict=True)
    kept = [dict(zip(positions, values, strict=True)) for positions, values in rows]
    assert kept == [{3: 3.0, 4: 4.0, 5: 50.0}, {0: 6.0, 1: 7.0, 2: 20.0}]
