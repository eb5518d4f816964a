"""Qwen3-MoE (Qwen Team 2025; Hugging Face's modeling_qwen3_moe): each head's queries and keys are normed."""

from __future__ import annotations

import functools

from qmoe_jax.models.decoder.attention import GroupedAttention
from qmoe_jax.models.decoder.model import Decoder, DecoderLayer
from qmoe_jax.models.decoder.routing import Router, softmax_then_choose


class Qwen3MoeLayer(DecoderLayer):
    def attention(self) -> GroupedAttention:
        c = self.config
        return GroupedAttention(
            c.d_model,
            (c.num_heads, c.num_kv_heads),
            c.head_dim,
            c.rope,
            self.dtype,
            biases=c.attention_bias,
            norm="head",
            norm_eps=c.norm_eps,
        )

    def router(self) -> Router:
        c = self.config
        choose = functools.partial(softmax_then_choose, top_k=c.top_k, renormalise=c.norm_topk_prob)
        return Router((c.d_model, c.num_experts), choose)


class Qwen3Moe(Decoder):
    Layer = Qwen3MoeLayer
