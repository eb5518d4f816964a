"""A family of decoder-only mixtures of experts as one object, made of what its folder says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qmoe_jax.errors import CheckpointError
from qmoe_jax.models.decoder import decoding, names, parameters, stream
from qmoe_jax.models.decoder.config import DecoderConfig
from qmoe_jax.models.decoder.model import Decoder, forward
from qmoe_jax.models.decoder.names import Row, Stored
from qmoe_jax.models.decoder.task import NextToken
from qmoe_jax.models.family import Shape, Streamed


@dataclasses.dataclass(frozen=True)
class DecoderFamily:
    """See `family.Family` for what isn't listed here.

    Attributes:
      Model: the Flax module's class.
      model_types: what config.json calls the family.
      read: from_described(config.json's settings, **overrides) -> config.
      write: to_described(config, dtype) -> config.json's settings.
      rows: names of its parameters in Hugging Face's files.
      left_out: what tensors are that no parameter is made of, by pattern of their names.
    """

    name: str
    title: str
    Config: type[Any]
    Model: type[Decoder]
    PRESETS: Mapping[str, Any]
    read: Callable[..., Any]
    write: Callable[[Any, str], dict[str, Any]]
    rows: tuple[Row, ...]
    model_types: tuple[str, ...]
    left_out: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(names.LEFT_OUT))

    published_as = "huggingface"
    UNTOLD: tuple[str, ...] = ()  # config.json tells all
    task = NextToken()

    expert_parameter = staticmethod(parameters.expert_parameter)
    expert_of = staticmethod(parameters.expert_of)
    is_small = staticmethod(parameters.is_small)
    forward = staticmethod(forward)
    generate = staticmethod(decoding.generate)

    @property
    def told(self) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(self.Config) if f.name not in self.Config.BESIDE)

    # --- Files --------------------------------------------------------------------------------------------------------

    def from_described(self, described: Mapping[str, Any], **overrides: Any) -> Any:
        """The architecture that config.json tells, in either style.

        Raises CheckpointError that lists what is missing, not supported or not known.
        """
        kind = described.get("model_type")
        if kind not in self.model_types:
            raise CheckpointError(f"model_type: found {kind!r}, expected {' or '.join(map(repr, self.model_types))}.")
        return self.read(described, **overrides)

    def to_described(self, config: Any, dtype: Any) -> dict[str, Any]:
        """config.json, as transformers 5 reads it, for parameters of a dtype."""
        return self.write(config, np.dtype(dtype).name)

    def stored(self, config: Any, name: str) -> Stored:
        """The tensors that a parameter is written to. Raises KeyError."""
        return names.stored(self.rows, name, config.num_experts)

    def ways_stored(self, config: Any, name: str) -> list[Stored]:
        """All ways in which files may have it."""
        return names.ways_stored(self.rows, name, config.num_experts)

    def why_left_out(self, config: Any, tensor: str) -> str | None:
        """What a tensor is that is left out on purpose; None: it is foreign, or a parameter's."""
        return names.why_left_out(self.left_out, tensor) or self.beyond(config, tensor)

    def beyond(self, config: Any, tensor: str) -> str | None:
        """The same for tensors of layers after the last, where the architecture has such."""
        return None

    def infer(
        self, shapes: Mapping[str, Shape], described: Mapping[str, Any] | None = None, **overrides: Any
    ) -> DecoderConfig:
        """The architecture that config.json tells, if these parameters are its.

        Raises CheckpointError without config.json, or that lists all that are missing, foreign or of wrong shape.
        """
        if described is None:
            raise CheckpointError(f"Parameters alone don't tell {self.title}: config.json is needed.")
        config = self.from_described(described, **overrides)
        parameters.check(self.param_shapes(config), shapes, self.title)
        return config

    # --- The model ----------------------------------------------------------------------------------------------------

    def param_shapes(self, config: Any) -> dict[str, Shape]:
        return parameters.param_shapes(self.Model.Layer, config)

    def model(self, config: Any, dtype: DTypeLike, mesh: Mesh | None) -> Decoder:
        return self.Model(config, np.dtype(dtype), mesh)

    def streamed(self, config: Any, dtype: DTypeLike) -> Streamed:
        return stream.streamed(self.Model, config, dtype)

    def attention_bytes(self, config: Any, longest: Mapping[str, int], tokens_per_batch: int) -> int:
        length = longest[stream.TEXT]
        rows = max(1, tokens_per_batch // length)
        heads = config.num_heads * max(getattr(config, "head_dim", 0), getattr(config, "query_dim", 0))
        dense = config.shared_width if config.is_sparse(config.num_layers - 1) else config.dense_width
        widest = max(dense, config.shared_width, 0 if config.is_sparse(0) else config.dense_width)
        wide = 4 * heads + 6 * config.d_model + 3 * widest
        return 4 * (3 * rows * config.num_heads * length**2 + max(tokens_per_batch, length) * wide)

    def loss_bytes(self, config: Any, longest: Mapping[str, int]) -> int:
        return 4 * config.vocab_size * (3 * longest[stream.TEXT] + (0 if config.tied else config.d_model))
