"""Trials for a target rate: a sample of rows of a layer's first experts, at several Lagrangians."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.quantization.account import entropy
from qmoe_jax.quantization.gptq import Quantized
from qmoe_jax.quantization.methods import Priced
from qmoe_jax.quantization.rate_control import TRIAL
from qmoe_jax.quantization.sharding import expert_sharding

# Rows are tried of so many experts, or of more that have so many weights.
TRIAL_EXPERTS = 4
TRIAL_WEIGHTS = 750_000
TRIAL_ROWS = 32  # of an expert for each Lagrangian, or more: what is stored beside them weighs little then


def trial_experts(num_experts: int, weights: int) -> int:
    """How many of a layer's experts are tried for a target rate; each has so many weights in a matrix.

    They are a group, or part of one: a number that divides all experts, if one is near, makes all groups alike.
    """
    enough = min(num_experts, max(TRIAL_EXPERTS, -(-TRIAL_WEIGHTS // weights)))
    return next((n for n in range(enough, 2 * enough) if num_experts % n == 0), enough)


def trial(
    method: Priced, W: jax.Array, H: jax.Array, importance: jax.Array, experts: int, codec: str | None
) -> tuple[float, Callable[[Sequence[float]], list[float]]]:
    """What a Lagrangian gives, of a few experts.

    Args:
      method: which is tried.
      W: [group, rows, columns], of which the first `experts` are taken.
      H: [group, columns, columns].
      importance: [group, rows].
      experts: how many.
      codec: by which bits are counted as stored; None: the entropy of the symbols is all that counts.

    Returns:
      A first guess; and rates(lagrangians), bits per weight at each of as many Lagrangians as a trial has.

    Raises ValueError for a smaller group.
    """
    if len(W) < experts:
        raise ValueError(
            f"The first group has {len(W)} experts, but {experts} are tried for target_bits: make it larger."
        )
    W, H, importance = jax.device_put((W[:experts], H[:experts], importance[:experts]), expert_sharding(experts))
    guess = 0.3 * np.float64(_weighted_mean_square(W, H, importance))
    # In place of all rows, the same few for each Lagrangian: shapes that the method is compiled for anyway.
    trials, rows = len(TRIAL), W.shape[1]
    tried = max(rows, trials * min(rows, TRIAL_ROWS))
    codes = np.arange(tried) * trials // tried
    counts, starts = np.bincount(codes), np.searchsorted(codes, np.arange(trials))
    taken = (np.arange(tried) - starts[codes]) * rows // counts[codes]  # those of one Lagrangian evenly spread
    W, importance = W[:, taken], importance[:, taken]

    def rates(lagrangians: Sequence[float]) -> list[float]:
        quantized = method.at(W, H, importance, np.array(lagrangians)[codes], codes)
        return [_rate(quantized, codes == i, codec) for i in range(trials)]

    return guess, rates


def _rate(quantized: Quantized, rows: np.ndarray, codec: str | None) -> float:
    """Bits per weight of these rows."""
    symbols, levels = (np.asarray(a)[:, rows] for a in (quantized.symbols, quantized.levels))
    if codec is None:
        return float(np.mean([entropy(s) for s in symbols]))
    return 8 * CompressedExperts.from_symbols(symbols, levels, codec).nbytes / symbols.size


@jax.jit
def _weighted_mean_square(W, H, importance) -> jax.Array:
    """What all experts lose if all their weights become zero, roughly, per weight."""
    return jnp.mean(importance[..., None] * jnp.diagonal(H, axis1=1, axis2=2)[:, None] * W**2)
