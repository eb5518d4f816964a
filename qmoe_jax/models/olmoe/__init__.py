"""OLMoE (Muennighoff et al. 2024): 64 small experts, 8 per token, gates not renormalised."""

from __future__ import annotations

from qmoe_jax.models.decoder.family import DecoderFamily
from qmoe_jax.models.decoder.names import COMMON, EXPERTS, ROUTER
from qmoe_jax.models.olmoe.config import PRESETS, OlmoeConfig, from_described, to_described
from qmoe_jax.models.olmoe.model import Olmoe

FAMILY = DecoderFamily(
    name="olmoe",
    title="an OLMoE",
    Config=OlmoeConfig,
    Model=Olmoe,
    PRESETS=PRESETS,
    read=from_described,
    write=to_described,
    rows=(*COMMON, EXPERTS, ROUTER),
    model_types=("olmoe",),
)
