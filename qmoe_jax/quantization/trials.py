"""Trials for a target rate: a sample of rows of a layer's first experts, at several Lagrangians.

They also tell how many levels a matrix wants, where that isn't set: with as many as there can be, levels far out are
used by few weights or by none, and are left out of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.codecs import gap
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.quantization import grids
from qmoe_jax.quantization.account import entropy
from qmoe_jax.quantization.equal_steps import MOST_STEPS, narrowed
from qmoe_jax.quantization.hidden_units import most_used_first
from qmoe_jax.quantization.methods import Priced
from qmoe_jax.quantization.rate_control import TRIAL
from qmoe_jax.quantization.sharding import expert_sharding

# Rows are tried of so many experts, or of more that have so many weights.
TRIAL_EXPERTS = 4
TRIAL_WEIGHTS = 750_000
TRIAL_ROWS = 32  # of an expert for each Lagrangian, or more: what is stored beside them weighs little then
LEAST_USE = 1e-3  # share of weights beyond a level for which more levels are worth it


def trial_experts(num_experts: int, weights: int) -> int:
    """How many of a layer's experts are tried for a target rate; each has so many weights in a matrix.

    They are a group, or part of one: a number that divides all experts, if one is near, makes all groups alike.
    """
    enough = min(num_experts, max(TRIAL_EXPERTS, -(-TRIAL_WEIGHTS // weights)))
    return next((n for n in range(enough, 2 * enough) if num_experts % n == 0), enough)


def trial(
    method: Priced,
    W: jax.Array,
    H: jax.Array,
    importance: jax.Array,
    experts: int,
    codec: str | None,
    classes: int = 1,
) -> tuple[float, Callable[[Sequence[float]], list[float]], Callable[[float], int | None]]:
    """What a Lagrangian gives, of a few experts.

    Args:
      method: which is tried.
      W: [group, rows, columns], of which the first `experts` are taken.
      H: [group, columns, columns].
      importance: [group, rows].
      experts: how many.
      codec: by which bits are counted as stored; None: the entropy of the symbols is all that counts.
      classes: of columns; with several, columns are in order of use.

    Returns:
      A first guess; rates(lagrangians), bits per weight at each of as many Lagrangians as a trial has; and, after
      these, steps(lagrangian), how many levels on either side a matrix wants; None where the method has settled it.

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

    chosen = getattr(method, "steps", 0) is None
    wanted: dict[float, int] = {}  # steps, by Lagrangian

    def rates(lagrangians: Sequence[float]) -> list[float]:
        quantized = method.at(W, H, importance, np.array(lagrangians)[codes], codes)
        quantized = quantized._replace(symbols=np.asarray(quantized.symbols), levels=np.asarray(quantized.levels))
        parts = [
            quantized._replace(symbols=quantized.symbols[:, codes == i], levels=quantized.levels[:, codes == i])
            for i in range(trials)
        ]
        if chosen:
            for i, lagrangian in enumerate(lagrangians):
                wanted[lagrangian] = _steps_in_use(parts[i].symbols)
                parts[i] = narrowed(parts[i], wanted[lagrangian])
        symbols = [part.symbols for part in parts]
        if classes > 1:
            symbols = _in_order_of_use(symbols)
        return [_rate(s, part.levels, codec, classes) for s, part in zip(symbols, parts, strict=True)]

    def steps(lagrangian: float) -> int | None:
        if not chosen:
            return None
        return wanted[min(wanted, key=lambda tried: abs(np.log(tried / lagrangian)))]

    return guess, rates, steps


def _steps_in_use(symbols: np.ndarray) -> int:
    """The least number of levels on either side beyond which there are hardly any weights."""
    number = np.abs(np.arange(-MOST_STEPS, MOST_STEPS + 1))
    counts = np.bincount(symbols.reshape(-1), minlength=len(number))
    counts = np.concatenate([counts[1 : MOST_STEPS + 1], counts[:1], counts[MOST_STEPS + 1 :]])  # -K .. K
    use = [counts[number > k].sum() / symbols.size for k in range(1, MOST_STEPS)]
    return next((k for k, share in enumerate(use, start=1) if share < LEAST_USE), MOST_STEPS)


def _in_order_of_use(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Symbols [experts, rows, columns] of rows at each Lagrangian, columns sorted by their use in the others' rows.

    By a few rows' own use they would seem more unlike than those of all rows are.
    """
    counts = np.stack([np.count_nonzero(part, axis=1) for part in parts])  # [trials, experts, columns]
    orders = most_used_first(counts.sum(0) - counts)
    return [np.take_along_axis(part, order[:, None], 2) for part, order in zip(parts, orders, strict=True)]


def _rate(symbols: np.ndarray, levels: np.ndarray, codec: str | None, classes: int) -> float:
    """Bits per weight of these rows."""
    if codec is None:
        return float(np.mean([entropy(s) for s in symbols]))
    levels = np.asarray(grids.without_unused(symbols, levels))
    nbytes = CompressedExperts.from_symbols(symbols, levels, codec, classes).nbytes
    # A whole matrix has as many blocks as one without classes, of as many more rows.
    experts, rows, _ = symbols.shape
    if classes > 1:
        more = classes * -(-rows // (gap.BLOCK_ROWS * classes)) - -(-rows // gap.BLOCK_ROWS)
        nbytes -= 4 * experts * more
    return 8 * nbytes / symbols.size


@jax.jit
def _weighted_mean_square(W, H, importance) -> jax.Array:
    """What all experts lose if all their weights become zero, roughly, per weight."""
    return jnp.mean(importance[..., None] * jnp.diagonal(H, axis1=1, axis2=2)[:, None] * W**2)
