"""A family of decoders in Hugging Face's files: config.json and tensors, some of which are left out, and why."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.models.decoder import parameters
from qmoe_jax.models.decoder.config import DecoderConfig
from qmoe_jax.models.decoder.names import FIELDS, FLOAT8_BLOCK, LEFT_OUT
from qmoe_jax.models.names import COPY, Row, Shape, Table, Tensors

EMBEDDING = "model/embed_tokens/embedding"


class HuggingFace:
    """See `family.Names`.

    Args:
      title: of the family, in messages.
      model_types: what config.json calls it.
      read: from_described(config.json's settings, **overrides) -> config.
      write: to_described(config, dtype) -> config.json's settings.
      rows: names of its parameters.
      param_shapes: of a config.
      beyond: beyond(config, tensor), what a tensor of a layer after the last is; None: nothing that is known.
    """

    def __init__(
        self,
        title: str,
        model_types: tuple[str, ...],
        read: Callable[..., Any],
        write: Callable[[Any, str], dict[str, Any]],
        rows: tuple[Row, ...],
        param_shapes: Callable[[Any], dict[str, Shape]],
        beyond: Callable[[Any, str], str | None],
    ):
        self.title, self.model_types, self.table = title, model_types, Table(rows, FIELDS)
        self._read, self._write, self._param_shapes, self._beyond = read, write, param_shapes, beyond

    def from_described(self, described: Mapping[str, Any], **overrides: Any) -> Any:
        """The architecture that config.json tells, in either style.

        Raises CheckpointError that lists what is missing, not supported or not known.
        """
        kind = described.get("model_type")
        if kind not in self.model_types:
            raise CheckpointError(
                f"model_type: found {reprlib.repr(kind)}, expected {' or '.join(map(repr, self.model_types))}."
            )
        return self._read(described, **overrides)

    def to_described(self, config: DecoderConfig, dtype: Any) -> dict[str, Any]:
        """config.json, as transformers 5 reads it, for parameters of a dtype."""
        return self._write(config, np.dtype(dtype).name)

    def why_left_out(self, config: DecoderConfig, tensor: str) -> str | None:
        """See `family.Names`."""
        if config.tied and tensor == "lm_head.weight":
            return COPY
        known = next((why for pattern, why in LEFT_OUT.items() if re.fullmatch(pattern, tensor)), None)
        return known or self._beyond(config, tensor)

    def parameters(self, shapes: Mapping[str, Shape], described: Mapping[str, Any]) -> dict[str, Tensors]:
        check_quantization(described)
        config = self.from_described(described)
        tensors, foreign = self.table.parameters(n for n in shapes if self.why_left_out(config, n) is None)
        if foreign and (kind := format_of(foreign)):
            raise CheckpointError(f"Weights packed by {kind}, such as {foreign[0]!r}, aren't read. {_INSTEAD}")
        if foreign:
            raise CheckpointError(listed(f"{len(foreign)} tensors are not of {self.title}:", foreign))
        return tensors

    def tensors(self, name: str, config: DecoderConfig) -> Tensors:
        return self.table.tensors(name, config.num_experts)._replace(packed=())  # Written as they are.

    def config(self, shapes: Mapping[str, Shape], described: Mapping[str, Any], **overrides: Any) -> Any:
        config = self.from_described(described, **overrides)
        parameters.check(self._param_shapes(config), shapes, self.title)
        return config

    def describe(self, config: DecoderConfig, dtypes: Mapping[str, np.dtype], step: int | None) -> dict[str, Any]:
        described = self.to_described(config, dtypes[EMBEDDING])
        return described if step is None else {**described, "t5x_step": step}

    def lost(self, config: DecoderConfig) -> list[str]:
        return []


def check_quantization(described: Mapping[str, Any]) -> None:
    """Raises CheckpointError for tensors in a format that isn't read, by its name."""
    settings = described.get("quantization_config") or described.get("compression_config")
    if not settings:
        return
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"quantization_config: found {reprlib.repr(settings)}, expected an object. {_INSTEAD}")
    method = settings.get("quant_method")
    if method == "fp8":
        for setting, expected in (("weight_block_size", list(FLOAT8_BLOCK)), ("fmt", "e4m3")):
            found = settings.get(setting, expected if setting == "fmt" else None)
            if found != expected:
                raise CheckpointError(f"float8 with {setting} {found}, expected {expected}: isn't read. {_INSTEAD}")
    elif method != "mxfp4":
        details = [f"{name} {settings[name]}" for name in ("format", "bits", "load_in_4bit") if name in settings]
        more = f" ({', '.join(details)})" if details else ""
        raise CheckpointError(f"quant_method {method!r}{more} isn't read. {_INSTEAD}")


# What tensors of formats that aren't read are called, where config.json doesn't say it.
_FORMATS = {
    r".*\.(qweight|qzeros|g_idx)": "GPTQ or AWQ",
    r".*\.weight_(packed|shape|zero_point|global_scale)": "compressed-tensors",
    r".*\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)|.*\.SCB": "bitsandbytes",
}
_INSTEAD = "Take the model as it is published in bfloat16, or one in float8 with scales per block, or in MXFP4."


def format_of(tensors: Iterable[str]) -> str | None:
    """The format of packed weights that tensors' names tell; None: none that is known."""
    names = list(tensors)
    return next((kind for pattern, kind in _FORMATS.items() if any(re.fullmatch(pattern, n) for n in names)), None)
