"""Text generation: cached incremental decoding, greedy or sampled, as one jitted loop."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

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
from qmoe_jax.models.switch.model import SwitchTransformer


def generate(
    model: SwitchTransformer,
    params: Any,
    encoder_input_tokens: jax.Array,
    *,
    max_length: int,
    prefix: Sequence[int] = (),
    stop: Sequence[int] = (1,),
    banned: Sequence[int] = (0,),
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Tokens that the decoder writes, int32 [batch, max_length]; 0 after a stop token.

    Args:
      model: the model.
      params: its parameters; experts may be compressed.
      encoder_input_tokens: int32 [batch, length], 0 is padding.
      max_length: most tokens written, prefix included.
      prefix: tokens that every row has to begin with.
      stop: a row ends with the first of these that it writes after the prefix.
      banned: tokens that are never written.
      temperature: see `common.sample`.
      top_p: see `common.sample`.
      key: PRNG key, needed when temperature > 0.

    Raises:
      ValueError: settings or token ids out of range, or no key to sample with; logits are NaN or Inf.
      TypeError: they are of another kind.
    """
    check_sampling(temperature, top_p, key)
    max_length = check_length("max_length", max_length)
    if max_length <= len(prefix):
        raise ValueError(f"max_length {max_length} leaves no room for {len(prefix)} prefix tokens and one more.")
    vocab_size = model.config.vocab_size
    check_ids(vocab_size, prefix=prefix, stop=stop, banned=banned)
    key = jax.random.key(0) if key is None else key
    tokens = as_tokens("encoder_input_tokens", encoder_input_tokens, vocab_size)
    settings = (max_length, tuple(prefix), tuple(stop), tuple(banned), float(top_p))
    written, fine = _generate(model, settings, params, tokens, float(temperature), key)
    check_finite_logits(fine)
    return written


def written(model: SwitchTransformer, params: Any, tokens: jax.Array, **options: Any) -> Iterator[np.ndarray]:
    """The tokens of `generate`, int32 [batch] each, when all are there."""
    yield from np.asarray(generate(model, params, tokens, **options)).T


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(model, settings, params, encoder_input_tokens, temperature, key):
    max_length, prefix, stop, banned, top_p = settings
    batch = encoder_input_tokens.shape[0]
    variables = {"params": params}
    caches = model.apply(variables, encoder_input_tokens, max_length, method="init_cache")
    forced = jnp.full(max_length, -1, jnp.int32).at[: len(prefix)].set(jnp.asarray(prefix, jnp.int32))

    def more(state):
        index, _, ended, _, _, _, _ = state
        return (index < max_length) & ~jnp.all(ended)

    def step(state):
        index, last, ended, written, caches, key, fine = state
        logits, caches = model.apply(variables, last, index, caches, encoder_input_tokens, method="step")
        fine &= finite(logits, ended)
        logits = logits.at[:, jnp.asarray(banned, jnp.int32)].set(MASKED)
        key, subkey = jax.random.split(key)
        token = sample(logits, subkey, temperature, top_p)
        token = jnp.where(forced[index] >= 0, forced[index], token)
        token = jnp.where(ended, 0, token)
        written = written.at[:, index].set(token)
        ended = ended | (jnp.isin(token, jnp.asarray(stop, jnp.int32)) & (forced[index] < 0))
        return index + 1, token, ended, written, caches, key, fine

    start = jnp.zeros(batch, jnp.int32)  # The decoder's first input is the padding token.
    ended, written, fine = jnp.zeros(batch, bool), jnp.zeros((batch, max_length), jnp.int32), jnp.bool_(True)
    state = (jnp.int32(0), start, ended, written, caches, key, fine)
    _, _, _, written, _, _, fine = jax.lax.while_loop(more, step, state)
    if model.mesh is not None:  # On every device, so that every process has it.
        whole = NamedSharding(model.mesh, PartitionSpec())
        written, fine = (jax.lax.with_sharding_constraint(x, whole) for x in (written, fine))
    return written, fine
