"""Switch Transformers in T5X's own checkpoints: the names are ours, and nothing but parameters tells of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmoe_jax.models.names import Shape, Tensors
from qmoe_jax.models.switch.config import ModelConfig
from qmoe_jax.models.switch.parameters import infer_config

# What a parameter tree doesn't tell, and what it is then taken for.
_UNTOLD = {"top_k": 1, "experts_choose": None, "batch_prioritized": None, "router_group_size": 8192}


class T5X:
    """See `family.Names`."""

    def parameters(self, shapes: Mapping[str, Shape], described: Mapping[str, Any]) -> dict[str, Tensors]:
        return {name: Tensors((name,)) for name in shapes}

    def tensors(self, name: str, config: ModelConfig) -> Tensors:
        return Tensors((name,))

    def config(self, shapes: Mapping[str, Shape], described: Mapping[str, Any], **overrides: Any) -> ModelConfig:
        return infer_config(shapes, **overrides)

    def describe(self, config: ModelConfig, dtypes: Mapping[str, Any], step: int | None) -> dict[str, Any]:
        return {}

    def why_left_out(self, config: ModelConfig, tensor: str) -> str | None:
        return None

    def lost(self, config: ModelConfig) -> list[str]:
        told = {field: getattr(config, field) for field, usual in _UNTOLD.items() if getattr(config, field) != usual}
        return [
            f"{field}={value}: a T5X parameter tree doesn't tell; give it when you open it"
            for field, value in told.items()
        ]
