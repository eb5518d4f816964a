"""gpt-oss (OpenAI 2025; Hugging Face's modeling_gpt_oss): biases everywhere, attention sinks, windows in turns."""

from __future__ import annotations

import functools

from qmoe_jax.models.decoder.attention import GroupedAttention
from qmoe_jax.models.decoder.model import Decoder, DecoderLayer
from qmoe_jax.models.decoder.routing import Router, choose_then_softmax


class GptOssLayer(DecoderLayer):
    def attention(self) -> GroupedAttention:
        c = self.config
        return GroupedAttention(
            c.d_model,
            (c.num_heads, c.num_kv_heads),
            c.head_dim,
            c.rope,
            self.dtype,
            biases=c.attention_bias,
            has_sinks=True,
        )

    def router(self) -> Router:
        c = self.config
        choose = functools.partial(choose_then_softmax, top_k=c.top_k)
        return Router((c.d_model, c.num_experts), choose, biased=True)


class GptOss(Decoder):
    Layer = GptOssLayer
