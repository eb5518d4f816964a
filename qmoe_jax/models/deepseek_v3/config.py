"""The architecture of DeepSeek-V3 (DeepSeek-AI 2024) and Kimi-K2, how config.json tells it, and the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from qmoe_jax.models.decoder.config import DecoderConfig, Rope
from qmoe_jax.models.decoder.described import Described, describe
from qmoe_jax.models.decoder.rotary import mscale


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(DecoderConfig):
    """See `DecoderConfig`.

    Attributes:
      dense_ff: width of the hidden layer of dense layers' MLPs.
      first_k_dense: so many layers come before the first with experts.
      n_shared_experts: experts that every token goes through, as one of so many times the width; 0: none.
      q_lora_rank: width of the queries' latent; None: queries come from the residual stream.
      kv_lora_rank: width of the latent that keys and values come from.
      qk_nope_head_dim: width of a head's queries and keys without positions.
      qk_rope_head_dim: width of the part with positions; all heads share the keys'.
      v_head_dim: width of a head's values.
      rope_interleave: that part turns in neighbouring pairs, not in halves.
      attention_bias: on the projections from and to the residual stream.
      n_group: groups of experts.
      topk_group: groups that a token's choices may come from.
      norm_topk_prob: gates are divided by their sum.
      routed_scaling_factor: gates are multiplied by it, last.
      num_nextn_predict_layers: multi-token heads after the last layer, which are left out; nothing depends on it.
      model_type: 'deepseek_v3' or 'kimi_k2', what config.json calls it; nothing depends on it.
    """

    dense_ff: int
    first_k_dense: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    rope_interleave: bool = True
    attention_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    model_type: str = "deepseek_v3"

    BESIDE: ClassVar[tuple[str, ...]] = (*DecoderConfig.BESIDE, "num_nextn_predict_layers", "model_type")
    POSITIVE: ClassVar[tuple[str, ...]] = (
        *DecoderConfig.POSITIVE,
        "dense_ff",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_group",
        "topk_group",
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if found:
            return found
        if self.qk_rope_head_dim % 2:
            found.append(f"qk_rope_head_dim: found {self.qk_rope_head_dim}, expected an even number")
        each, rest = divmod(self.num_experts, self.n_group)
        if rest or self.topk_group > self.n_group or (self.topk_group < self.n_group and each < 2):
            found.append(
                f"n_group {self.n_group}, topk_group {self.topk_group}: expected groups of at least 2 of the "
                f"{self.num_experts} experts, alike, and no more kept than there are"
            )
        elif self.top_k > self.topk_group * each:
            found.append(f"top_k: found {self.top_k}, but topk_group groups have {self.topk_group * each} experts")
        return found

    @property
    def query_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """By which attention's logits are multiplied; longer texts sharpen it (YaRN)."""
        scale = self.query_dim**-0.5
        if self.rope.kind != "yarn" or not self.rope.mscale_all_dim:
            return scale
        return scale * mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2

    def is_sparse(self, layer: int) -> bool:
        return layer >= self.first_k_dense

    @property
    def dense_width(self) -> int:
        return self.dense_ff

    @property
    def shared_width(self) -> int:
        return self.d_ff * self.n_shared_experts


def from_described(described: Mapping[str, Any], **overrides: Any) -> DeepseekV3Config:
    """The architecture that config.json tells. Raises CheckpointError, see `Described.build`."""
    d = Described(described, "a DeepSeek-V3")
    fields = d.common(default_theta=1e4, default_eps=1e-6)
    d.expect("scoring_func", "sigmoid")
    d.expect("topk_method", "noaux_tc")
    d.expect("moe_layer_freq", 1)
    rope_dim, nope_dim = d.take("qk_rope_head_dim"), d.take("qk_nope_head_dim")
    d.expect("head_dim", rope_dim, rope_dim + nope_dim)  # transformers 5 writes both, which follow from the two.
    d.expect("qk_head_dim", rope_dim + nope_dim)
    d.expect("num_key_value_heads", fields["num_heads"])
    fields |= {
        "d_ff": d.take("moe_intermediate_size"),
        "num_experts": d.take("n_routed_experts", "num_local_experts"),
        "dense_ff": d.take("intermediate_size"),
        "first_k_dense": d.take("first_k_dense_replace", default=0),
        "n_shared_experts": d.take("n_shared_experts", default=0),
        "q_lora_rank": d.take("q_lora_rank", default=None),
        "kv_lora_rank": d.take("kv_lora_rank"),
        "qk_nope_head_dim": nope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": d.take("v_head_dim"),
        "rope_interleave": d.take("rope_interleave", default=True),
        "attention_bias": d.take("attention_bias", default=False),
        "n_group": d.take("n_group", default=1),
        "topk_group": d.take("topk_group", default=1),
        "norm_topk_prob": d.take("norm_topk_prob", default=True),
        "routed_scaling_factor": d.take("routed_scaling_factor", default=1.0),
        "num_nextn_predict_layers": d.take("num_nextn_predict_layers", "num_mtp_layers", default=0),
        "model_type": described.get("model_type", "deepseek_v3"),
    }
    return d.build(DeepseekV3Config, fields, overrides)


def to_described(config: DeepseekV3Config, dtype: str) -> dict[str, Any]:
    """config.json, as transformers reads it; `dtype` such as 'bfloat16'. The multi-token heads aren't in it."""
    return describe(config, "deepseek_v3", "DeepseekV3ForCausalLM", dtype) | {
        "num_key_value_heads": config.num_heads,
        "moe_intermediate_size": config.d_ff,
        "n_routed_experts": config.num_experts,
        "intermediate_size": config.dense_ff,
        "first_k_dense_replace": config.first_k_dense,
        "n_shared_experts": config.n_shared_experts,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "rope_interleave": config.rope_interleave,
        "attention_bias": config.attention_bias,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.routed_scaling_factor,
        "num_nextn_predict_layers": 0,
    }


_LATENT: dict[str, Any] = dict(
    q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)
_SIZES: dict[str, Any] = dict(d_model=7168, num_layers=61, d_ff=2048, dense_ff=18432, top_k=8, norm_eps=1e-6)

PRESETS = {
    "deepseek_v3": DeepseekV3Config(
        **_LATENT,
        **_SIZES,
        vocab_size=129280,
        num_heads=128,
        num_experts=256,
        first_k_dense=3,
        rope=Rope(1e4, "yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        max_length=163_840,
        bos=0,
        eos=(1,),
    ),
    "kimi_k2": DeepseekV3Config(
        **_LATENT,
        **_SIZES,
        vocab_size=163840,
        num_heads=64,
        num_experts=384,
        first_k_dense=1,
        rope=Rope(5e4, "yarn", 32.0, 4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0),
        routed_scaling_factor=2.827,
        model_type="kimi_k2",
        max_length=131_072,
        bos=163584,
        eos=(163585,),
    ),
}
