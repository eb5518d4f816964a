"""Qwen3-MoE's architecture (Qwen Team 2025), how config.json tells it, and the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from qmoe_jax.models.decoder.config import GroupedConfig, Rope
from qmoe_jax.models.decoder.described import Described, describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(GroupedConfig):
    """See `GroupedConfig`.

    Attributes:
      dense_ff: width of the hidden layer of dense layers' MLPs.
      mlp_only_layers: layers without experts.
      decoder_sparse_step: of the others every so many-th has experts, the last of each run.
      norm_topk_prob: gates are divided by their sum.
      attention_bias: on all four projections.
      sliding_window: how many tokens a query sees, its own among them; None: all before it.
    """

    dense_ff: int
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    norm_topk_prob: bool = True
    attention_bias: bool = False
    sliding_window: int | None = None

    POSITIVE: ClassVar[tuple[str, ...]] = (*GroupedConfig.POSITIVE, "dense_ff", "decoder_sparse_step")

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def window(self, layer: int) -> int | None:
        return self.sliding_window

    @property
    def dense_width(self) -> int:
        return self.dense_ff


def from_described(described: Mapping[str, Any], **overrides: Any) -> Qwen3MoeConfig:
    """The architecture that config.json tells. Raises CheckpointError, see `Described.build`."""
    d = Described(described, "a Qwen3-MoE")
    fields = d.common(default_theta=1e4, default_eps=1e-6)
    d.expect("qkv_bias", False)  # Qwen3-Coder tells these.
    d.expect("use_qk_norm", True)
    d.expect("shared_expert_intermediate_size", 0)
    slides, window = d.take("use_sliding_window", default=False), d.take("sliding_window", default=None)
    fields |= d.heads(fields) | {
        "d_ff": d.take("moe_intermediate_size"),
        "num_experts": d.take("num_experts", "num_local_experts"),
        "dense_ff": d.take("intermediate_size"),
        "mlp_only_layers": tuple(d.take("mlp_only_layers", default=())),
        "decoder_sparse_step": d.take("decoder_sparse_step", default=1),
        "norm_topk_prob": d.take("norm_topk_prob", default=False),
        "attention_bias": d.take("attention_bias", default=False),
        "sliding_window": window if slides else None,
    }
    return d.build(Qwen3MoeConfig, fields, overrides)


def to_described(config: Qwen3MoeConfig, dtype: str) -> dict[str, Any]:
    """config.json, as transformers reads it; `dtype` such as 'bfloat16'."""
    return describe(config, "qwen3_moe", "Qwen3MoeForCausalLM", dtype) | {
        "moe_intermediate_size": config.d_ff,
        "num_experts": config.num_experts,
        "intermediate_size": config.dense_ff,
        "mlp_only_layers": list(config.mlp_only_layers),
        "decoder_sparse_step": config.decoder_sparse_step,
        "norm_topk_prob": config.norm_topk_prob,
        "attention_bias": config.attention_bias,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
    }


def _published(d_model: int, dense_ff: int, d_ff: int, num_heads: int, num_layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=151936,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=4,
        head_dim=128,
        d_ff=d_ff,
        dense_ff=dense_ff,
        num_experts=128,
        top_k=8,
        rope=Rope(1e6),
        norm_eps=1e-6,
        max_length=40960,
        eos=(151645,),
    )


PRESETS = {
    "qwen3_30b_a3b": _published(2048, 6144, 768, 32, 48),
    "qwen3_235b_a22b": _published(4096, 12288, 1536, 64, 94),
}
