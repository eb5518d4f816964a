"""Switch Transformers (Fedus et al. 2021), as T5X trains and evaluates them: encoder, decoder, span corruption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from qmoe_jax.models.family import Names, Task
from qmoe_jax.models.switch import parameters
from qmoe_jax.models.switch.batches import Batch, make_batches, training_batches
from qmoe_jax.models.switch.config import PRESETS, TOLD, ModelConfig
from qmoe_jax.models.switch.decoding import generate, written
from qmoe_jax.models.switch.examples import Examples, load_examples
from qmoe_jax.models.switch.huggingface import MODEL_TYPE, HuggingFace, Published
from qmoe_jax.models.switch.model import SwitchTransformer, as_tokens, forward
from qmoe_jax.models.switch.span_corruption import corrupt
from qmoe_jax.models.switch.stream import streamed
from qmoe_jax.models.switch.t5x import T5X
from qmoe_jax.models.switch.task import SpanCorruption
from qmoe_jax.models.switch.vocabulary import EOS, PAD, Vocabulary


class Switch:
    """See `family.Family`."""

    name = "switch"
    title = "a Switch Transformer"
    published_as = "t5x"
    Config: type = ModelConfig
    PRESETS: Mapping[str, Any] = PRESETS
    UNTOLD: Mapping[str, str] = {
        "top_k": "experts per token, which T5X's checkpoints don't tell: 1 unless given",
        "experts_choose": "their capacity factor, if the encoder's experts choose, which T5X's don't tell either",
    }
    told: tuple[str, ...] = TOLD
    task: Task = SpanCorruption()
    names: Mapping[str, Names] = {"t5x": T5X(), "huggingface": HuggingFace(), "ista": Published()}
    model_types: tuple[str, ...] = (MODEL_TYPE,)
    min_tokens = 0  # as the paper

    infer = staticmethod(parameters.infer_config)
    param_shapes = staticmethod(parameters.param_shapes)
    expert_parameter = staticmethod(parameters.expert_parameter)
    expert_of = staticmethod(parameters.expert_of)
    is_small = staticmethod(parameters.is_small)

    forward = staticmethod(forward)
    generate = staticmethod(generate)
    written = staticmethod(written)
    streamed = staticmethod(streamed)

    def model(self, config: ModelConfig, dtype: DTypeLike, mesh: Mesh | None) -> SwitchTransformer:
        return SwitchTransformer(config, dtype, mesh)

    def summary(self, config: ModelConfig) -> list[tuple[str, str]]:
        layers = (
            f"{config.num_encoder_layers} encoder ({len(config.encoder_sparse_layers)} sparse), "
            f"{config.num_decoder_layers} decoder ({len(config.decoder_sparse_layers)} sparse)"
        )
        routing = f"top-{config.top_k}" + ("" if config.experts_choose is None else ", in the encoder experts choose")
        mlp = "gated gelu" if config.gated else "relu"
        return [
            ("layers", layers),
            ("experts", f"{config.num_experts} in each sparse layer, {mlp}, {routing}"),
            ("d_model, d_ff", f"{config.d_model}, {config.d_ff}"),
            ("heads x width", f"{config.num_heads} x {config.head_dim}"),
            ("vocabulary", f"{config.vocab_size}, logits {'tied' if config.tied else 'untied'}"),
        ]

    def attention_bytes(self, config: ModelConfig, longest: Mapping[str, int], tokens_per_batch: int) -> int:
        encoder, both = longest["encoder"], longest["encoder"] + longest["decoder"]
        rows = max(1, tokens_per_batch // both)
        scores = rows * config.num_heads * max(encoder**2, longest["decoder"] * both)
        wide = 4 * config.num_heads * config.head_dim + 6 * config.d_model + 2 * config.d_ff
        return 4 * (3 * scores + max(tokens_per_batch, both) * wide)

    def loss_bytes(self, config: ModelConfig, longest: Mapping[str, int]) -> int:
        return 4 * config.vocab_size * (3 * longest["decoder"] + (0 if config.tied else config.d_model))


FAMILY = Switch()

__all__ = [
    "EOS",
    "FAMILY",
    "PAD",
    "PRESETS",
    "Batch",
    "Examples",
    "ModelConfig",
    "SpanCorruption",
    "SwitchTransformer",
    "Vocabulary",
    "as_tokens",
    "corrupt",
    "forward",
    "generate",
    "load_examples",
    "make_batches",
    "training_batches",
]
