"""What the original model predicts: for every token its likeliest k tokens, and how likely all others are together.

Log probabilities in float16; their error, at most 2^-11 of a log probability, is far below what training can tell.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.models.family import Example, Task


class Predictions(NamedTuple):
    """Of all predicted tokens of all examples, end to end.

    Attributes:
      log_p: float16 [predicted, k + 1]: of the likeliest k tokens, falling; last, of all others together.
      tokens: int32 [predicted, k].
    """

    log_p: np.ndarray
    tokens: np.ndarray


class Targets(NamedTuple):
    """`Predictions` of a batch, [rows, length, ...], and which positions predict a token, bool [rows, length]."""

    log_p: np.ndarray
    tokens: np.ndarray
    real: np.ndarray


def empty(predicted: int, k: int) -> Predictions:
    """Room for so many."""
    return Predictions(np.zeros((predicted, k + 1), np.float16), np.zeros((predicted, k), np.int32))


def positions(predicted: np.ndarray, examples: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where predictions are that belong to rows of a batch.

    Args:
      predicted: int [all examples], how many tokens of each are predicted.
      examples: int [rows], which example a row holds; -1: none.
      length: positions of a row; the first ones predict.

    Returns:
      Rows of `Predictions`, and which positions predict a token, both [rows, length].
    """
    starts, steps = np.concatenate([[0], np.cumsum(predicted)]), np.arange(length)
    real = steps < np.where(examples >= 0, predicted[examples], 0)[:, None]
    return np.where(real, starts[examples][:, None] + steps, 0), real


def predict(
    model: Any, params: Any, task: Task, examples: Sequence[Example], tokens_per_batch: int, into: Predictions
) -> Iterator[None]:
    """Fills `into` with what a model predicts; yields after each batch.

    Args:
      model, params: as `load` gives them.
      task: of the model's family.
      examples: all that `into` has room for.
      tokens_per_batch: most tokens of a batch.
      into: is written to.
    """
    for batch in task.batches(examples, tokens_per_batch):
        log_p, tokens = _top(model, params, task.inputs(batch.tokens), into.tokens.shape[-1])
        rows, real = positions(task.predicted(examples), batch.indices, log_p.shape[1])
        into.log_p[rows[real]], into.tokens[rows[real]] = np.asarray(log_p)[real], np.asarray(tokens)[real]
        yield


@functools.partial(jax.jit, static_argnums=(0, 3))
def _top(model, params, inputs, k):
    log_p = jax.nn.log_softmax(model.apply({"params": params}, *inputs))  # [rows, length, vocabulary]
    top, tokens = jax.lax.top_k(log_p, k)
    others = jnp.log(jnp.clip(1 - jnp.exp(top).sum(-1, keepdims=True), 1e-7))
    return jnp.concatenate([top, others], -1).astype(jnp.float16), tokens.astype(jnp.int32)


def divergence(logits: jax.Array, log_p: jax.Array, tokens: jax.Array) -> jax.Array:
    """KL(teacher || model) [...] in nats, over the teacher's likeliest k tokens, and all others as if they were one.

    At most the divergence over the whole vocabulary, which it is where k is the vocabulary's size.

    Args:
      logits: float32 [..., vocabulary], the model's.
      log_p: [..., k + 1], the teacher's.
      tokens: int32 [..., k].
    """
    log_q = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens, axis=-1)
    log_p = log_p.astype(jnp.float32)
    if tokens.shape[-1] == logits.shape[-1]:
        log_p = log_p[..., :-1]
    else:
        others = jnp.log(jnp.clip(1 - jnp.exp(log_q).sum(-1, keepdims=True), 1e-7))
        log_q = jnp.concatenate([log_q, others], -1)
    log_p = jax.nn.log_softmax(log_p)  # They add up to one again, after rounding.
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
