"""What experts' errors count by: shares of squared gates, over whole layers."""

import numpy as np
import pytest
import tiny_model
import watch

from qmoe_jax import streaming
from qmoe_jax.checkpoints import open_checkpoint
from qmoe_jax.compression.compress import compress_examples
from qmoe_jax.models.switch import Vocabulary, load_examples
from qmoe_jax.quantization import shares
from qmoe_jax.quantization.methods import RateDistortion
from qmoe_jax.quantization.settings import QuantizationSettings

EXPERTS = 5


@pytest.fixture(scope="module")
def routing():
    rng = np.random.default_rng(0)
    expert = rng.integers(0, EXPERTS + 1, (300, 2)).astype(np.int32)  # EXPERTS: none
    return expert, rng.uniform(0, 1, (300, 2)).astype(np.float32)


def test_sums_of_squared_gates(routing):
    expert, gate = routing
    expected = [np.sum(gate[expert == e].astype(np.float64) ** 2) for e in range(EXPERTS)]
    np.testing.assert_allclose(shares.squared_gates(expert, gate, EXPERTS) * shares.UNIT, expected, rtol=1e-7)


def test_sums_do_not_depend_on_order_or_on_who_adds_up(routing):
    expert, gate = routing
    whole, order = shares.squared_gates(expert, gate, EXPERTS), np.random.default_rng(1).permutation(len(expert))
    parts = [shares.squared_gates(expert[i], gate[i], EXPERTS) for i in np.array_split(order, 7)]
    np.testing.assert_array_equal(np.sum(parts, axis=0), whole)


def test_weights_are_powers_of_shares():
    sums = np.array([4, 16, 1, 11])
    np.testing.assert_array_equal(shares.weights(sums, 0.0), np.ones(4))
    np.testing.assert_allclose(shares.weights(sums, 1.0), sums / 8)
    np.testing.assert_allclose(shares.weights(1000 * sums, 0.5), np.sqrt(sums / 8), rtol=1e-6)
    np.testing.assert_array_equal(shares.weights(np.zeros(4, int), 0.5), np.ones(4))  # no calibration tokens at all
    unused = shares.weights(np.array([0, 8]), 1.0)
    assert 0 < unused[0] < 0.01 and unused[1] == 2


def test_a_few_weights_stand_for_all():
    weights = np.random.default_rng(2).lognormal(size=24).astype(np.float32)
    np.testing.assert_array_equal(shares.of_strata(weights, 24), weights)
    few = shares.of_strata(weights, 4)
    np.testing.assert_array_equal(np.argsort(few), np.argsort(weights[:4]))
    np.testing.assert_allclose(np.log(few).mean(), np.log(weights).mean(), rtol=1e-5)
    assert weights.min() < few.min() and few.max() < weights.max()


@pytest.mark.parametrize("experts_per_group", [3, 8])
def test_a_compression_weighs_experts_by_the_whole_layer(experts_per_group, tiny, monkeypatch):
    source, vocabulary = open_checkpoint(tiny.checkpoint), Vocabulary.load(tiny.vocabulary)
    documents = load_examples(tiny.calibration, vocabulary, 20)
    calibration, validation = ([*documents.pairs[part]] for part in (slice(14), slice(14, None)))
    memory = streaming.Settings(tokens_per_batch=512, experts_per_group=experts_per_group, round_weights=True)

    first, gates = source.config.sparse_layers[0], {}
    tokens = sum(len(encoder) for encoder, _ in calibration)

    def look(group):
        if group.layer == first:
            for e, t, g in zip(range(group.start, group.stop), group.tokens, group.gates, strict=True):
                gates[e] = np.sum(g[t < tokens].astype(np.float64) ** 2)
        return group.kernels

    watch.watched(source, [*calibration, *validation], memory, look)
    share = np.array([gates[e] for e in range(source.config.num_experts)])
    expected = np.sqrt(np.clip(share / share.mean(), 1e-3, 1e3))

    def importance(power):
        seen = []
        at = RateDistortion.at
        monkeypatch.setattr(
            RateDistortion, "at", lambda s, W, H, i, *r: seen.append(np.asarray(i)) or at(s, W, H, i, *r)
        )
        settings = QuantizationSettings("rd", lagrangian=1e-4, share_power=power)
        compress_examples(source, vocabulary, calibration, validation, settings, memory)
        monkeypatch.undo()
        return np.concatenate(seen[: 2 * -(-tiny_model.CONFIG.num_experts // experts_per_group) : 2])

    np.testing.assert_allclose(importance(0.5)[:, 0] / importance(0.0)[:, 0], expected, rtol=1e-4)


def test_settings():
    for wrong in (-0.1, 3.0, float("nan")):
        with pytest.raises(ValueError, match="share_power: found .*expected 0 to 2"):
            QuantizationSettings("rd", share_power=wrong)
    with pytest.raises(ValueError, match="share_power.*only method 'rd'"):
        QuantizationSettings("gptq", share_power=1.0)
