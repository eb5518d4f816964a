"""Attention of decoders: what tokens leave for those after them (a memory), and how these look at it.

An attention module has two methods, so that a full pass and one with a cache are the same code:

    memory(h, positions)              arrays [batch, length, ...] of each token, which later tokens see
    __call__(h, positions, memory, visible)   what tokens h take from a memory of the same or of more tokens
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from qmoe_jax.models.common import mixed
from qmoe_jax.models.decoder.cache import Memory
from qmoe_jax.models.decoder.config import Rope
from qmoe_jax.models.decoder.layers import Linear, RMSNorm
from qmoe_jax.models.decoder.rotary import rotate


def visible(queries: jax.Array, keys: jax.Array, window: int | None) -> jax.Array:
    """Which keys a query sees: bool [batch or 1, queries, keys].

    Args:
      queries: positions, int32 [batch or 1, queries].
      keys: positions, int32 [batch or 1, keys]; -1: there is no token.
      window: a query sees so many tokens, its own the last of them; None: all up to its own.
    """
    query, key = queries[:, :, None], keys[:, None, :]
    seen = (key >= 0) & (key <= query)
    return seen if window is None else seen & (key > query - window)


class GroupedAttention(nn.Module):
    """Heads of queries in groups that share keys and values, with rotary positions (Ainslie et al. 2023).

    Attributes:
      d_model: width of the residual stream.
      heads: of queries, and of keys and values.
      head_dim: width of one.
      rope: positions.
      dtype: of activations.
      biases: on all four projections.
      norm: 'whole': queries and keys are normed before they are split into heads; 'head': after; None: they aren't.
      norm_eps: of these norms.
      clip: queries, keys and values are clipped to +-clip before they are split; None: they aren't.
      has_sinks: each head has one more logit, dropped after the softmax (Xiao et al. 2023; gpt-oss).
    """

    d_model: int
    heads: tuple[int, int]
    head_dim: int
    rope: Rope
    dtype: jnp.dtype
    biases: bool = False
    norm: str | None = None
    norm_eps: float = 1e-6
    clip: float | None = None
    has_sinks: bool = False

    def setup(self):
        queries, keys = (n * self.head_dim for n in self.heads)
        self.q_proj = Linear((self.d_model, queries), self.dtype, self.biases)
        self.k_proj = Linear((self.d_model, keys), self.dtype, self.biases)
        self.v_proj = Linear((self.d_model, keys), self.dtype, self.biases)
        self.o_proj = Linear((queries, self.d_model), self.dtype, self.biases)
        if self.norm is not None:
            widths = (queries, keys) if self.norm == "whole" else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (RMSNorm(width, self.norm_eps, self.dtype) for width in widths)
        if self.has_sinks:
            self.sinks = self.param("sinks", nn.initializers.zeros, self.heads[:1], jnp.float32)

    def _heads(self, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        """x [batch, length, heads * head_dim] -> [batch, length, heads, head_dim], normed and clipped."""
        if norm is not None and self.norm == "whole":
            x = norm(x)
        if self.clip is not None:
            x = jnp.clip(x, -self.clip, self.clip)
        x = x.reshape(*x.shape[:-1], -1, self.head_dim)
        return norm(x) if norm is not None and self.norm == "head" else x

    def memory(self, h: jax.Array, positions: jax.Array) -> Memory:
        """Keys, turned, and values: [batch, length, kv heads, head_dim] each."""
        keys = self._heads(self.k_proj(h), None if self.norm is None else self.k_norm)
        return rotate(keys, positions, self.rope), self._heads(self.v_proj(h), None)

    def __call__(self, h: jax.Array, positions: jax.Array, memory: Memory, seen: jax.Array) -> jax.Array:
        keys, values = memory
        query = self._heads(self.q_proj(h), None if self.norm is None else self.q_norm)
        query = rotate(query, positions, self.rope)
        query = query.reshape(*query.shape[:2], keys.shape[2], -1, self.head_dim)  # [batch, q, groups, per group, dim]
        logits = jnp.einsum("bqgrd,bkgd->bgrqk", query, keys, precision="highest", preferred_element_type=jnp.float32)
        logits = jnp.where(seen[:, None, None], logits * self.head_dim**-0.5, -jnp.inf)
        sinks = self.sinks.astype(jnp.float32).reshape(*logits.shape[1:3], 1, 1) if self.has_sinks else None
        y = mixed(logits, values.swapaxes(1, 2)[:, :, None], sinks)  # [batch, groups, per group, q, dim]
        return self.o_proj(jnp.moveaxis(y, 3, 1).reshape(*h.shape[:2], -1))
