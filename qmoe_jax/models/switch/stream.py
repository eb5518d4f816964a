"""The Switch Transformer layer by layer: embedding, encoder layers, norm; embedding, decoder layers, loss.

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

from qmoe_jax.models.family import Example, Layer, Routing, Stream, Streamed
from qmoe_jax.models.switch.config import ModelConfig
from qmoe_jax.models.switch.layers import RelativePositionBias, RMSNorm
from qmoe_jax.models.switch.model import (
    DecoderLayer,
    EncoderLayer,
    SwitchTransformer,
    decoder_masks,
    decoder_token_mask,
    encoder_masks,
)

EMBEDDER = "token_embedder/"


def streamed(config: ModelConfig, dtype: DTypeLike) -> Streamed:
    """See `family.Streamed`."""
    streams = (
        Stream(
            "encoder", _embed_encoder, (EMBEDDER,), functools.partial(_norm, config, dtype), ("encoder/encoder_norm/",)
        ),
        Stream("decoder", _embed_decoder, (EMBEDDER,)),
    )
    layers = [_layer(config, dtype, "encoder", i) for i in range(config.num_encoder_layers)]
    layers += [_layer(config, dtype, "decoder", i) for i in range(config.num_decoder_layers)]
    head = ("decoder/decoder_norm/", EMBEDDER, *(() if config.tied else ("decoder/logits_dense/",)))
    alone = "" if config.experts_choose is None else "experts choose their tokens: the sums depend on how many"
    return Streamed(streams, tuple(layers), functools.partial(_losses, SwitchTransformer(config, dtype)), head, alone)


def _layer(config: ModelConfig, dtype: DTypeLike, stack: str, i: int) -> Layer:
    encoder = stack == "encoder"
    sparse = i in (config.encoder_sparse_layers if encoder else config.decoder_sparse_layers)
    attend: Any = functools.partial(_attend_encoder, EncoderLayer(config, sparse, False, dtype))
    if not encoder:
        attend = functools.partial(_attend_decoder, DecoderLayer(config, sparse, True, dtype))
    # Where experts choose, they do among the tokens of a batch; each expert has a column.
    choices = config.num_experts if encoder and config.experts_choose is not None else config.top_k
    return Layer(
        f"{stack}/layers_{i}",
        stack,
        attend,
        context=() if encoder else ("encoder",),
        shared=() if config.relpos_per_layer else (f"{stack}/relpos_bias/",),
        expert=config.expert if sparse else None,
        choices=choices if sparse else 0,
    )


def _embed_encoder(params: Mapping[str, Any], example: Example) -> np.ndarray:
    return params["token_embedder"]["embedding"][example[0]]


def _embed_decoder(params: Mapping[str, Any], example: Example) -> np.ndarray:
    return params["token_embedder"]["embedding"][example[1][:-1]]


def _attend_encoder(module: EncoderLayer, params, shared, x, context, tokens):
    return _encoder_layer(module, params, shared, x, tokens[0])


def _attend_decoder(module: DecoderLayer, params, shared, x, context, tokens):
    return _decoder_layer(module, params, shared, x, context["encoder"], tokens)


@functools.partial(jax.jit, static_argnums=0)
def _encoder_layer(layer: EncoderLayer, params, shared, x, tokens):
    params = {"params": params}
    token_mask, bias = encoder_masks(tokens, layer.dtype)
    shared_bias = _shared_bias(layer, "encoder", shared, x.shape[1])
    x = layer.apply(params, x, token_mask, bias, shared_bias, method="attend")
    return _mlp_or_route(layer, params, x, token_mask)


@functools.partial(jax.jit, static_argnums=0)
def _decoder_layer(layer: DecoderLayer, params, shared, x, encoded, tokens):
    params = {"params": params}
    encoder_tokens, inputs, targets = tokens
    masks = decoder_masks(encoder_tokens, inputs, targets, layer.dtype)
    shared_bias = _shared_bias(layer, "decoder", shared, x.shape[1])
    x = layer.apply(params, x, encoded, masks, shared_bias, method="attend")
    return _mlp_or_route(layer, params, x, masks.token)


def _shared_bias(layer: EncoderLayer | DecoderLayer, stack: str, shared, length: int) -> jax.Array | None:
    """Position bias that all layers of a stack share [heads, length, length]; None in scanned models."""
    if layer.config.relpos_per_layer:
        return None
    bias = RelativePositionBias(layer.config, stack == "encoder", layer.dtype)
    positions = jnp.arange(length)
    found: Any = bias.apply({"params": shared[stack]["relpos_bias"]}, positions, positions)
    return found


def _mlp_or_route(layer, params, x, token_mask) -> tuple[jax.Array, jax.Array | None, Routing | None]:
    """A dense layer's MLP is applied; a sparse layer's input and routing are returned instead."""
    if not layer.sparse:
        return layer.apply(params, x, token_mask, None, method="mlp_half"), None, None
    h = layer.apply(params, x, token_mask, method="mlp_input")
    return x, h, layer.apply(params, h, method="route")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _norm(config: ModelConfig, dtype, params, x):
    params = {"params": params["encoder"]["encoder_norm"]}
    return RMSNorm(config.d_model, dtype).apply(params, x)


@functools.partial(jax.jit, static_argnums=0)
def _losses(model: SwitchTransformer, params, x, tokens):
    """Summed cross-entropy of each document [batch], one document's logits in memory at a time."""
    _, inputs, targets = tokens
    token_mask = decoder_token_mask(inputs)[..., None].astype(model.dtype)
    y = model.apply({"params": params}, x, token_mask, method=lambda m, x, mask: m.decoder.finish(x, mask))

    def document(args):
        y, targets = args
        logits = model.apply({"params": params}, y[None], method="logits")[0]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(jnp.where(targets > 0, loss, 0.0))

    return jax.lax.map(document, (y, targets))
