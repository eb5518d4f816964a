"""What an expert's outputs lose, against float64; the pipeline's use of it is in test_pipeline.py."""

import jax
import numpy as np
import pytest

from qmoe_jax.models.switch.config import PLAIN
from qmoe_jax.quantization.output_error import TOKENS_PER_EXPERT, OutputError, output_error
from qmoe_jax.quantization.sharding import expert_sharding


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_kernels(rng, experts=2, d_model=6, d_ff=10):
    shapes = {"wi": (experts, d_model, d_ff), "wo": (experts, d_ff, d_model)}
    return {m: rng.standard_normal(shape).astype(np.float32) for m, shape in shapes.items()}


def measure(kernels, quantized, inputs, tokens, gates):
    quantized = jax.tree.map(np.float32, quantized)
    return output_error(PLAIN, kernels, quantized, inputs, tokens, gates, expert_sharding(len(tokens)))


def test_exact_experts_lose_nothing_and_silent_ones_everything(rng):
    kernels, inputs = random_kernels(rng), rng.standard_normal((9, 6)).astype(np.float32)
    tokens, gates = [np.arange(5), np.arange(5, 9)], [np.full(5, 0.5), np.full(4, 0.9)]
    assert measure(kernels, kernels, inputs, tokens, gates).relative() == [0, 0]
    silent = kernels | {"wo": np.zeros_like(kernels["wo"])}
    assert measure(kernels, silent, inputs, tokens, gates).relative() == [1, 1]


def test_many_tokens_are_sampled_and_scaled_up(rng):
    kernels, changed = random_kernels(rng), random_kernels(rng)
    inputs = rng.standard_normal((2_000, 6)).astype(np.float32)
    tokens, gates = [np.arange(0, 1_990), np.arange(1_990, 2_000)], [rng.uniform(0.2, 1, n) for n in (1_990, 10)]
    found = measure(kernels, changed, inputs, tokens, gates)
    for e in range(2):
        x, gate = inputs[tokens[e]].astype(np.float64), gates[e][:, None]
        y, other = (np.maximum(x @ k["wi"][e], 0) @ k["wo"][e] for k in (kernels, changed))
        expected = [np.sum((gate * v) ** 2) for v in (y - other, y)]
        assert len(tokens[e]) < TOKENS_PER_EXPERT or len(tokens[e]) > 10 * TOKENS_PER_EXPERT
        rel = 1e-5 if len(tokens[e]) < TOKENS_PER_EXPERT else 0.3  # Sums of so many terms from a sample of 128.
        np.testing.assert_allclose([found.error[e], found.signal[e]], expected, rtol=rel)


def test_experts_without_tokens_or_output_have_no_error():
    found = OutputError(np.array([0.0, 2.0]), np.array([0.0, 8.0]))
    assert found.relative() == [None, 0.25] and found.total() == 0.25
    assert OutputError(np.zeros(2), np.zeros(2)).total() is None
