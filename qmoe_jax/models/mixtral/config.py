"""Mixtral's architecture (Jiang et al. 2024), how config.json tells it, and the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qmoe_jax.models.decoder.config import GroupedConfig, Rope
from qmoe_jax.models.decoder.described import Described, describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(GroupedConfig):
    """See `GroupedConfig`.

    Attributes:
      sliding_window: how many tokens a query sees, its own among them; None: all before it.
    """

    sliding_window: int | None = None

    def window(self, layer: int) -> int | None:
        return self.sliding_window


def from_described(described: Mapping[str, Any], **overrides: Any) -> MixtralConfig:
    """The architecture that config.json tells. Raises CheckpointError, see `Described.build`."""
    d = Described(described, "a Mixtral")
    fields = d.common(default_theta=1e6, default_eps=1e-5)
    fields |= d.heads(fields) | {
        "d_ff": d.take("intermediate_size"),
        "num_experts": d.take("num_local_experts", "num_experts"),
        "sliding_window": d.take("sliding_window", default=None),
    }
    return d.build(MixtralConfig, fields, overrides)


def to_described(config: MixtralConfig, dtype: str) -> dict[str, Any]:
    """config.json, as transformers reads it; `dtype` such as 'bfloat16'."""
    return describe(config, "mixtral", "MixtralForCausalLM", dtype) | {
        "intermediate_size": config.d_ff,
        "num_local_experts": config.num_experts,
        "sliding_window": config.sliding_window,
    }


def _published(d_model: int, d_ff: int, num_heads: int, num_layers: int, max_length: int) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=32000,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        d_ff=d_ff,
        num_experts=8,
        top_k=2,
        rope=Rope(1e6),
        max_length=max_length,
        bos=1,
        eos=(2,),
    )


PRESETS = {
    "mixtral_8x7b": _published(4096, 14336, 32, 32, 32768),
    "mixtral_8x22b": _published(6144, 16384, 48, 56, 65536),
}
