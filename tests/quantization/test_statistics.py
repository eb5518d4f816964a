"""Statistics of calibration tokens against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.models.switch.config import GATED, PLAIN
from qmoe_jax.quantization import statistics
from qmoe_jax.quantization.gptq import gptq, round_to_nearest
from qmoe_jax.quantization.sharding import expert_sharding
from qmoe_jax.quantization.statistics import Samples

D_MODEL, D_FF, TOKENS = 8, 12, 200
CASES = [(3, False), (8, True)]  # experts (on one device, on eight), gated
ids = ["plain", "gated"]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(statistics, "TOKENS_PER_CHUNK", 16)


def problem(experts, gated, seed=0):
    """Kernels [experts, in, out], inputs [tokens, d_model] and samples; expert 1 has no tokens."""
    rng = np.random.default_rng(seed)
    names = ["wi_0", "wi_1"] if gated else ["wi"]
    kernels = {m: rng.normal(size=(experts, D_MODEL, D_FF)).astype(np.float32) for m in names}
    kernels["wo"] = rng.normal(size=(experts, D_FF, D_MODEL)).astype(np.float32)
    inputs = rng.normal(size=(TOKENS, D_MODEL)).astype(np.float32)
    samples = []
    for e in range(experts):
        rows = np.sort(rng.choice(TOKENS, size=0 if e == 1 else 5 + 13 * e % 50, replace=False))
        samples.append(Samples(rows, rng.uniform(0.1, 1, size=len(rows)).astype(np.float32)))
    return kernels, inputs, samples


def on_devices(kernels):
    sharding = expert_sharding(len(kernels["wo"]))
    return {m: jax.device_put(jnp.asarray(k), sharding) for m, k in kernels.items()}, sharding


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def activation(sums):
    """Hidden units of the sums, [matrices, tokens, d_ff]."""
    return np.maximum(sums[0], 0) if len(sums) == 1 else gelu(sums[0]) * sums[1]


def sums_of(kernels, e, X):
    return np.stack([X @ kernels[m][e].astype(np.float64) for m in sorted(kernels) if m != "wo"])


def weighted(Y, X, weight):
    return 2 / weight.sum() * (Y * weight[:, None]).T @ X if len(weight) else np.zeros((Y.shape[1], X.shape[1]))


@pytest.mark.parametrize(("experts", "gated"), CASES, ids=ids)
def test_input_hessians(experts, gated):
    _, inputs, samples = problem(experts, gated)
    H = statistics.input_hessians(inputs, samples, expert_sharding(experts))
    assert H.dtype == jnp.float32 and H.sharding.is_equivalent_to(expert_sharding(experts), 3)
    for e, (rows, weight) in enumerate(samples):
        X = inputs[rows].astype(np.float64)
        np.testing.assert_allclose(H[e], weighted(X, X, weight.astype(np.float64)), rtol=1e-4, atol=1e-5)


def test_bfloat16_inputs():
    _, inputs, samples = problem(3, False)
    inputs = np.asarray(jnp.asarray(inputs, jnp.bfloat16))
    H = statistics.input_hessians(inputs, samples, expert_sharding(3))
    X = inputs[samples[2].rows].astype(np.float64)
    np.testing.assert_allclose(H[2], weighted(X, X, samples[2].weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("experts", "gated"), CASES, ids=ids)
def test_hidden_importance_is_what_an_error_of_a_sum_does_to_the_output(experts, gated):
    kernels, inputs, samples = problem(experts, gated)
    expert = GATED if gated else PLAIN
    kernels["wo"][2, 4] = 0  # a unit that nothing comes of
    arrays, sharding = on_devices(kernels)
    found = statistics.hidden_importance(expert, arrays, inputs, samples, sharding)
    assert sorted(found) == sorted(m for m in kernels if m != "wo")
    for e, (rows, weight) in enumerate(samples):
        sums = sums_of(kernels, e, inputs[rows].astype(np.float64))
        for k, name in enumerate(sorted(found)):
            if len(rows) == 0:
                np.testing.assert_array_equal(found[name][e], 1)
                continue
            step = 1e-6 * np.eye(len(sums))[k][:, None, None]
            slope = (activation(sums + step) - activation(sums - step)) / 2e-6  # [tokens, d_ff]
            outputs = slope[..., None] * kernels["wo"][e].astype(np.float64)  # [tokens, d_ff, d_model]
            expected = np.average((outputs**2).sum(-1), axis=0, weights=weight)
            expected = np.maximum(expected, expected.mean() / 1000)
            np.testing.assert_allclose(found[name][e], expected, rtol=1e-3)
    assert found[name].sharding.is_equivalent_to(sharding, 2)


def test_hidden_importance_of_many_tokens_is_estimated():
    expert, (kernels, _, _) = PLAIN, problem(2, False)
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(20_000, D_MODEL)).astype(np.float32)
    samples = [Samples(np.arange(20_000), rng.uniform(0.1, 1, size=20_000).astype(np.float32))] * 2
    arrays, sharding = on_devices(kernels)
    found = statistics.hidden_importance(expert, arrays, inputs, samples, sharding)["wi"]
    for e in range(2):
        active = np.average(sums_of(kernels, e, inputs)[0] > 0, axis=0, weights=samples[e].weights)
        np.testing.assert_allclose(found[e], active * (kernels["wo"][e] ** 2).sum(1), rtol=0.25)


@pytest.mark.parametrize(("experts", "gated"), CASES, ids=ids)
def test_hidden_statistics(experts, gated):
    kernels, inputs, samples = problem(experts, gated)
    expert = GATED if gated else PLAIN
    rng = np.random.default_rng(1)
    now = {m: (k + 0.3 * rng.normal(size=k.shape)).astype(np.float32) for m, k in kernels.items() if m != "wo"}
    arrays, sharding = on_devices(kernels)
    wi = {m: jax.device_put(jnp.asarray(k), sharding) for m, k in now.items()}
    H, R = statistics.hidden_statistics(expert, arrays, wi, inputs, samples, sharding, residuals=True)
    for e, (rows, weight) in enumerate(samples):
        X = inputs[rows].astype(np.float64)
        before, after = activation(sums_of(kernels, e, X)), activation(sums_of(now, e, X))
        np.testing.assert_allclose(H[e], weighted(after, after, weight), rtol=1e-3, atol=1e-3)
        lacking = (before - after) @ kernels["wo"][e].astype(np.float64)
        np.testing.assert_allclose(R[e], weighted(lacking, after, weight), rtol=1e-3, atol=1e-3)
    for found in (H, R):
        assert found.dtype == jnp.float32 and found.sharding.is_equivalent_to(sharding, 3)
    alone, none = statistics.hidden_statistics(expert, arrays, wi, inputs, samples, sharding, residuals=False)
    assert none is None
    np.testing.assert_array_equal(alone, H)


def test_unchanged_kernels_lack_nothing():
    expert, (kernels, inputs, samples) = PLAIN, problem(3, False)
    arrays, sharding = on_devices(kernels)
    _, R = statistics.hidden_statistics(expert, arrays, arrays, inputs, samples, sharding, residuals=True)
    np.testing.assert_array_equal(R, 0)


def test_chunks_are_a_matter_of_memory(monkeypatch):
    expert, (kernels, inputs, samples) = PLAIN, problem(3, False)
    arrays, sharding = on_devices(kernels)

    def found():
        H = statistics.input_hessians(inputs, samples, sharding)
        importance = statistics.hidden_importance(expert, arrays, inputs, samples, sharding)["wi"]
        return (
            H,
            importance,
            *statistics.hidden_statistics(expert, arrays, arrays, inputs, samples, sharding, residuals=True),
        )

    several = found()
    monkeypatch.setattr(statistics, "TOKENS_PER_CHUNK", 512)
    for a, b in zip(several, found(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 4])
def test_other_experts_of_the_group_change_no_bit(devices, monkeypatch):
    """Groups of two with few tokens, or with many, on one device or on several."""
    monkeypatch.setattr(statistics, "TOKENS_PER_CHUNK", 64)
    expert, (kernels, inputs, samples) = GATED, problem(8, True)
    samples[2] = Samples(samples[2].rows[:1], samples[2].weights[:1])
    samples[5] = Samples(np.arange(TOKENS), np.linspace(0.1, 1, TOKENS, dtype=np.float32))
    _, sharding = on_devices(kernels)

    def found(experts, sharding):
        arrays = {m: jax.device_put(jnp.asarray(k[experts]), sharding) for m, k in kernels.items()}
        own = [samples[e] for e in experts]
        H = statistics.input_hessians(inputs, own, sharding)
        importance = statistics.hidden_importance(expert, arrays, inputs, own, sharding)
        statistics_of_hidden = statistics.hidden_statistics(
            expert, arrays, arrays, inputs, own, sharding, residuals=True
        )
        return list(map(np.asarray, (H, *importance.values(), *statistics_of_hidden)))

    one_device = expert_sharding(2)
    together = found(np.arange(8), expert_sharding(8) if devices > 1 else one_device)
    for group in ([0, 1], [2, 3], [4, 5], [6, 7]):
        for a, b in zip(together, found(np.array(group), one_device), strict=True):
            np.testing.assert_array_equal(a[group], b)


def test_nobody_has_tokens():
    expert, (kernels, inputs, _) = PLAIN, problem(3, False)
    arrays, sharding = on_devices(kernels)
    samples = [Samples(np.zeros(0, int), np.zeros(0, np.float32))] * 3
    np.testing.assert_array_equal(statistics.input_hessians(inputs, samples, sharding), 0)
    np.testing.assert_array_equal(statistics.hidden_importance(expert, arrays, inputs, samples, sharding)["wi"], 1)
    for found in statistics.hidden_statistics(expert, arrays, arrays, inputs, samples, sharding, residuals=True):
        np.testing.assert_array_equal(found, 0)


# --- Which tokens, and what they count -------------------------------------------------------------------------------


def routed(seed=0):
    rng = np.random.default_rng(seed)
    tokens = [np.sort(rng.choice(TOKENS, size=n, replace=False)) for n in (30, 0, 7)]
    return tokens, [rng.uniform(0.2, 1, size=len(t)).astype(np.float32) for t in tokens]


@pytest.mark.parametrize("router_weighted", [False, True])
def test_tokens_count_with_the_square_of_their_gate(router_weighted):
    tokens, gates = routed()
    calibration = np.arange(0, TOKENS, 2)
    found = statistics.weighted_tokens(tokens, gates, calibration, router_weighted=router_weighted, shrinkage=0.0)
    for e in (0, 2):
        (rows, weights), g = found[e], gates[e].astype(np.float64)
        np.testing.assert_array_equal(rows, tokens[e])
        np.testing.assert_allclose(weights, g**2 if router_weighted else np.ones(len(g)), 1e-6)


def test_by_the_papers_recipe_an_expert_without_tokens_gets_none():
    tokens, gates = routed()
    options = dict(router_weighted=False, shrinkage=0.0, sample_starved=False)
    found = statistics.weighted_tokens(tokens, gates, np.arange(TOKENS), **options)
    assert [len(s.rows) for s in found] == [30, 0, 7]


def test_an_expert_without_tokens_gets_the_layer():
    tokens, gates = routed()
    calibration = np.arange(0, TOKENS, 2)
    found = statistics.weighted_tokens(tokens, gates, calibration, router_weighted=True, shrinkage=0.0)
    np.testing.assert_array_equal(found[1].rows, calibration)
    assert (found[1].weights == found[1].weights[0]).all() and found[1].weights[0] > 0


@pytest.mark.parametrize("router_weighted", [False, True])
def test_shrinkage_adds_the_layer_as_so_many_mean_tokens(router_weighted):
    tokens, gates = routed()
    _, inputs, _ = problem(3, False)
    calibration = np.arange(0, TOKENS, 2)  # fewer than the sample may hold
    samples = statistics.weighted_tokens(tokens, gates, calibration, router_weighted=router_weighted, shrinkage=20.0)
    H = statistics.input_hessians(inputs, samples, expert_sharding(3))
    weights = [g.astype(np.float64) ** (2 if router_weighted else 0) for g in gates]
    X = inputs.astype(np.float64)
    layer = X[calibration].T @ X[calibration] / len(calibration)
    for e in range(3):
        own = (X[tokens[e]] * weights[e][:, None]).T @ X[tokens[e]]
        prior = 20 * (weights[e].mean() if len(weights[e]) else 1)
        expected = 2 * (own + prior * layer) / (weights[e].sum() + prior)
        np.testing.assert_allclose(H[e], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router_weighted", [False, True])
def test_tokens_of_the_layer_stand_for_those_that_an_expert_lacks(router_weighted):
    """H = (weight of its own tokens H_own + mean weight of as many as it lacks H_layer) / both."""
    tokens, gates = routed()
    _, inputs, _ = problem(3, False)
    calibration = np.arange(0, TOKENS, 2)
    options = dict(router_weighted=router_weighted, shrinkage=0.0, min_tokens=25)
    samples = statistics.weighted_tokens(tokens, gates, calibration, **options)
    assert [len(s.rows) for s in samples] == [30, 25, 25]
    H = statistics.input_hessians(inputs, samples, expert_sharding(3))
    X = inputs.astype(np.float64)
    for e, lacks in enumerate((0, 25, 18)):
        weights = gates[e].astype(np.float64) ** (2 if router_weighted else 0)
        mean = weights.mean() if len(weights) else 1
        layer = X[calibration[np.linspace(0, len(calibration) - 1, lacks).astype(int)]]
        expected = (X[tokens[e]] * weights[:, None]).T @ X[tokens[e]] + mean * layer.T @ layer
        np.testing.assert_allclose(H[e], 2 * expected / (weights.sum() + mean * lacks), rtol=1e-4, atol=1e-5)


def test_fewer_calibration_tokens_than_are_lacked_weigh_more():
    options = dict(router_weighted=False, shrinkage=0.0, min_tokens=100)
    (sample,) = statistics.weighted_tokens([np.arange(3)], [np.ones(3)], np.arange(10), **options)
    assert len(sample.rows) == 13
    np.testing.assert_allclose([sample.weights[:3].sum(), sample.weights[3:].sum()], [3, 97], rtol=1e-6)


@pytest.mark.parametrize("own", [0, 3, 8])
def test_tokens_of_the_layer_are_better_than_damping_alone(own):
    """On tokens that no Hessian has seen, where an expert's tokens are as correlated as the layer's, about a mean."""
    experts, width, rng = 8, 24, np.random.default_rng(3)
    mixing = rng.normal(size=(width, width)) * (0.8 ** np.arange(width))[:, None]
    of_layer = rng.normal(size=(600, width)) @ mixing
    of_experts = rng.normal(size=(experts, own + 300, width)) @ mixing + rng.normal(size=(experts, 1, width)) @ mixing
    inputs = np.concatenate([of_layer, *of_experts[:, :own]]).astype(np.float32)
    tokens = [600 + np.arange(e * own, (e + 1) * own) for e in range(experts)]
    W = rng.normal(size=(experts, 20, width)).astype(np.float32)

    def error(min_tokens):
        gates = [np.ones(own, np.float32)] * experts
        options = dict(router_weighted=False, shrinkage=0.0, sample_starved=False, min_tokens=min_tokens)
        samples = statistics.weighted_tokens(tokens, gates, np.arange(len(inputs)), **options)
        H = statistics.input_hessians(inputs, samples, expert_sharding(experts)) if own or min_tokens else None
        quantized = round_to_nearest(W, bits=2) if H is None else gptq(W, H, bits=2, damping=0.1)
        lost = np.einsum("eoi,eti->eto", W - np.asarray(quantized.Q), of_experts[:, own:])
        return np.square(lost).sum() / np.square(np.einsum("eoi,eti->eto", W, of_experts[:, own:])).sum()

    assert error(4 * width) < 0.9 * error(0)


def test_shrinkage_takes_a_sample_of_many_tokens():
    tokens, gates = routed()
    calibration = 3 * np.arange(10_000)
    found = statistics.weighted_tokens(tokens, gates, calibration, router_weighted=True, shrinkage=4.0)
    added = [f.rows[len(t) :] for f, t in zip(found, tokens, strict=True)]
    for rows in added:
        np.testing.assert_array_equal(rows, added[0])
        assert len(np.unique(rows)) == statistics.SAMPLE and np.isin(rows, calibration).all()
        assert rows.min() < 1000 and rows.max() > 29_000  # from all over


def test_shrinkage_without_calibration_or_routed_tokens():
    none = [np.zeros(0, int)] * 2
    gates = [np.zeros(0, np.float32)] * 2
    options = dict(router_weighted=True, shrinkage=8.0)
    assert all(len(s.rows) == 0 for s in statistics.weighted_tokens(none, gates, np.zeros(0, int), **options))
    for rows, weights in statistics.weighted_tokens(none, gates, np.arange(10), **options):
        np.testing.assert_array_equal(rows, np.arange(10))
        np.testing.assert_allclose(weights.sum(), 8, rtol=1e-6)
