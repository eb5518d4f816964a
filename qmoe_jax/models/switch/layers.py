"""The dense parts of a T5X Switch Transformer: norm, attention, relative positions, dense MLP.

Submodules carry T5X's names, so that a native checkpoint's parameter tree is this model's parameter tree.
Masks are 0/1 or boolean with 1 = real token; kernels are [in, out].
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qmoe_jax.models.common import MASKED, Kernel, fan_in_normal, mixed
from qmoe_jax.models.switch.config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale over the last axis; statistics in float32."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (self.width,), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return x.astype(self.dtype) * scale.astype(self.dtype)


@functools.cache
def bucket_table(num_buckets: int, max_distance: int = 128) -> np.ndarray:
    """Bucket of each distance 0 .. max_distance, int32 [max_distance + 1] (Raffel et al. 2020, section 2.1).

    The first half of the buckets are single distances, the others grow logarithmically up to `max_distance`.
    """
    exact = num_buckets // 2
    n = np.arange(max_distance + 1)
    # The epsilon keeps exact powers in the bucket that they open.
    log_ratio = np.log(np.maximum(n, 1) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    large = np.minimum(exact + (log_ratio * (num_buckets - exact)).astype(np.int32), num_buckets - 1)
    return np.where(n < exact, n, large).astype(np.int32)


class RelativePositionBias(nn.Module):
    """Additive attention bias by the bucketed distance of query and key: [heads, queries, keys]."""

    config: ModelConfig
    bidirectional: bool
    dtype: jnp.dtype
    num_buckets: int = 32

    @nn.compact
    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        embedding = self.param(
            "rel_embedding",
            fan_in_normal(self.config.d_model),
            (self.config.num_heads, self.num_buckets),
            jnp.float32,
        )
        distance = query_positions[:, None] - key_positions[None, :]  # [queries, keys]
        if self.bidirectional:
            half = self.num_buckets // 2
            table = jnp.asarray(bucket_table(half))
            bucket = table[jnp.clip(jnp.abs(distance), 0, 128)] + jnp.where(distance < 0, half, 0)
        else:
            table = jnp.asarray(bucket_table(self.num_buckets))
            bucket = table[jnp.clip(distance, 0, 128)]  # The future is masked anyway.
        return embedding.astype(self.dtype)[:, bucket]


class Attention(nn.Module):
    """Multi-head attention without biases and without a 1/sqrt(head_dim) factor (T5 folds it into the query's init)."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self):
        d, joined = self.config.d_model, self.config.num_heads * self.config.head_dim
        self.query = Kernel((d, joined), d * self.config.head_dim)
        self.key = Kernel((d, joined), d)
        self.value = Kernel((d, joined), d)
        self.out = Kernel((joined, d), joined)

    def _heads(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = jnp.matmul(x, kernel.astype(self.dtype), precision="highest")
        return y.reshape(*y.shape[:-1], self.config.num_heads, self.config.head_dim)  # [batch, length, heads, dim]

    def keys_and_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x [batch, length, d_model], both [batch, length, heads, head_dim]."""
        return self._heads(x, self.key()), self._heads(x, self.value())

    def attend(self, x: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array) -> jax.Array:
        """Attention of x [batch, queries, d_model] with an additive bias [batch or 1, heads or 1, queries, keys]."""
        query = self._heads(x, self.query())
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, keys, precision="highest") + bias
        y = mixed(logits, values.swapaxes(1, 2)).swapaxes(1, 2)  # [batch, queries, heads, head_dim]
        return jnp.matmul(y.reshape(*y.shape[:-2], -1), self.out().astype(self.dtype), precision="highest")

    def __call__(self, x: jax.Array, inputs: jax.Array, bias: jax.Array) -> jax.Array:
        return self.attend(x, *self.keys_and_values(inputs), bias)


def mask_bias(mask: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Additive bias of a boolean attention mask [batch, queries, keys]: [batch, 1, queries, keys]."""
    return jnp.where(mask, 0.0, MASKED).astype(dtype)[:, None]


class MlpKernels(nn.Module):
    """Kernels wi (or wi_0 and wi_1) and wo of one MLP, or of all experts with a leading expert axis."""

    config: ModelConfig
    experts: tuple[int, ...] = ()

    def setup(self):
        d, f = self.config.d_model, self.config.d_ff
        if self.config.gated:
            self.wi_0 = Kernel((*self.experts, d, f), d)
            self.wi_1 = Kernel((*self.experts, d, f), d)
        else:
            self.wi = Kernel((*self.experts, d, f), d)
        self.wo = Kernel((*self.experts, f, d), f)

    def kernels(self) -> dict[str, Any]:
        """By name."""
        return {name: getattr(self, name)() for name in self.config.expert.matrices}


class DenseMlp(MlpKernels):
    """The MLP of a dense layer."""

    dtype: jnp.dtype = jnp.float32

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.config.expert(
            x, self.kernels(), lambda x, kernel, bias: jnp.matmul(x, kernel.astype(self.dtype), precision="highest")
        )
