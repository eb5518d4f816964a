"""A decoder layer by layer: embedding, layers, norm and loss; one stream of activations, 'text'.

The same modules' methods as in the whole model, so that nothing is written twice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from qmoe_jax.models.decoder.config import DecoderConfig, layer_name
from qmoe_jax.models.decoder.model import Decoder, DecoderLayer
from qmoe_jax.models.family import Example, Layer, Routing, Stream, Streamed

TEXT = "text"
EMBEDDING = "model/embed_tokens/"


def streamed(model_class: type[Decoder], config: DecoderConfig, dtype: DTypeLike) -> Streamed:
    """See `family.Streamed`."""
    layers = []
    for i in range(config.num_layers):
        sparse = config.is_sparse(i)
        module = model_class.Layer(config, sparse, config.window(i), jnp.dtype(dtype))
        layers.append(
            Layer(
                layer_name(i),
                TEXT,
                functools.partial(_attend, module),
                expert=config.expert if sparse else None,
                choices=config.top_k if sparse else 0,
            )
        )
    head = ("model/norm/", EMBEDDING if config.tied else "lm_head/")
    losses = functools.partial(_losses, model_class(config, jnp.dtype(dtype)))
    return Streamed((Stream(TEXT, _embed, (EMBEDDING,)),), tuple(layers), losses, head)


def _embed(params: Mapping[str, Any], example: Example) -> np.ndarray:
    return params["model"]["embed_tokens"]["embedding"][example[0][:-1]]


def _attend(module: DecoderLayer, params, shared, x, context, tokens):
    return _layer(module, params, x)


@functools.partial(jax.jit, static_argnums=0)
def _layer(layer: DecoderLayer, params, x) -> tuple[jax.Array, jax.Array | None, Routing | None]:
    """A dense layer is applied; of a sparse layer the experts are left out."""
    apply: Any = functools.partial(layer.apply, {"params": params})
    x, _ = apply(x, jnp.arange(x.shape[1])[None], method="attend")
    if layer.sparse:
        return apply(x, method="before_experts")
    return apply(x, None, method="mlp_half"), None, None


@functools.partial(jax.jit, static_argnums=0)
def _losses(model: Decoder, params, x, tokens):
    """Summed cross-entropy of each row [rows], one row's logits in memory at a time."""
    _, targets = tokens

    def row(args):
        x, targets = args
        logits = model.apply({"params": params}, x[None], method=lambda m, x: m.logits(m.model.norm(x)))[0]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return jnp.sum(jnp.where(targets >= 0, loss, 0.0))

    return jax.lax.map(row, (x, targets))
