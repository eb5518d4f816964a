"""Norm, relative positions, attention and MLP, each by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_switch import bucket, softmax
from numpy_switch import mlp as numpy_mlp
from random_models import SWITCH

from qmoe_jax.models.switch.layers import MASKED, Attention, DenseMlp, RelativePositionBias, RMSNorm, mask_bias


def test_norm_divides_by_the_root_mean_square_and_scales():
    x = np.array([[3.0, 4.0, 0.0, 0.0], [1e-4, -1e-4, 1e-4, -1e-4]], np.float32)
    scale = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    y = RMSNorm(4, jnp.float32).apply({"params": {"scale": scale}}, x)
    # The second row is so small that the epsilon counts: 1e-4 / sqrt(1e-8 + 1e-6).
    small = 1e-4 / np.sqrt(1.01e-6)
    np.testing.assert_allclose(y, [[1.2, 3.2, 0, 0], [small, -2 * small, 3 * small, -4 * small]], rtol=1e-5)


def test_norm_takes_statistics_in_float32():
    # In bfloat16 a sum of 1024 ones stops growing at 256, and 1e20 squared overflows in neither.
    x = jnp.full((1, 1024), 3.0, jnp.bfloat16)
    y = RMSNorm(1024, jnp.bfloat16).apply({"params": {"scale": np.ones(1024, np.float32)}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1.0)


@pytest.mark.parametrize("bidirectional", [True, False], ids=["encoder", "decoder"])
def test_position_bias_at_every_distance_up_to_600(bidirectional):
    table = np.arange(2 * 32, dtype=np.float32).reshape(2, 32)  # Each entry tells its head and bucket.
    positions = jnp.arange(601)
    layer = RelativePositionBias(SWITCH, bidirectional, jnp.float32)
    variables = {"params": {"rel_embedding": table}}
    for query in (0, 300, 600):
        bias = np.asarray(layer.apply(variables, jnp.array([query]), positions))  # [heads, 1, keys]
        seen = positions if bidirectional else positions[: query + 1]
        expected = np.array([bucket(query, int(key), bidirectional) for key in seen])
        np.testing.assert_array_equal(bias[0, 0, : len(seen)], expected)
        np.testing.assert_array_equal(bias[1, 0, : len(seen)], 32 + expected)


def attention(bias, x=None, memory=None):
    """Attention of SWITCH's shape with random kernels; its kernels by name, and its output."""
    rng = np.random.default_rng(0)
    joined = SWITCH.num_heads * SWITCH.head_dim
    shapes = {n: (SWITCH.d_model, joined) for n in ("query", "key", "value")} | {"out": (joined, SWITCH.d_model)}
    kernels = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    return kernels, Attention(SWITCH, jnp.float32).apply({"params": params}, x, memory, bias)


def test_attention_has_no_scale_factor_and_its_heads_are_consecutive_columns():
    rng = np.random.default_rng(1)
    x, memory = rng.normal(size=(1, 3, 12)).astype(np.float32), rng.normal(size=(1, 4, 12)).astype(np.float32)
    bias = rng.normal(size=(1, 2, 3, 4)).astype(np.float32)
    k, y = attention(bias, x, memory)
    heads = []
    for h, columns in enumerate((slice(0, 5), slice(5, 10))):
        query, key, value = x[0] @ k["query"][:, columns], memory[0] @ k["key"][:, columns], memory[0] @ k["value"]
        heads.append(softmax(query @ key.T + bias[0, h]) @ value[:, columns])
    np.testing.assert_allclose(y[0], np.concatenate(heads, -1) @ k["out"], rtol=1e-4, atol=1e-4)


def test_a_query_that_sees_nothing_attends_uniformly():
    rng = np.random.default_rng(2)
    x, memory = rng.normal(size=(1, 2, 12)).astype(np.float32), rng.normal(size=(1, 4, 12)).astype(np.float32)
    mask = np.array([[[False] * 4, [True, False, False, False]]])
    k, y = attention(mask_bias(mask, jnp.float32), x, memory)
    value = memory[0] @ k["value"]
    np.testing.assert_allclose(y[0], np.stack([value.mean(0), value[0]]) @ k["out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mask_is_finite_in_both_dtypes(dtype):
    bias = mask_bias(jnp.array([[[True, False]]]), dtype)
    assert bias.shape == (1, 1, 1, 2) and bias.dtype == dtype
    assert bias[0, 0, 0, 0] == 0 and np.isfinite(np.float32(bias[0, 0, 0, 1])) and bias[0, 0, 0, 1] < 0.99 * MASKED


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated gelu"])
def test_dense_mlp(gated):
    config = dataclasses.replace(SWITCH, gated=gated)
    rng = np.random.default_rng(3)
    shapes = {n: (12, 20) for n in config.expert_matrices[:-1]} | {"wo": (20, 12)}
    params = {n: {"kernel": rng.normal(size=shape)} for n, shape in shapes.items()}
    x = rng.normal(size=(2, 3, 12))
    y = DenseMlp(config).apply({"params": jax.tree.map(np.float32, params)}, np.float32(x))
    np.testing.assert_allclose(y, numpy_mlp(x, params), rtol=1e-4, atol=1e-4)
