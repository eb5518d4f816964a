"""The Switch Transformer, with T5X's parameter names (Fedus et al. 2021; forward pass as T5X evaluates it).

    tokens -> embedding -> encoder layers -> norm -------------.
    tokens -> embedding -> decoder layers (attend to encoder) -+-> norm -> logits

Every layer offers its parts as methods (`attend`, `mlp_input`, ...), so that a model larger than memory can be run
layer by layer with the same code; see `stream`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qmoe_jax.models.common import Kernel, as_tokens
from qmoe_jax.models.expert_parallel import shard_batch
from qmoe_jax.models.switch.config import ModelConfig
from qmoe_jax.models.switch.layers import Attention, DenseMlp, RelativePositionBias, RMSNorm, mask_bias
from qmoe_jax.models.switch.routing import MoeMlp, Routing


class DecoderMasks(NamedTuple):
    """What the decoder may see. Additive biases, 0 or -1e10, and the 0/1 mask of real tokens."""

    token: jax.Array  # [batch, length, 1]
    self_bias: jax.Array  # [batch, 1, length, length]
    cross_bias: jax.Array  # [batch, 1, length, encoder length]


def encoder_masks(tokens: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Token mask [batch, length, 1] and additive attention bias [batch, 1, length, length] of encoder tokens."""
    real = tokens > 0
    return real[..., None].astype(dtype), mask_bias(real[:, :, None] & real[:, None, :], dtype)


def decoder_token_mask(inputs: jax.Array) -> jax.Array:
    """Where the decoder's normed inputs are kept, bool [batch, length]: input > 0, or next input > 0, or position 0."""
    follows = jnp.pad(inputs[:, 1:] > 0, ((0, 0), (0, 1)))
    return (inputs > 0) | follows | (jnp.arange(inputs.shape[1]) == 0)


def decoder_masks(
    encoder_tokens: jax.Array, inputs: jax.Array, targets: jax.Array | None, dtype: DTypeLike
) -> DecoderMasks:
    """T5X's decoder masks from encoder tokens, decoder inputs and decoder targets, each [batch, length].

    Attention looks at targets > 0. Without targets every position whose input is real counts as real.
    """
    position = jnp.arange(inputs.shape[1])
    token = decoder_token_mask(inputs)
    real = ((inputs > 0) | (position == 0)) if targets is None else targets > 0
    causal = position[:, None] >= position[None, :]
    self_mask = causal & real[:, :, None] & real[:, None, :]
    cross_mask = real[:, :, None] & (encoder_tokens > 0)[:, None, :]
    return DecoderMasks(token[..., None].astype(dtype), mask_bias(self_mask, dtype), mask_bias(cross_mask, dtype))


class Layer(nn.Module):
    """What encoder and decoder layers share: the MLP half and, in scanned models, a position bias of their own."""

    config: ModelConfig
    sparse: bool
    decoder: bool
    dtype: jnp.dtype
    mesh: Mesh | None = None

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.config.d_model, self.dtype)

    def setup_mlp(self) -> None:
        c = self.config
        self.pre_mlp_layer_norm = self._norm()
        mlp: Any  # One of the two, which are called with other arguments.
        if self.sparse:
            prioritized = c.batch_prioritized if c.batch_prioritized is not None else c.top_k > 1
            experts_choose = c.experts_choose is not None and not self.decoder  # They would see the future.
            mlp = MoeMlp(c, self.dtype, prioritized and not self.decoder, experts_choose, self.mesh)
        else:
            mlp = DenseMlp(c, dtype=self.dtype)
        self.mlp = mlp
        if c.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(c, not self.decoder, self.dtype)

    def position_bias(self, queries: jax.Array, keys: jax.Array, shared: jax.Array | None) -> jax.Array:
        """This layer's bias [heads, queries, keys]: the stack's shared one, or its own."""
        if self.config.relpos_per_layer:
            return self.relpos_bias(queries, keys)
        assert shared is not None
        return shared

    def mlp_input(self, x: jax.Array, token_mask: jax.Array) -> jax.Array:
        """The normed, masked input of the MLP."""
        return self.pre_mlp_layer_norm(x) * token_mask

    def mlp_half(self, x: jax.Array, token_mask: jax.Array, capacity_factor: float | None) -> jax.Array:
        """x + mlp(norm(x))."""
        h = self.mlp_input(x, token_mask)
        return x + (self.mlp(h, capacity_factor) if self.sparse else self.mlp(h))

    def route(self, h: jax.Array) -> Routing:
        """Routing of normed MLP inputs h [batch, length, d_model] of a sparse layer, no token dropped."""
        return self.mlp.route(h)


class EncoderLayer(Layer):
    def setup(self):
        self.pre_attention_layer_norm = self._norm()
        self.attention = Attention(self.config, self.dtype)
        self.setup_mlp()

    def attend(
        self, x: jax.Array, token_mask: jax.Array, attention_bias: jax.Array, shared_bias: jax.Array | None
    ) -> jax.Array:
        """x + attention(norm(x)) for x [batch, length, d_model]."""
        positions = jnp.arange(x.shape[1])
        h = self.pre_attention_layer_norm(x) * token_mask
        return x + self.attention(h, h, attention_bias + self.position_bias(positions, positions, shared_bias))

    def __call__(self, x, token_mask, attention_bias, shared_bias, capacity_factor):
        x = self.attend(x, token_mask, attention_bias, shared_bias)
        return self.mlp_half(x, token_mask, capacity_factor)


class LayerCache(NamedTuple):
    """Keys and values of one decoder layer, each [batch, length, heads, head_dim]."""

    keys: jax.Array
    values: jax.Array
    cross_keys: jax.Array
    cross_values: jax.Array


class DecoderLayer(Layer):
    def setup(self):
        self.pre_self_attention_layer_norm = self._norm()
        self.self_attention = Attention(self.config, self.dtype)
        self.pre_cross_attention_layer_norm = self._norm()
        self.encoder_decoder_attention = Attention(self.config, self.dtype)
        self.setup_mlp()

    def attend(self, x: jax.Array, encoded: jax.Array, masks: DecoderMasks, shared_bias: jax.Array | None) -> jax.Array:
        """x + self-attention, then + cross-attention to `encoded` [batch, encoder length, d_model]."""
        positions = jnp.arange(x.shape[1])
        h = self.pre_self_attention_layer_norm(x) * masks.token
        bias = masks.self_bias + self.position_bias(positions, positions, shared_bias)
        x = x + self.self_attention(h, h, bias)
        h = self.pre_cross_attention_layer_norm(x) * masks.token
        return x + self.encoder_decoder_attention(h, encoded, masks.cross_bias)

    def __call__(self, x, encoded, masks: DecoderMasks, shared_bias, capacity_factor):
        x = self.attend(x, encoded, masks, shared_bias)
        return self.mlp_half(x, masks.token, capacity_factor)

    def init_cache(self, encoded: jax.Array, length: int) -> LayerCache:
        """Empty self-attention cache for `length` steps, and the cross-attention's keys and values."""
        shape = (encoded.shape[0], length, self.config.num_heads, self.config.head_dim)
        empty = jnp.zeros(shape, self.dtype)
        return LayerCache(empty, empty, *self.encoder_decoder_attention.keys_and_values(encoded))

    def step(
        self, x: jax.Array, index: jax.Array, cache: LayerCache, cross_bias: jax.Array, shared_bias: jax.Array | None
    ) -> tuple[jax.Array, LayerCache]:
        """One position: x [batch, 1, d_model] at position `index` (traced)."""
        h = self.pre_self_attention_layer_norm(x)
        key, value = self.self_attention.keys_and_values(h)
        keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, key, index, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(cache.values, value, index, axis=1)
        positions = jnp.arange(keys.shape[1])
        bias = mask_bias((positions <= index)[None, None], self.dtype)
        bias = bias + self.position_bias(index[None], positions, shared_bias)
        x = x + self.self_attention.attend(h, keys, values, bias)
        h = self.pre_cross_attention_layer_norm(x)
        x = x + self.encoder_decoder_attention.attend(h, cache.cross_keys, cache.cross_values, cross_bias)
        x = self.mlp_half(x, jnp.ones((), self.dtype), None)
        return x, cache._replace(keys=keys, values=values)


class TokenEmbedder(nn.Module):
    """Embedding [vocabulary, d_model], also used for tied logits."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self):
        shape = (self.config.vocab_size, self.config.d_model)
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), shape, jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[tokens].astype(self.dtype)

    def logits(self, y: jax.Array) -> jax.Array:
        """y . embedding' / sqrt(d_model), in float32."""
        y = jnp.matmul(y.astype(jnp.float32), self.embedding.astype(jnp.float32).T, precision="highest")
        return y / self.config.d_model**0.5


class Encoder(nn.Module):
    config: ModelConfig
    dtype: jnp.dtype
    mesh: Mesh | None = None

    def setup(self):
        c = self.config
        self.layers = [
            EncoderLayer(c, i in c.encoder_sparse_layers, False, self.dtype, self.mesh)
            for i in range(c.num_encoder_layers)
        ]
        self.encoder_norm = RMSNorm(c.d_model, self.dtype)
        if not c.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(c, True, self.dtype)

    def shared_bias(self, length: int) -> jax.Array | None:
        """Position bias shared by all layers [heads, length, length]; None in scanned models."""
        if self.config.relpos_per_layer:
            return None
        return self.relpos_bias(jnp.arange(length), jnp.arange(length))

    def finish(self, x: jax.Array, token_mask: jax.Array) -> jax.Array:
        return self.encoder_norm(x) * token_mask

    def __call__(self, x, tokens, capacity_factor):
        token_mask, attention_bias = encoder_masks(tokens, self.dtype)
        shared_bias = self.shared_bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, token_mask, attention_bias, shared_bias, capacity_factor)
            self.sow("intermediates", "hidden", x)
        return self.finish(x, token_mask)


class Decoder(nn.Module):
    config: ModelConfig
    dtype: jnp.dtype
    mesh: Mesh | None = None

    def setup(self):
        c = self.config
        self.layers = [
            DecoderLayer(c, i in c.decoder_sparse_layers, True, self.dtype, self.mesh)
            for i in range(c.num_decoder_layers)
        ]
        self.decoder_norm = RMSNorm(c.d_model, self.dtype)
        if not c.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(c, False, self.dtype)
        if not c.tied:
            self.logits_dense = Kernel((c.d_model, c.vocab_size), c.d_model)

    def shared_bias(self, length: int) -> jax.Array | None:
        """Position bias shared by all layers [heads, length, length]; None in scanned models."""
        if self.config.relpos_per_layer:
            return None
        return self.relpos_bias(jnp.arange(length), jnp.arange(length))

    def finish(self, x: jax.Array, token_mask: jax.Array) -> jax.Array:
        return self.decoder_norm(x) * token_mask

    def untied_logits(self, y: jax.Array) -> jax.Array:
        return jnp.matmul(y.astype(jnp.float32), self.logits_dense().astype(jnp.float32), precision="highest")

    def __call__(self, x, encoded, masks: DecoderMasks, capacity_factor):
        shared_bias = self.shared_bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, encoded, masks, shared_bias, capacity_factor)
            self.sow("intermediates", "hidden", x)
        return self.finish(x, masks.token)

    def init_cache(self, encoded: jax.Array, length: int) -> list[LayerCache]:
        return [layer.init_cache(encoded, length) for layer in self.layers]

    def step(
        self, x: jax.Array, index: jax.Array, caches: list[LayerCache], cross_bias: jax.Array
    ) -> tuple[jax.Array, list[LayerCache]]:
        shared = None
        if not self.config.relpos_per_layer:
            shared = self.relpos_bias(index[None], jnp.arange(caches[0].keys.shape[1]))
        new = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.step(x, index, cache, cross_bias, shared)
            new.append(cache)
        return self.decoder_norm(x), new


class SwitchTransformer(nn.Module):
    """Encoder-decoder Switch Transformer.

    Attributes:
      config: architecture.
      dtype: activations; the router and the logits are always float32.
      mesh: over whose devices the experts, and the batch where it divides evenly, are; None: one device. For inference.
        Parameters are placed by `load`.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    mesh: Mesh | None = None

    def setup(self):
        self.token_embedder = TokenEmbedder(self.config, self.dtype)
        self.encoder = Encoder(self.config, self.dtype, self.mesh)
        self.decoder = Decoder(self.config, self.dtype, self.mesh)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return shard_batch(self.token_embedder(tokens), self.mesh)

    def logits(self, y: jax.Array) -> jax.Array:
        """Float32 logits [batch, length, vocabulary] of the decoder's final output."""
        return self.token_embedder.logits(y) if self.config.tied else self.decoder.untied_logits(y)

    def encode(self, tokens: jax.Array, capacity_factor: float | None = None) -> jax.Array:
        """Encoder output [batch, length, d_model] of tokens [batch, length]; 0 is padding."""
        return self.encoder(self.embed(tokens), tokens, capacity_factor)

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array | None = None,
        capacity_factor: float | None = None,
    ) -> jax.Array:
        """Logits float32 [batch, decoder length, vocabulary]; tokens are int32 [batch, length], 0 is padding."""
        encoded = self.encode(encoder_input_tokens, capacity_factor)
        self.sow("intermediates", "encoder_output", encoded)
        masks = decoder_masks(encoder_input_tokens, decoder_input_tokens, decoder_target_tokens, self.dtype)
        return self.logits(self.decoder(self.embed(decoder_input_tokens), encoded, masks, capacity_factor))

    def init_cache(self, encoder_input_tokens: jax.Array, length: int) -> list[LayerCache]:
        """Caches for `step`, from encoder tokens [batch, length] and the number of decoder positions."""
        return self.decoder.init_cache(self.encode(encoder_input_tokens), length)

    def step(
        self, tokens: jax.Array, index: jax.Array, caches: list[LayerCache], encoder_input_tokens: jax.Array
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Logits [batch, vocabulary] after the decoder input `tokens` [batch] at position `index`; the new caches."""
        cross_bias = mask_bias((encoder_input_tokens > 0)[:, None, :], self.dtype)
        y, caches = self.decoder.step(self.embed(tokens[:, None]), index, caches, cross_bias)
        return self.logits(y)[:, 0], caches


@functools.partial(jax.jit, static_argnames=("model", "capacity_factor"))
def _forward(model, params, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens, capacity_factor):
    tokens = (encoder_input_tokens, decoder_input_tokens, decoder_target_tokens)
    return model.apply({"params": params}, *tokens, capacity_factor=capacity_factor)


def forward(
    model: SwitchTransformer,
    params: Any,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array | None = None,
    capacity_factor: float | None = None,
) -> jax.Array:
    """Logits, float32 [batch, decoder length, vocabulary].

    Args:
      model: from `load`.
      params: from `load`.
      encoder_input_tokens: int32 [batch, length]; 0 is padding in all three.
      decoder_input_tokens: int32 [batch, decoder length], targets shifted right by one.
      decoder_target_tokens: int32 [batch, decoder length], which T5X makes its masks from; None: positions with a
        decoder input, and the first, are real.
      capacity_factor: T5X's evaluation capacity factor; None: no token is dropped.

    Raises:
      ValueError: token arrays don't fit each other, or hold ids that the model doesn't have.
    """
    given = {
        "encoder_input_tokens": encoder_input_tokens,
        "decoder_input_tokens": decoder_input_tokens,
        "decoder_target_tokens": decoder_target_tokens,
    }
    needed = {n: t for n, t in given.items() if t is not None or n != "decoder_target_tokens"}
    tokens = {n: as_tokens(n, t, model.config.vocab_size) for n, t in needed.items()}
    encoder, inputs = tokens["encoder_input_tokens"], tokens["decoder_input_tokens"]
    targets = tokens.get("decoder_target_tokens")
    if len(encoder) != len(inputs) or (targets is not None and targets.shape != inputs.shape):
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in tokens.items())
        raise ValueError(f"{shapes}: expected one batch size, and targets as long as the decoder's inputs.")
    return _forward(model, params, encoder, inputs, targets, capacity_factor)
