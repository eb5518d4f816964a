"""gpt-oss' architecture (OpenAI 2025), how config.json tells it, and the published sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qmoe_jax.models.decoder.config import MATRICES, GroupedConfig, Rope
from qmoe_jax.models.decoder.described import Described, describe
from qmoe_jax.models.family import Expert

SLIDING, FULL = "sliding_attention", "full_attention"


def clamped_gate(alpha: float, limit: float, hidden: Sequence[jax.Array]) -> jax.Array:
    """(up + 1) * gate * sigmoid(alpha gate), gate clipped to limit from above, up to +-limit."""
    gate, up = hidden
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


@functools.cache
def _expert(alpha: float, limit: float) -> Expert:
    """One object for the same numbers: what is compiled for it is found again."""
    return Expert(MATRICES, functools.partial(clamped_gate, alpha, limit), tuple(f"{m}_bias" for m in MATRICES))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(GroupedConfig):
    """See `GroupedConfig`.

    Attributes:
      layer_types: of each layer 'sliding_attention' or 'full_attention'.
      sliding_window: how many tokens a query of the former sees, its own among them.
      attention_bias: on all four projections.
      swiglu_alpha: slope of the experts' sigmoid.
      swiglu_limit: where their gate and up are clipped.
    """

    layer_types: tuple[str, ...]
    sliding_window: int | None = 128
    attention_bias: bool = True
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    def problems(self) -> list[str]:
        found = super().problems()
        if len(self.layer_types) != self.num_layers or not set(self.layer_types) <= {SLIDING, FULL}:
            found.append(
                f"layer_types: found {list(self.layer_types)}, expected {self.num_layers} of {SLIDING} and {FULL}"
            )
        return found

    @property
    def expert(self) -> Expert:
        return _expert(self.swiglu_alpha, self.swiglu_limit)

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.layer_types[layer] == SLIDING else None


def alternating(num_layers: int) -> tuple[str, ...]:
    """Sliding and full attention in turns."""
    return tuple(FULL if i % 2 else SLIDING for i in range(num_layers))


def from_described(described: Mapping[str, Any], **overrides: Any) -> GptOssConfig:
    """The architecture that config.json tells. Raises CheckpointError, see `Described.build`."""
    d = Described(described, "a gpt-oss")
    fields = d.common(default_theta=150_000.0, default_eps=1e-5)
    initial = d.take("initial_context_length", default=None)  # `original_max_position_embeddings` once more.
    if initial is not None and fields["rope"].kind == "yarn":
        d.same("initial_context_length", initial, fields["rope"].original_length)
    fields |= d.heads(fields) | {
        "d_ff": d.take("intermediate_size"),
        "num_experts": d.take("num_local_experts", "num_experts"),
        "layer_types": tuple(d.take("layer_types", default=alternating(fields["num_layers"]))),
        "sliding_window": d.take("sliding_window", default=None),
        "attention_bias": d.take("attention_bias", default=True),
        "swiglu_alpha": d.take("swiglu_alpha", default=1.702),
        "swiglu_limit": d.take("swiglu_limit", default=7.0),
    }
    return d.build(GptOssConfig, fields, overrides)


def to_described(config: GptOssConfig, dtype: str) -> dict[str, Any]:
    """config.json, as transformers reads it; `dtype` such as 'bfloat16'."""
    return describe(config, "gpt_oss", "GptOssForCausalLM", dtype) | {
        "intermediate_size": config.d_ff,
        "num_local_experts": config.num_experts,
        "layer_types": list(config.layer_types),
        "sliding_window": config.sliding_window,
        "attention_bias": config.attention_bias,
        "swiglu_alpha": config.swiglu_alpha,
        "swiglu_limit": config.swiglu_limit,
    }


def _published(num_layers: int, num_experts: int) -> GptOssConfig:
    return GptOssConfig(
        vocab_size=201088,
        d_model=2880,
        num_layers=num_layers,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        d_ff=2880,
        num_experts=num_experts,
        top_k=4,
        rope=Rope(150_000.0, "yarn", 32.0, 4096, truncate=False),
        layer_types=alternating(num_layers),
        max_length=131_072,
        eos=(200002,),
    )


PRESETS = {"gpt_oss_20b": _published(24, 32), "gpt_oss_120b": _published(36, 128)}
