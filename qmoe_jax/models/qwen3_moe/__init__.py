"""Qwen3-MoE (Qwen Team 2025): 128 small experts, 8 per token; heads of queries and keys are normed."""

from __future__ import annotations

from qmoe_jax.models.decoder.family import DecoderFamily
from qmoe_jax.models.decoder.maxtext import Kept
from qmoe_jax.models.decoder.names import COMMON, EXPERTS, ROUTER
from qmoe_jax.models.qwen3_moe.config import PRESETS, Qwen3MoeConfig, from_described, to_described
from qmoe_jax.models.qwen3_moe.model import Qwen3Moe

FAMILY = DecoderFamily(
    name="qwen3_moe",
    title="a Qwen3-MoE",
    Config=Qwen3MoeConfig,
    Model=Qwen3Moe,
    PRESETS=PRESETS,
    read=from_described,
    write=to_described,
    rows=(*COMMON, EXPERTS, ROUTER),
    model_types=("qwen3_moe",),
    maxtext=Kept("moe_block"),
)
