"""OLMoE (Muennighoff et al. 2024; Hugging Face's modeling_olmoe): queries and keys are normed whole."""

from __future__ import annotations

import functools

from qmoe_jax.models.decoder.attention import GroupedAttention
from qmoe_jax.models.decoder.model import Decoder, DecoderLayer
from qmoe_jax.models.decoder.routing import Router, softmax_then_choose


class OlmoeLayer(DecoderLayer):
    def attention(self) -> GroupedAttention:
        c = self.config
        return GroupedAttention(
            c.d_model,
            (c.num_heads, c.num_kv_heads),
            c.head_dim,
            c.rope,
            self.dtype,
            biases=c.attention_bias,
            norm="whole",
            norm_eps=c.norm_eps,
            clip=c.clip_qkv,
        )

    def router(self) -> Router:
        c = self.config
        choose = functools.partial(softmax_then_choose, top_k=c.top_k, renormalise=c.norm_topk_prob)
        return Router((c.d_model, c.num_experts), choose)


class Olmoe(Decoder):
    Layer = OlmoeLayer
