"""Text generation: prompts of different lengths in one batch, then token by token with a cache, greedy or sampled."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from qmoe_jax.models.common import (
    MASKED,
    as_tokens,
    check_finite_logits,
    check_ids,
    check_length,
    check_sampling,
    finite,
    sample,
)
from qmoe_jax.models.decoder.cache import LayerCache
from qmoe_jax.models.decoder.model import Decoder, as_lengths


class Settings(NamedTuple):
    """How the next token is chosen, and when a row ends; see `generate`."""

    stop: tuple[int, ...]
    banned: tuple[int, ...]
    temperature: float
    top_p: float
    pad: int


class State(NamedTuple):
    """Of texts that are being written.

    Attributes:
      token: int32 [batch], each row's last, not yet in the caches.
      positions: int32 [batch], where it is in its text.
      ended: bool [batch].
      caches: of the layers.
      key: for the tokens to come.
      fine: bool [], whether all logits were finite.
    """

    token: jax.Array
    positions: jax.Array
    ended: jax.Array
    caches: list[LayerCache]
    key: jax.Array
    fine: jax.Array


def generate(model: Decoder, params: Any, tokens: ArrayLike, *, max_length: int, **options: Any) -> jax.Array:
    """Tokens that the model writes after its prompts, int32 [batch, max_length]; `pad` after a stop token.

    Args:
      model: the model.
      params: its parameters; experts may be compressed.
      tokens: prompts, int32 [batch, length], padded on the right.
      max_length: most tokens written.
      **options: see `prepared`: lengths, stop, banned, temperature, top_p, key, pad.

    Raises:
      ValueError: settings or token ids out of range, or no key to sample with; logits are NaN or Inf.
      TypeError: they are of another kind.
    """
    settings, key, prompts, lengths = prepared(model, tokens, max_length, **options)
    written, fine = _generate(model, settings, int(max_length), params, prompts, lengths, key)
    check_finite_logits(fine)
    return written


def written(model: Decoder, params: Any, tokens: ArrayLike, *, max_length: int, **options: Any) -> Iterator[np.ndarray]:
    """The same tokens as `generate`, one by one as they come: int32 [batch] each, until all rows have ended."""
    settings, key, prompts, lengths = prepared(model, tokens, max_length, **options)
    slots = prompts.shape[1] + max_length
    state = _begin(model, settings, slots, params, prompts, lengths, key)
    for i in range(max_length):
        check_finite_logits(state.fine)
        yield np.asarray(state.token)
        if i + 1 == max_length or np.asarray(state.ended).all():
            return
        state = _next(model, settings, params, state)


def prepared(
    model: Decoder,
    tokens: ArrayLike,
    max_length: int,
    *,
    lengths: ArrayLike | None = None,
    stop: Sequence[int] | None = None,
    banned: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    pad: int = 0,
) -> tuple[Settings, jax.Array, jax.Array, jax.Array]:
    """Arguments of `generate`, checked: settings, key, prompts and their lengths.

    Args:
      model: the model.
      tokens: prompts, int32 [batch, length], padded on the right.
      max_length: most tokens written.
      lengths: int32 [batch], how many tokens of each prompt are real; None: all.
      stop: a row ends with the first of these that it writes; None: the model's own.
      banned: tokens that are never written.
      temperature: see `common.sample`.
      top_p: see `common.sample`.
      key: PRNG key, needed when temperature > 0.
      pad: what is written after a row's end.

    Raises:
      ValueError: settings or token ids out of range, or no key to sample with.
    """
    check_sampling(temperature, top_p, key)
    check_length("max_length", max_length)
    stop = model.config.eos if stop is None else tuple(stop)
    check_ids(model.config.vocab_size, stop=stop, banned=banned, pad=(pad,))
    prompts = as_tokens("tokens", tokens, model.config.vocab_size)
    if lengths is None:
        lengths = np.full(prompts.shape[0], prompts.shape[1], np.int32)
    key = jax.random.key(0) if key is None else key
    settings = Settings(stop, tuple(banned), float(temperature), float(top_p), pad)
    return settings, key, prompts, as_lengths(lengths, prompts)


def _choose(model: Decoder, settings: Settings, logits, ended, key) -> tuple[jax.Array, ...]:
    """The next tokens [batch], which rows have ended after them, a new key, and whether logits are finite."""
    fine = finite(logits, ended)
    key, own = jax.random.split(key)
    logits = logits.at[:, jnp.asarray(settings.banned, jnp.int32)].set(MASKED)
    token = jnp.where(ended, settings.pad, sample(logits, own, settings.temperature, settings.top_p))
    ended = ended | jnp.isin(token, jnp.asarray(settings.stop, jnp.int32))
    return _everywhere(model, token), _everywhere(model, ended), key, _everywhere(model, fine)


def _everywhere(model: Decoder, x: jax.Array) -> jax.Array:
    """On every device, so that every process has it."""
    whole = model.mesh and NamedSharding(model.mesh, PartitionSpec())
    return x if whole is None else jax.lax.with_sharding_constraint(x, whole)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(model, settings, slots, params, prompts, lengths, key) -> State:
    """The first token after the prompts, for texts of up to `slots` tokens."""
    logits, caches = model.apply({"params": params}, prompts, lengths, slots, method="fill")
    token, ended, key, fine = _choose(model, settings, logits, jnp.zeros(len(lengths), bool), key)
    return State(token, lengths, ended, caches, key, fine)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next(model, settings, params, state: State) -> State:
    """One more token."""
    logits, caches = model.apply({"params": params}, state.token, state.positions, state.caches, method="step")
    token, ended, key, fine = _choose(model, settings, logits, state.ended, state.key)
    return State(token, state.positions + 1, ended, caches, key, state.fine & fine)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(model, settings, max_length, params, prompts, lengths, key):
    state = _begin(model, settings, prompts.shape[1] + max_length, params, prompts, lengths, key)
    out = jnp.full((len(lengths), max_length), settings.pad, jnp.int32).at[:, 0].set(state.token)

    def more(carry):
        i, state, _ = carry
        return (i < max_length) & ~jnp.all(state.ended)

    def step(carry):
        i, state, out = carry
        state = _next(model, settings, params, state)
        return i + 1, state, out.at[:, i].set(state.token)

    _, state, out = jax.lax.while_loop(more, step, (jnp.int32(1), state, out))
    return _everywhere(model, out), _everywhere(model, state.fine)
