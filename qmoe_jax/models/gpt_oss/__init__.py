"""gpt-oss (OpenAI 2025): 32 or 128 experts with biases, 4 per token; attention sinks, sliding windows in turns."""

from __future__ import annotations

from qmoe_jax.models.decoder.family import DecoderFamily
from qmoe_jax.models.decoder.names import COMMON, LAYER, SAME, TENSOR_LAYER, TRANSPOSED, Part, Row, fused_experts
from qmoe_jax.models.gpt_oss.config import PRESETS, GptOssConfig, from_described, to_described
from qmoe_jax.models.gpt_oss.model import GptOss

EXPERTS, TENSORS = f"{LAYER}/mlp/experts", f"{TENSOR_LAYER}.mlp.experts"
# Experts' matrices, the tensors that they share, and their part of these.
MATRICES = (
    ("gate_proj", "gate_up_proj", Part(0, 2, interleaved=True)),
    ("up_proj", "gate_up_proj", Part(1, 2, interleaved=True)),
    ("down_proj", "down_proj", None),
)
ROWS = (
    *COMMON,
    *(
        row
        for m, tensor, part in MATRICES
        for row in fused_experts(f"{EXPERTS}/{m}/kernel", f"{TENSORS}.{tensor}", part)
    ),
    *(Row(f"{EXPERTS}/{m}/bias", f"{TENSORS}.{tensor}_bias", SAME, part) for m, tensor, part in MATRICES),
    Row(f"{LAYER}/self_attn/sinks", f"{TENSOR_LAYER}.self_attn.sinks"),
    Row(f"{LAYER}/mlp/router/kernel", f"{TENSOR_LAYER}.mlp.router.weight", TRANSPOSED),
    Row(f"{LAYER}/mlp/router/bias", f"{TENSOR_LAYER}.mlp.router.bias"),
)

FAMILY = DecoderFamily(
    name="gpt_oss",
    title="a gpt-oss",
    Config=GptOssConfig,
    Model=GptOss,
    PRESETS=PRESETS,
    read=from_described,
    write=to_described,
    rows=ROWS,
    model_types=("gpt_oss",),
)
