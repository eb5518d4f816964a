"""The stack of a decoder-only mixture of experts; a family says which attention and which router its layers have.

Every layer offers its parts as methods, so that a model larger than memory can be run layer by layer with the same
code; see `stream`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from qmoe_jax.models.common import Kernel, as_tokens
from qmoe_jax.models.decoder.attention import Memory, visible
from qmoe_jax.models.decoder.cache import LayerCache
from qmoe_jax.models.decoder.config import DecoderConfig
from qmoe_jax.models.decoder.layers import ExpertKernels, GatedMlp, RMSNorm
from qmoe_jax.models.decoder.routing import Router
from qmoe_jax.models.expert_parallel import shard_batch
from qmoe_jax.models.experts import apply_experts
from qmoe_jax.models.family import Routing


class MoeMlp(nn.Module):
    """Experts, their router, and possibly a shared expert beside them, added as it is."""

    config: DecoderConfig
    router: Router
    dtype: jnp.dtype
    mesh: Mesh | None = None

    def setup(self):
        c = self.config
        self.experts = ExpertKernels(c.num_experts, c.d_model, c.d_ff, bool(c.expert.biases))
        if c.shared_width:
            self.shared_experts = GatedMlp(c.d_model, c.shared_width, self.dtype)

    def shared(self, h: jax.Array) -> jax.Array:
        """What every token gets: zeros where there is no shared expert."""
        return self.shared_experts(h) if self.config.shared_width else jnp.zeros_like(h)

    def route(self, h: jax.Array) -> Routing:
        """Routing [batch, length, choices] of h [batch, length, d_model]."""
        return self.router(h)

    def __call__(self, h: jax.Array, real: jax.Array | None) -> jax.Array:
        """h [batch, length, d_model] -> the same shape. Tokens that aren't `real` [batch, length] go to no expert."""
        expert, gate = self.route(h)
        if real is not None:
            expert = jnp.where(real[..., None], expert, self.config.num_experts)
            gate = jnp.where(real[..., None], gate, 0.0)
        routing = Routing(*(r.reshape(-1, r.shape[-1]) for r in (expert, gate)))
        y = apply_experts(
            self.config.expert, h.reshape(-1, h.shape[-1]), routing, self.experts.kernels(), self.mesh
        ).reshape(h.shape)
        self.sow("intermediates", "expert_index", expert)
        self.sow("intermediates", "combine_weight", gate)
        return y + self.shared(h)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      config: the architecture.
      sparse: whether it has experts.
      window: how many tokens a query sees, None: all before it.
      dtype: of activations.
      mesh: over whose devices the experts are.
    """

    config: Any
    sparse: bool
    window: int | None
    dtype: jnp.dtype = jnp.float32
    mesh: Mesh | None = None

    def attention(self) -> nn.Module:
        """The family's, see `attention`."""
        raise NotImplementedError

    def router(self) -> Router:
        """The family's."""
        raise NotImplementedError

    def setup(self):
        c = self.config
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(c.d_model, c.norm_eps, self.dtype) for _ in range(2)
        )
        self.self_attn = self.attention()
        mlp: Any  # One of the two, which are called with other arguments.
        if self.sparse:
            mlp = MoeMlp(c, self.router(), self.dtype, self.mesh)
        else:
            mlp = GatedMlp(c.d_model, c.dense_width, self.dtype)
        self.mlp = mlp

    def attend(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, Memory]:
        """x + attention(norm(x)) for whole texts x [batch, length, d_model]; and the memory that it leaves."""
        h = self.input_layernorm(x)
        memory = self.self_attn.memory(h, positions)
        return x + self.self_attn(h, positions, memory, visible(positions, positions, self.window)), memory

    def mlp_half(self, x: jax.Array, real: jax.Array | None) -> jax.Array:
        """x + mlp(norm(x))."""
        h = self.mlp_input(x)
        return x + (self.mlp(h, real) if self.sparse else self.mlp(h))

    def mlp_input(self, x: jax.Array) -> jax.Array:
        return self.post_attention_layernorm(x)

    def before_experts(self, x: jax.Array) -> tuple[jax.Array, jax.Array, Routing]:
        """Of a sparse layer: x with all but its experts' outputs, these experts' input, and the routing."""
        h = self.mlp_input(x)
        return x + self.mlp.shared(h), h, self.mlp.route(h)

    def __call__(self, x: jax.Array, positions: jax.Array, real: jax.Array | None = None) -> jax.Array:
        return self.mlp_half(self.attend(x, positions)[0], real)

    def fill(self, x: jax.Array, positions: jax.Array, lengths: jax.Array, slots: int) -> tuple[jax.Array, LayerCache]:
        """The layer on prompts of these lengths, int32 [batch], and a cache of them for texts of up to `slots`."""
        x, memory = self.attend(x, positions)
        slots = slots if self.window is None else min(slots, self.window)
        return self.mlp_half(x, positions < lengths[:, None]), LayerCache.of(memory, lengths, slots)

    def step(self, x: jax.Array, positions: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """One more token of each row: x [batch, 1, d_model] at positions int32 [batch, 1]."""
        h = self.input_layernorm(x)
        cache = cache.put(self.self_attn.memory(h, positions), positions)
        seen = visible(positions, cache.positions, self.window)
        return self.mlp_half(x + self.self_attn(h, positions, cache.memory, seen), None), cache


class Embedding(nn.Module):
    """Rows [vocabulary, d_model], also used for tied logits."""

    shape: tuple[int, int]
    dtype: jnp.dtype

    def setup(self):
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), self.shape, jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[tokens].astype(self.dtype)

    def logits(self, y: jax.Array) -> jax.Array:
        return jnp.matmul(y.astype(jnp.float32), self.embedding.astype(jnp.float32).T, precision="highest")


class Stack(nn.Module):
    """Embedding, layers, norm."""

    config: DecoderConfig
    make_layer: type[DecoderLayer]
    dtype: jnp.dtype
    mesh: Mesh | None = None

    def setup(self):
        c = self.config
        self.embed_tokens = Embedding((c.vocab_size, c.d_model), self.dtype)
        self.layers = [
            self.make_layer(c, c.is_sparse(i), c.window(i), self.dtype, self.mesh) for i in range(c.num_layers)
        ]
        self.norm = RMSNorm(c.d_model, c.norm_eps, self.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return shard_batch(self.embed_tokens(tokens), self.mesh)

    def __call__(self, tokens: jax.Array, lengths: jax.Array | None) -> jax.Array:
        positions = jnp.arange(tokens.shape[1])[None]
        real = None if lengths is None else positions < lengths[:, None]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, positions, real)
            self.sow("intermediates", "hidden", x)
        return self.norm(x)

    def fill(self, tokens: jax.Array, lengths: jax.Array, slots: int) -> tuple[jax.Array, list[LayerCache]]:
        positions, x, caches = jnp.arange(tokens.shape[1])[None], self.embed(tokens), []
        for layer in self.layers:
            x, cache = layer.fill(x, positions, lengths, slots)
            caches.append(cache)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)  # [batch, 1, d_model]
        return self.norm(last), caches

    def step(
        self, tokens: jax.Array, positions: jax.Array, caches: Sequence[LayerCache]
    ) -> tuple[jax.Array, list[LayerCache]]:
        x, new = self.embed(tokens[:, None]), []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.step(x, positions[:, None], cache)
            new.append(cache)
        return self.norm(x), new


class Decoder(nn.Module):
    """A decoder-only mixture of experts. A family's model is a subclass that says what its layers are.

    Attributes:
      config: architecture.
      dtype: activations; routers, softmaxes, norms' statistics and logits are always float32.
      mesh: over whose devices the experts, and the batch where it divides evenly, are; None: one device. For inference.
        Parameters are placed by `load`.
    """

    config: Any
    dtype: jnp.dtype = jnp.float32
    mesh: Mesh | None = None

    Layer: ClassVar[type[DecoderLayer]]

    def setup(self):
        c = self.config
        self.model = Stack(c, self.Layer, self.dtype, self.mesh)
        if not c.tied:
            self.lm_head = Kernel((c.d_model, c.vocab_size), c.d_model)

    def logits(self, y: jax.Array) -> jax.Array:
        """Float32 logits [batch, length, vocabulary] of the normed output of the last layer."""
        if self.config.tied:
            return self.model.embed_tokens.logits(y)
        return jnp.matmul(y.astype(jnp.float32), self.lm_head().astype(jnp.float32), precision="highest")

    def __call__(self, tokens: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Logits float32 [batch, length, vocabulary] of int32 tokens [batch, length], of which `lengths` are real."""
        return self.logits(self.model(tokens, lengths))

    def fill(self, tokens: jax.Array, lengths: jax.Array, slots: int) -> tuple[jax.Array, list[LayerCache]]:
        """Logits [batch, vocabulary] after prompts [batch, length] of these lengths, and caches for `step`.

        Args:
          tokens: int32 [batch, length], padded on the right.
          lengths: int32 [batch], at least 1.
          slots: longest text there will be, prompt included.
        """
        y, caches = self.model.fill(tokens, lengths, slots)
        return self.logits(y)[:, 0], caches

    def step(
        self, tokens: jax.Array, positions: jax.Array, caches: Sequence[LayerCache]
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Logits [batch, vocabulary] after one more token of each row, int32 [batch], at its position [batch]."""
        y, caches = self.model.step(tokens, positions, caches)
        return self.logits(y)[:, 0], list(caches)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens, lengths):
    return model.apply({"params": params}, tokens, lengths)


def forward(model: Decoder, params: Any, tokens: jax.Array, lengths: ArrayLike | None = None) -> jax.Array:
    """Logits, float32 [batch, length, vocabulary].

    Args:
      model: from `load`.
      params: from `load`.
      tokens: int32 [batch, length].
      lengths: int32 [batch], how many of each row's tokens are real, the others padding after them, whose logits mean
        nothing; None: all are.

    Raises:
      ValueError: tokens or lengths of wrong shape, or out of range.
    """
    tokens = as_tokens("tokens", tokens, model.config.vocab_size)
    return _forward(model, params, tokens, None if lengths is None else as_lengths(lengths, tokens))


def as_lengths(lengths: ArrayLike, tokens: jax.Array) -> jax.Array:
    """Lengths as int32 [batch]. Raises ValueError unless they are from 1 to the tokens' length."""
    found = jnp.asarray(lengths)
    batch, most = tokens.shape
    if found.shape != (batch,) or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(f"lengths: {found.dtype} {list(found.shape)}, expected integers [{batch}].")
    if not isinstance(found, jax.core.Tracer) and not 1 <= int(found.min()) <= int(found.max()) <= most:
        raise ValueError(f"lengths: found {int(found.min())} to {int(found.max())}, expected 1 to {most}.")
    return found.astype(jnp.int32)
