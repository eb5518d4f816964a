"""OLMoE's architecture (Muennighoff et al. 2024), how config.json tells it, and the published size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qmoe_jax.models.decoder.config import GroupedConfig
from qmoe_jax.models.decoder.described import Described, describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoeConfig(GroupedConfig):
    """See `GroupedConfig`.

    Attributes:
      norm_topk_prob: gates are divided by their sum.
      clip_qkv: queries, keys and values are clipped to +- this; None: they aren't.
      attention_bias: on all four projections.
    """

    norm_topk_prob: bool = False
    clip_qkv: float | None = None
    attention_bias: bool = False


def from_described(described: Mapping[str, Any], **overrides: Any) -> OlmoeConfig:
    """The architecture that config.json tells. Raises CheckpointError, see `Described.build`."""
    d = Described(described, "an OLMoE")
    fields = d.common(default_theta=1e4, default_eps=1e-5)
    fields |= d.heads(fields) | {
        "d_ff": d.take("intermediate_size"),
        "num_experts": d.take("num_experts", "num_local_experts"),
        "norm_topk_prob": d.take("norm_topk_prob", default=False),
        "clip_qkv": d.take("clip_qkv", default=None),
        "attention_bias": d.take("attention_bias", default=False),
    }
    return d.build(OlmoeConfig, fields, overrides)


def to_described(config: OlmoeConfig, dtype: str) -> dict[str, Any]:
    """config.json, as transformers reads it; `dtype` such as 'bfloat16'."""
    return describe(config, "olmoe", "OlmoeForCausalLM", dtype) | {
        "intermediate_size": config.d_ff,
        "num_experts": config.num_experts,
        "norm_topk_prob": config.norm_topk_prob,
        "clip_qkv": config.clip_qkv,
        "attention_bias": config.attention_bias,
    }


PRESETS = {
    "olmoe_1b_7b": OlmoeConfig(
        vocab_size=50304,
        d_model=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        d_ff=1024,
        num_experts=64,
        top_k=8,
        eos=(50279,),
    )
}
