"""Mixtral (Jiang et al. 2024; Hugging Face's modeling_mixtral): gates of the chosen experts always sum up to 1."""

from __future__ import annotations

import functools

from qmoe_jax.models.decoder.attention import GroupedAttention
from qmoe_jax.models.decoder.model import Decoder, DecoderLayer
from qmoe_jax.models.decoder.routing import Router, softmax_then_choose


class MixtralLayer(DecoderLayer):
    def attention(self) -> GroupedAttention:
        c = self.config
        return GroupedAttention(c.d_model, (c.num_heads, c.num_kv_heads), c.head_dim, c.rope, self.dtype)

    def router(self) -> Router:
        c = self.config
        choose = functools.partial(softmax_then_choose, top_k=c.top_k, renormalise=True)
        return Router((c.d_model, c.num_experts), choose)


class Mixtral(Decoder):
    Layer = MixtralLayer
