"""gpt-oss (OpenAI 2025): 32 or 128 experts with biases, 4 per token; attention sinks, sliding windows in turns."""

from __future__ import annotations

from qmoe_jax.models.decoder.family import DecoderFamily
from qmoe_jax.models.decoder.names import COMMON, LAYER, SAME, TENSOR_LAYER, TRANSPOSED, Part, Row
from qmoe_jax.models.gpt_oss.config import PRESETS, GptOssConfig, from_described, to_described
from qmoe_jax.models.gpt_oss.model import GptOss

EXPERTS = f"{TENSOR_LAYER}.mlp.experts"


def _rows(matrix: str, tensor: str, part: Part | None) -> tuple[Row, ...]:
    """A matrix, plain [experts, in, out] or packed [experts, out, in], and its bias."""
    parameter = f"{LAYER}/mlp/experts/{matrix}"
    blocks, scales = f"{EXPERTS}.{tensor}_blocks", f"{EXPERTS}.{tensor}_scales"
    return (
        Row(f"{parameter}/kernel", f"{EXPERTS}.{tensor}", SAME, part),
        Row(f"{parameter}/kernel", blocks, TRANSPOSED, part, (scales,), "mxfp4"),
        Row(f"{parameter}/bias", f"{EXPERTS}.{tensor}_bias", SAME, part),
    )


ROWS = (
    *COMMON,
    *_rows("gate_proj", "gate_up_proj", Part(0, 2, interleaved=True)),
    *_rows("up_proj", "gate_up_proj", Part(1, 2, interleaved=True)),
    *_rows("down_proj", "down_proj", None),
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
