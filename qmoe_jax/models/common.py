"""What the modules of all families share: stored parameters, attention, token ids, batches, the next token."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

MOST_TOKENS = 1_000_000  # that a text may have; caches have room for all of them
MASKED = -1e10  # Finite: a query whose keys are all masked attends uniformly, as in T5X.


# --- Parameters -------------------------------------------------------------------------------------------------------


def fan_in_normal(fan_in: int) -> nn.initializers.Initializer:
    """Normal initialiser with variance 1 / fan_in."""
    return nn.initializers.normal(fan_in**-0.5)


def stored(module: nn.Module, name: str, shape: tuple[int, ...], fan_in: int) -> Any:
    """A module's parameter as it is stored. For use in a compact method.

    A stored value that is no array (compressed experts) is returned as well, which `self.param` would refuse.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, fan_in_normal(fan_in), shape, jnp.float32)


class Kernel(nn.Module):
    """A parameter called 'kernel' under this module's name, see `stored`."""

    shape: tuple[int, ...]
    fan_in: int

    @nn.compact
    def __call__(self):
        return stored(self, "kernel", self.shape, self.fan_in)


# --- Attention --------------------------------------------------------------------------------------------------------


def mixed(logits: jax.Array, values: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
    """softmax(logits) values.

    The sums are divided after the product, as there are fewer of them than weights; and XLA's fusion for CPUs makes one
    slow kernel of a softmax and a product that follows it.

    Args:
      logits: [..., queries, keys], heads before queries; -inf for keys that aren't seen.
      values: [..., keys, width], of the dtype of the result; axes before broadcast to those of `logits`.
      sinks: one more logit for each query, [..., 1], whose weight is left out: the others sum up to less than 1.

    Returns:
      [..., queries, width].
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(top if sinks is None else jnp.maximum(top, sinks))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True, dtype=jnp.float32)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    weights = weights.astype(values.dtype)
    y = jnp.matmul(weights, values, precision="highest", preferred_element_type=jnp.float32)
    return (y / total).astype(values.dtype)


# --- Tokens -----------------------------------------------------------------------------------------------------------


def as_tokens(name: str, tokens: Any, vocab_size: int) -> jax.Array:
    """Token ids as int32 [batch, length].

    Raises ValueError for other shapes, other kinds of numbers and, outside `jit`, ids that the embedding doesn't have:
    JAX would read another row for them.
    """
    traced = isinstance(tokens, jax.core.Tracer)
    try:
        tokens = tokens if traced else np.asarray(tokens)
    except ValueError as e:
        raise ValueError(f"{name}: rows of different lengths, expected token ids, int32 [batch, length].") from e
    if tokens.ndim == 2 and tokens.shape[1] == 0:
        raise ValueError(f"{name}: shape {list(tokens.shape)}, expected at least one token in a row.")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name}: {tokens.dtype} {list(tokens.shape)}, expected token ids, int32 [batch, length].")
    if not traced and tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"{name}: found ids from {tokens.min()} to {tokens.max()}, expected 0 to {vocab_size - 1}.")
    return jnp.asarray(tokens, jnp.int32)


# --- Batches ----------------------------------------------------------------------------------------------------------


def shapes(
    lengths: Sequence[int], multiple: int, most_rows: Callable[[int, list[int]], int]
) -> Iterator[tuple[int, int, list[int]]]:
    """Which examples are padded to which length, in batches of how many rows: few shapes, as programs are compiled for
    each.

    Where there are too few examples of a rounded length for one batch, they join the next longer ones.

    Args:
      lengths: of the examples.
      multiple: to which lengths are rounded up.
      most_rows: of a batch of such a length, and of these examples; 1 is taken for less.

    Returns:
      (length, rows, examples) by length; rows is a power of two, and the batches but the last one are full.
    """
    groups: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        groups.setdefault(max(-(-n // multiple), 1) * multiple, []).append(i)
    members: list[int] = []
    for length, own in sorted(groups.items()):
        members = members + own
        rows = 1 << (max(most_rows(length, members), 1).bit_length() - 1)
        if len(members) < rows and length < max(groups):
            continue
        while rows >= 2 * len(members):
            rows //= 2
        yield length, rows, members
        members = []


# --- The next token ---------------------------------------------------------------------------------------------------


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array | float, top_p: float) -> jax.Array:
    """One token per row of logits [batch, vocabulary]: int32 [batch].

    Args:
      logits: float32.
      key: PRNG key; unused when greedy.
      temperature: divides the logits; 0 takes the likeliest token. It may be traced: one program serves all.
      top_p: draw from the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020).
    """

    def likeliest():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, lambda: _draw(logits / temperature, key, top_p), likeliest)


def _draw(logits: jax.Array, key: jax.Array, top_p: float) -> jax.Array:
    if top_p < 1:
        falling = jnp.sort(logits, axis=-1)[:, ::-1]
        p = jax.nn.softmax(falling)
        inside = jnp.cumsum(p, axis=-1) - p < top_p  # The likeliest token always is.
        least = jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, MASKED)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def check_sampling(temperature: float, top_p: float, key: jax.Array | None) -> None:
    """Raises ValueError for settings out of range, or for no key to sample with."""
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{name}: found {value!r}, expected a number.")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:  # Neither is NaN.
        raise ValueError(f"temperature {temperature}, top_p {top_p}: expected temperature >= 0 and 0 < top_p <= 1.")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature {temperature} samples, which needs a PRNG key.")


def finite(logits: jax.Array, ended: jax.Array) -> jax.Array:
    """Whether logits [batch, vocabulary] of all rows that haven't ended are: bool []."""
    return jnp.all(jnp.isfinite(logits).all(-1) | ended)


def check_finite_logits(fine: jax.Array) -> None:
    """Raises ValueError unless all logits were finite; another token would have been taken without a word."""
    if not isinstance(fine, jax.core.Tracer) and not bool(fine):
        raise ValueError(
            "Logits are NaN or Inf: no token can be chosen. Take float32 for activations, or look at the checkpoint."
        )


def check_length(name: str, found: Any) -> int:
    """A number of tokens. Raises TypeError for what is no whole number, ValueError for one that no text has."""
    try:
        number = operator.index(found)
    except TypeError as e:
        raise TypeError(f"{name}: found {found!r}, expected a whole number of tokens.") from e
    if not 1 <= number <= MOST_TOKENS:
        raise ValueError(f"{name}: found {number}, expected 1 to {MOST_TOKENS:,} tokens.")
    return number


def check_ids(vocab_size: int, **lists: Sequence[int]) -> None:
    """Raises ValueError that names the first of these lists with a token id that the model doesn't have."""
    for name, ids in lists.items():
        if not isinstance(ids, Sequence | np.ndarray) or any(not isinstance(i, int | np.integer) for i in ids):
            raise TypeError(f"{name}: found {reprlib.repr(ids)}, expected a list of token ids.")
        if any(not 0 <= i < vocab_size for i in ids):
            raise ValueError(f"{name} {tuple(ids)}: expected token ids from 0 to {vocab_size - 1}.")
