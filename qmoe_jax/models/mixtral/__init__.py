"""Mixtral (Jiang et al. 2024): 8 large experts, 2 per token."""

from __future__ import annotations

from qmoe_jax.models.decoder.family import DecoderFamily
from qmoe_jax.models.decoder.maxtext import Kept
from qmoe_jax.models.decoder.names import COMMON, LAYER, TENSOR_LAYER, matrix
from qmoe_jax.models.mixtral.config import PRESETS, MixtralConfig, from_described, to_described
from qmoe_jax.models.mixtral.model import Mixtral

MOE = f"{TENSOR_LAYER}.block_sparse_moe"
ROWS = (
    *COMMON,
    *(
        matrix(f"{LAYER}/mlp/experts/{ours}/kernel", f"{MOE}.experts.{{expert}}.{theirs}.weight")
        for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
    ),
    matrix(f"{LAYER}/mlp/router/kernel", f"{MOE}.gate.weight"),
)

FAMILY = DecoderFamily(
    name="mixtral",
    title="a Mixtral",
    Config=MixtralConfig,
    Model=Mixtral,
    PRESETS=PRESETS,
    read=from_described,
    write=to_described,
    rows=ROWS,
    model_types=("mixtral",),
    maxtext=Kept("MoeBlock_0", scaled_queries=True),
)
