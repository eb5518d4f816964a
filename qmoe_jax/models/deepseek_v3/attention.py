"""Multi-head latent attention (DeepSeek-AI 2024, section 2.1.1; Hugging Face's modeling_deepseek_v3).

A token leaves one latent, from which every head makes its keys and values, and one key with its position, which all
heads share: that is all there is to be cached.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from qmoe_jax.models.common import Kernel, mixed
from qmoe_jax.models.decoder.cache import Memory
from qmoe_jax.models.decoder.layers import Linear, RMSNorm
from qmoe_jax.models.decoder.rotary import rotate
from qmoe_jax.models.deepseek_v3.config import DeepseekV3Config

LATENT_EPS = 1e-6  # of the latents' norms, whatever the others have

einsum = functools.partial(jnp.einsum, precision="highest")


class LatentAttention(nn.Module):
    """See `decoder.attention` for its two methods."""

    config: DeepseekV3Config
    dtype: jnp.dtype

    def setup(self):
        c, bias = self.config, self.config.attention_bias
        queries = c.num_heads * c.query_dim
        if c.q_lora_rank is None:
            self.q_proj = Linear((c.d_model, queries), self.dtype)
        else:
            self.q_a_proj = Linear((c.d_model, c.q_lora_rank), self.dtype, bias)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_EPS, self.dtype)
            self.q_b_proj = Linear((c.q_lora_rank, queries), self.dtype)
        self.kv_a_proj_with_mqa = Linear((c.d_model, c.kv_lora_rank + c.qk_rope_head_dim), self.dtype, bias)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_EPS, self.dtype)
        self.kv_b_proj = Kernel((c.kv_lora_rank, c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)), c.kv_lora_rank)
        self.o_proj = Linear((c.num_heads * c.v_head_dim, c.d_model), self.dtype, bias)

    def _rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return rotate(x, positions, self.config.rope, neighbours=self.config.rope_interleave)

    def memory(self, h: jax.Array, positions: jax.Array) -> Memory:
        """The normed latent [batch, length, kv_lora_rank], and the shared key, turned [batch, length, rope dim]."""
        latent, key = jnp.split(self.kv_a_proj_with_mqa(h), [self.config.kv_lora_rank], axis=-1)
        return self.kv_a_layernorm(latent), self._rotate(key[:, :, None], positions)[:, :, 0]

    def _queries(self, h: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[batch, length, heads, dim]: without positions, and turned by theirs."""
        c = self.config
        query = self.q_proj(h) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h)))
        query = query.reshape(*h.shape[:2], c.num_heads, c.query_dim)
        query, turning = jnp.split(query, [c.qk_nope_head_dim], axis=-1)
        return query, self._rotate(turning, positions)

    def __call__(self, h: jax.Array, positions: jax.Array, memory: Memory, seen: jax.Array) -> jax.Array:
        c, (latent, shared_key) = self.config, memory
        query, turning = self._queries(h, positions)
        up = self.kv_b_proj().astype(self.dtype).reshape(c.kv_lora_rank, c.num_heads, -1)
        to_key, to_value = jnp.split(up, [c.qk_nope_head_dim], axis=-1)  # [latent, heads, dim] each
        logits = einsum("bqhd,bkd->bhqk", turning, shared_key, preferred_element_type=jnp.float32)
        # (q' K) c = q' (K c): a single query is cheaper in the latents' space, many are in that of their heads.
        single = h.shape[1] == 1
        if single:
            in_latents = einsum("bqhd,rhd->bqhr", query, to_key)
            logits += einsum("bqhr,bkr->bhqk", in_latents, latent, preferred_element_type=jnp.float32)
        else:
            keys = einsum("bkr,rhd->bkhd", latent, to_key)
            logits += einsum("bqhd,bkhd->bhqk", query, keys, preferred_element_type=jnp.float32)
        logits = jnp.where(seen[:, None], logits * c.softmax_scale, -jnp.inf)
        if single:
            y = einsum("bhqr,rhd->bqhd", mixed(logits, latent[:, None]), to_value)
        else:
            y = mixed(logits, einsum("bkr,rhd->bhkd", latent, to_value)).swapaxes(1, 2)
        return self.o_proj(y.reshape(*h.shape[:2], -1))
