"""A family of decoder-only mixtures of experts as one object, made of what its folder says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qmoe_jax.errors import CheckpointError
from qmoe_jax.models.decoder import decoding, parameters, stream
from qmoe_jax.models.decoder.config import GATED
from qmoe_jax.models.decoder.huggingface import HuggingFace
from qmoe_jax.models.decoder.maxtext import Kept, MaxText
from qmoe_jax.models.decoder.model import Decoder, forward
from qmoe_jax.models.decoder.task import NextToken
from qmoe_jax.models.family import Names, Streamed, Task
from qmoe_jax.models.names import Row, Shape


def nothing_beyond(config: Any, tensor: str) -> str | None:
    """There are no layers after the last."""
    return None


@dataclasses.dataclass(eq=False)
class DecoderFamily:
    """See `family.Family` for what isn't listed here.

    Attributes:
      Model: the Flax module's class.
      read, write, rows, beyond: see `HuggingFace`.
      maxtext: how MaxText keeps it; None: its checkpoints of the family aren't read.
    """

    name: str
    title: str
    Config: type
    Model: type[Decoder]
    PRESETS: Mapping[str, Any]
    read: Callable[..., Any]
    write: Callable[[Any, str], dict[str, Any]]
    rows: tuple[Row, ...]
    model_types: tuple[str, ...]
    beyond: Callable[[Any, str], str | None] = nothing_beyond
    maxtext: Kept | None = None

    published_as: str = "huggingface"
    min_tokens: int = 512  # Of many small experts some get few.
    UNTOLD: Mapping[str, str] = dataclasses.field(default_factory=dict)  # config.json tells all
    task: Task = NextToken()
    told: tuple[str, ...] = dataclasses.field(init=False)  # all that logits depend on
    huggingface: HuggingFace = dataclasses.field(init=False)
    names: Mapping[str, Names] = dataclasses.field(init=False)

    forward = staticmethod(forward)
    generate = staticmethod(decoding.generate)
    written = staticmethod(decoding.written)
    expert_parameter = staticmethod(parameters.expert_parameter)
    expert_of = staticmethod(parameters.expert_of)
    is_small = staticmethod(parameters.is_small)

    def __post_init__(self):
        config: Any = self.Config
        self.told = tuple(f.name for f in dataclasses.fields(config) if f.name not in config.BESIDE)
        self.huggingface = HuggingFace(
            self.title, self.model_types, self.read, self.write, self.rows, self.param_shapes, self.beyond
        )
        self.names = {"huggingface": self.huggingface}
        if self.maxtext is not None:
            names = MaxText(self.title, self.maxtext, self.huggingface.from_described, self.param_shapes)
            self.names = {**self.names, "maxtext": names}

    def infer(self, shapes: Mapping[str, Shape], described: Mapping[str, Any] | None = None, **overrides: Any) -> Any:
        """The architecture that config.json tells, if these parameters are its.

        Raises CheckpointError without config.json, or that lists all that are missing, foreign or of wrong shape.
        """
        if described is None:
            raise CheckpointError(
                f"Parameters alone don't tell {self.title}: config.json is needed. Copy it from where they come from."
            )
        return self.huggingface.config(shapes, described, **overrides)

    def summary(self, config: Any) -> list[tuple[str, str]]:
        c, sparse = config, len(config.sparse_layers)
        kind = "silu, gated" if c.expert == GATED else "clamped, gated, with biases"
        shared = f", one of {c.shared_width} for every token" if c.shared_width else ""
        windows = sorted({c.window(i) for i in range(c.num_layers)} - {None})
        kv_heads = f", {c.num_kv_heads} of keys and values" if hasattr(c, "num_kv_heads") else ", latent"
        return [
            ("layers", f"{c.num_layers} ({sparse} sparse)"),
            ("experts", f"{c.num_experts} in each sparse layer, {kind}, top-{c.top_k}{shared}"),
            ("d_model, d_ff", f"{c.d_model}, {c.d_ff}" + (f", dense {c.dense_width}" if c.dense_layers else "")),
            ("heads x width", f"{c.num_heads} x {c.query_dim}{kv_heads}"),
            ("windows", ", ".join(map(str, windows)) or "none"),
            ("vocabulary", f"{c.vocab_size}, logits {'tied' if c.tied else 'untied'}"),
        ]

    # --- The model ----------------------------------------------------------------------------------------------------

    def param_shapes(self, config: Any) -> dict[str, Shape]:
        return parameters.param_shapes(self.Model.Layer, config)

    def model(self, config: Any, dtype: DTypeLike, mesh: Mesh | None) -> Decoder:
        return self.Model(config, np.dtype(dtype), mesh)

    def streamed(self, config: Any, dtype: DTypeLike) -> Streamed:
        return stream.streamed(self.Model, config, dtype)

    def attention_bytes(self, config: Any, longest: Mapping[str, int], tokens_per_batch: int) -> int:
        length = longest[stream.TEXT]
        rows, tokens = max(1, tokens_per_batch // length), max(tokens_per_batch, length)
        # Of scores there are two or three at once; then queries, keys and values, or the MLP of a dense layer.
        attention = 3 * rows * config.num_heads * length**2
        attention += tokens * 3 * (config.num_heads * config.query_dim + config.d_model) // 2
        widest = max(config.shared_width, config.dense_width if config.dense_layers else 0)
        return 4 * max(attention, tokens * 3 * (widest + config.d_model))

    def loss_bytes(self, config: Any, longest: Mapping[str, int]) -> int:
        # The head in float32, logits, and a little of what the softmax takes.
        return 4 * config.vocab_size * (longest[stream.TEXT] * 5 // 4 + config.d_model)
