"""DeepSeek-V3 (DeepSeek-AI 2024; Hugging Face's modeling_deepseek_v3) and Kimi-K2, without multi-token heads."""

from __future__ import annotations

import functools

from qmoe_jax.models.decoder.model import Decoder, DecoderLayer
from qmoe_jax.models.decoder.routing import Router, sigmoid_in_groups
from qmoe_jax.models.deepseek_v3.attention import LatentAttention


class DeepseekV3Layer(DecoderLayer):
    def attention(self) -> LatentAttention:
        return LatentAttention(self.config, self.dtype)

    def router(self) -> Router:
        c = self.config
        choose = functools.partial(
            sigmoid_in_groups,
            top_k=c.top_k,
            groups=c.n_group,
            kept=c.topk_group,
            renormalise=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
        )
        return Router((c.d_model, c.num_experts), choose, corrected=True)


class DeepseekV3(Decoder):
    Layer = DeepseekV3Layer
