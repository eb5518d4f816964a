"""DeepSeek-V3 (DeepSeek-AI 2024) and Kimi-K2: latent attention, a shared expert, routers that choose in groups.

Multi-token heads, the layers after the last, are left out.
"""

from __future__ import annotations

import re

from qmoe_jax.models.decoder.family import DecoderFamily
from qmoe_jax.models.decoder.names import COMMON, EXPERTS, LAYER, ROUTER, TENSOR_LAYER, Row, matrix
from qmoe_jax.models.deepseek_v3.config import PRESETS, DeepseekV3Config, from_described, to_described
from qmoe_jax.models.deepseek_v3.model import DeepseekV3

ROWS = (
    *COMMON,
    EXPERTS,
    matrix(f"{LAYER}/mlp/shared_experts/{{matrix}}/kernel", f"{TENSOR_LAYER}.mlp.shared_experts.{{matrix}}.weight"),
    ROUTER,
    Row(f"{LAYER}/mlp/router/correction", f"{TENSOR_LAYER}.mlp.gate.e_score_correction_bias"),
)


def beyond(config: DeepseekV3Config, tensor: str) -> str | None:
    """Tensors of layers after the last are the multi-token heads'."""
    match = re.match(r"model\.layers\.(\d+)\.", tensor)
    heads = range(config.num_layers, config.num_layers + config.num_nextn_predict_layers)
    return "multi-token head" if match and int(match[1]) in heads else None


FAMILY = DecoderFamily(
    name="deepseek_v3",
    title="a DeepSeek-V3",
    Config=DeepseekV3Config,
    Model=DeepseekV3,
    PRESETS=PRESETS,
    read=from_described,
    write=to_described,
    rows=ROWS,
    model_types=("deepseek_v3", "kimi_k2"),
    beyond=beyond,
)
