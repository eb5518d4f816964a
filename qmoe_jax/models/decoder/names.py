"""What parameters of decoders are called in Hugging Face's files: rows that families' tables have in common.

Most families add but their experts and router to `COMMON`. Matrices may be in float8 with scales beside them.
"""

from __future__ import annotations

import numpy as np

from qmoe_jax.models.names import NUMBER, SAME, TRANSPOSED, Packed, Part, Row, Shape
from qmoe_jax.models.quantized_formats import FLOAT8_BLOCK, MXFP4_BLOCK, dequantize_float8, dequantize_mxfp4

LAYER, TENSOR_LAYER = "model/layers_{layer}", "model.layers.{layer}"
FIELDS = {
    "layer": NUMBER,
    "norm": "input_layernorm|post_attention_layernorm",
    "projection": "q_proj|k_proj|v_proj|o_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj",
    "inner_norm": "q_norm|k_norm|q_a_layernorm|kv_a_layernorm",
    "matrix": "gate_proj|up_proj|down_proj",
}


def matrix(parameter: str, tensor: str) -> Row:
    """A matrix, [out, in] in the file; in float8 if its scales are there."""
    float8 = Packed(
        (f"{tensor}_scale_inv",), _same_shape, dequantize_float8, ((1, 1), FLOAT8_BLOCK), np.dtype(np.float32)
    )
    return Row(parameter, tensor, TRANSPOSED, None, float8)


def fused_experts(parameter: str, tensor: str, part: Part | None) -> tuple[Row, Row]:
    """A matrix of all experts in one tensor: plain [experts, in, out], or MXFP4, which is [experts, out, in]."""
    block = (1, MXFP4_BLOCK)
    mxfp4 = Packed((f"{tensor}_scales",), _mxfp4_shape, dequantize_mxfp4, (block, block))
    return (
        Row(parameter, tensor, SAME, part),
        Row(parameter, f"{tensor}_blocks", TRANSPOSED, part, mxfp4),
    )


def _same_shape(shape: Shape) -> Shape:
    return shape


def _mxfp4_shape(shape: Shape) -> Shape:
    """[..., in / 32, 16 bytes] -> [..., in]."""
    return (*shape[:-2], 2 * shape[-2] * shape[-1])


COMMON = (
    Row("model/embed_tokens/embedding", "model.embed_tokens.weight"),  # [vocabulary, d_model]
    Row("model/norm/scale", "model.norm.weight"),
    matrix("lm_head/kernel", "lm_head.weight"),
    Row(f"{LAYER}/{{norm}}/scale", f"{TENSOR_LAYER}.{{norm}}.weight"),
    matrix(f"{LAYER}/self_attn/{{projection}}/kernel", f"{TENSOR_LAYER}.self_attn.{{projection}}.weight"),
    Row(f"{LAYER}/self_attn/{{projection}}/bias", f"{TENSOR_LAYER}.self_attn.{{projection}}.bias"),
    Row(f"{LAYER}/self_attn/{{inner_norm}}/scale", f"{TENSOR_LAYER}.self_attn.{{inner_norm}}.weight"),
    matrix(f"{LAYER}/mlp/{{matrix}}/kernel", f"{TENSOR_LAYER}.mlp.{{matrix}}.weight"),
)
EXPERTS = matrix(f"{LAYER}/mlp/experts/{{matrix}}/kernel", f"{TENSOR_LAYER}.mlp.experts.{{expert}}.{{matrix}}.weight")
ROUTER = matrix(f"{LAYER}/mlp/router/kernel", f"{TENSOR_LAYER}.mlp.gate.weight")

# Tensors that no parameter is made of, in any family, and what they are.
LEFT_OUT = {r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "frequencies, which config.json tells"}

__all__ = [
    "COMMON",
    "EXPERTS",
    "FIELDS",
    "FLOAT8_BLOCK",
    "LAYER",
    "LEFT_OUT",
    "ROUTER",
    "SAME",
    "TENSOR_LAYER",
    "TRANSPOSED",
    "Part",
    "Row",
    "fused_experts",
    "matrix",
]
