"""The dense parts of a decoder layer: linear maps, RMSNorm, gated MLP. Kernels are [in, out]."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from qmoe_jax.models.common import fan_in_normal, stored
from qmoe_jax.models.decoder.config import MATRICES, silu_gate


class Linear(nn.Module):
    """x kernel, and a bias if there is one."""

    width: tuple[int, int]  # in, out
    dtype: jnp.dtype
    biased: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", fan_in_normal(self.width[0]), self.width, jnp.float32)
        y = jnp.matmul(x, kernel.astype(self.dtype), precision="highest")
        if self.biased:
            y = y + self.param("bias", nn.initializers.zeros, self.width[1:], jnp.float32).astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang and Sennrich 2019), in float32."""

    width: int
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (self.width,), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


class GatedMlp(nn.Module):
    """down(silu(gate x) * up x): the MLP of a dense layer, or of an expert that every token goes through."""

    d_model: int
    d_ff: int
    dtype: jnp.dtype

    def setup(self):
        self.gate_proj = Linear((self.d_model, self.d_ff), self.dtype)
        self.up_proj = Linear((self.d_model, self.d_ff), self.dtype)
        self.down_proj = Linear((self.d_ff, self.d_model), self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(silu_gate([self.gate_proj(x), self.up_proj(x)]))


class ExpertMatrix(nn.Module):
    """One matrix of all experts [experts, in, out], as it is stored, and its bias [experts, out] or None."""

    shape: tuple[int, int, int]
    biased: bool

    @nn.compact
    def __call__(self):
        bias = None
        if self.biased:
            bias = self.param("bias", nn.initializers.zeros, (self.shape[0], self.shape[2]), jnp.float32)
        return stored(self, "kernel", self.shape, self.shape[1]), bias


class ExpertKernels(nn.Module):
    """The matrices of all experts of a layer."""

    experts: int
    d_model: int
    d_ff: int
    biases: bool = False

    def setup(self):
        up, down = (self.experts, self.d_model, self.d_ff), (self.experts, self.d_ff, self.d_model)
        self.gate_proj = ExpertMatrix(up, self.biases)
        self.up_proj = ExpertMatrix(up, self.biases)
        self.down_proj = ExpertMatrix(down, self.biases)

    def kernels(self) -> dict:
        """By name; the biases of matrix m are called m_bias."""
        found = {m: getattr(self, m)() for m in MATRICES}
        kernels = {m: kernel for m, (kernel, _) in found.items()}
        return kernels | {f"{m}_bias": bias for m, (_, bias) in found.items() if bias is not None}
