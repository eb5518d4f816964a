"""A family of decoders in MaxText's checkpoints: names as in its `param_mapping.py` (version 0.2.5).

Kernels are [in, out] there as here; those of attention have an axis of heads, experts are stacked. Nothing in them
tells the architecture: it is read as Hugging Face's config.json tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.models.decoder import parameters
from qmoe_jax.models.decoder.config import GroupedConfig
from qmoe_jax.models.decoder.names import FIELDS, LAYER
from qmoe_jax.models.names import Row, Shape, Table, Tensors

THEIRS = "decoder/layers_{layer}"
QUERY = "/self_attn/q_proj/kernel"


class Kept(NamedTuple):
    """How MaxText keeps a family.

    Attributes:
      experts: what it calls the module of router and experts.
      scaled_queries: queries' kernels are stored times 1 / sqrt(head_dim), and attention's logits not scaled.
    """

    experts: str
    scaled_queries: bool = False


def rows(experts: str) -> tuple[Row, ...]:
    """The names of all parameters; `experts` as in `Kept`."""
    return (
        Row("model/embed_tokens/embedding", "token_embedder/embedding"),
        Row("model/norm/scale", "decoder/decoder_norm/scale"),
        Row("lm_head/kernel", "decoder/logits_dense/kernel"),
        Row(f"{LAYER}/input_layernorm/scale", f"{THEIRS}/pre_self_attention_layer_norm/scale"),
        Row(f"{LAYER}/post_attention_layernorm/scale", f"{THEIRS}/post_self_attention_layer_norm/scale"),
        # [d_model, heads, head_dim], and [heads, head_dim, d_model].
        Row(f"{LAYER}/self_attn/q_proj/kernel", f"{THEIRS}/self_attention/query/kernel", merged=1),
        Row(f"{LAYER}/self_attn/k_proj/kernel", f"{THEIRS}/self_attention/key/kernel", merged=1),
        Row(f"{LAYER}/self_attn/v_proj/kernel", f"{THEIRS}/self_attention/value/kernel", merged=1),
        Row(f"{LAYER}/self_attn/o_proj/kernel", f"{THEIRS}/self_attention/out/kernel", merged=0),
        Row(f"{LAYER}/self_attn/q_norm/scale", f"{THEIRS}/self_attention/query_norm/scale"),
        Row(f"{LAYER}/self_attn/k_norm/scale", f"{THEIRS}/self_attention/key_norm/scale"),
        Row(f"{LAYER}/mlp/router/kernel", f"{THEIRS}/{experts}/gate/kernel"),
        # [experts, in, out]
        Row(f"{LAYER}/mlp/experts/gate_proj/kernel", f"{THEIRS}/{experts}/wi_0"),
        Row(f"{LAYER}/mlp/experts/up_proj/kernel", f"{THEIRS}/{experts}/wi_1"),
        Row(f"{LAYER}/mlp/experts/down_proj/kernel", f"{THEIRS}/{experts}/wo"),
    )


class MaxText:
    """See `family.Names`. It is read only.

    Args:
      title: of the family, in messages.
      kept: how MaxText keeps it.
      from_described: from_described(config.json's settings, **overrides) -> config.
      param_shapes: of a config.
    """

    def __init__(
        self,
        title: str,
        kept: Kept,
        from_described: Callable[..., Any],
        param_shapes: Callable[[Any], dict[str, Shape]],
    ):
        self.title, self.kept, self.table = title, kept, Table(rows(kept.experts), FIELDS)
        self._from_described, self._param_shapes = from_described, param_shapes

    def parameters(self, shapes: Mapping[str, Shape], described: Mapping[str, Any]) -> dict[str, Tensors]:
        config: GroupedConfig = self._from_described(described)
        found, foreign = self.table.parameters(shapes)
        if foreign:
            raise CheckpointError(listed(f"{len(foreign)} arrays are not of {self.title} in MaxText:", foreign))
        if self.kept.scaled_queries:
            scale = float(np.sqrt(config.head_dim))
            found = {n: t._replace(scale=scale) if n.endswith(QUERY) else t for n, t in found.items()}
        return found

    def tensors(self, name: str, config: GroupedConfig) -> Tensors:
        raise CheckpointError("MaxText's layout is read, not written.")

    def config(self, shapes: Mapping[str, Shape], described: Mapping[str, Any], **overrides: Any) -> Any:
        config = self._from_described(described, **overrides)
        parameters.check(self._param_shapes(config), shapes, self.title)
        return config

    def describe(self, config: GroupedConfig, dtypes: Mapping[str, np.dtype], step: int | None) -> dict[str, Any]:
        raise CheckpointError("MaxText's layout is read, not written.")

    def why_left_out(self, config: GroupedConfig, tensor: str) -> str | None:
        return None

    def lost(self, config: GroupedConfig) -> list[str]:
        return []
