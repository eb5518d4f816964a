"""GPTQ that pays for bits: rounding by rate and distortion, and levels that are fitted rather than extreme.

The paper's grid is {row minimum, 0, row maximum}, rounded at half; its entropy is what it is. Here the three levels are
free, and a symbol is chosen by what it costs. Of each expert's matrix, with L the factor of H^-1 as in GPTQ:

    start    levels and symbol frequencies by entropy-constrained scalar quantization (Chou, Lookabaugh and Gray 1989)
             of each row, a column's errors weighted by 1 / L[i, i]^2
    round    GPTQ's column loop with  symbol = argmin_s (w - level_s)^2 / L[i, i]^2 + lambda bits(s)
    refit    levels of each row = argmin (w - q) H (w - q)' for its pattern of symbols: two linear equations
    round and refit once more

With one Lagrangian lambda everywhere, the last bit spent buys equally much in every matrix of the model.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qmoe_jax.quantization import equal_steps
from qmoe_jax.quantization.gptq import (
    LEAST_DAMPING,
    Quantized,
    check_matrices,
    factor,
    in_blocks,
    matmul,
    sum_columns,
    sum_in_order,
    sweep,
)
from qmoe_jax.quantization.grids import coarse

# Where the start begins: levels in standard deviations of the row, share of zeros.
START_LEVEL = 1.6
START_ZEROS = 0.85
START_STEPS = 4
# Shares of zeros that bits are computed for; beyond, a matrix would never come back from all zeros.
LEAST_ZEROS, MOST_ZEROS = 0.02, 0.9995


class _Rates(NamedTuple):
    """Bits that a symbol costs under the entropy of its code's symbols: of zero, and of either level. [rows]."""

    zero: jax.Array
    level: jax.Array


def rate_distortion(
    W: jax.Array,  # [experts, rows, columns]
    H: jax.Array,  # [experts, columns, columns]
    lagrangian: jax.Array,  # [experts, rows]
    *,
    codes: jax.Array | None = None,  # [rows]
    steps: int | None = None,
    refits: int = 2,
    descents: int = 2,
    level_bits: int = 3,
    block_size: int = 128,
    damping: float = 0.1,
    activation_order: bool = False,
) -> Quantized:
    """Matrices with little tr (W - Q) H (W - Q)' + lagrangian * bits(symbols).

    Experts never mix: inputs sharded over their first axis stay so, without any collective.

    Args:
      W: weights, rows are outputs. Computed in float32.
      H: Hessians, as `gptq` takes them; their scale sets that of `lagrangian`.
      lagrangian: squared error, as H measures it, that one bit is worth; for each row.
      codes: int, below rows: rows of an expert with the same number are coded together, and bits are counted by the
        entropy of their symbols. None: all rows.
      steps: levels at equal steps, so many on either side of zero, from 1 to 7 (`equal_steps`): one number a row. None:
        two levels that each row has for itself.
      descents: with `steps`, passes over all symbols, each anew with all others given, before each refit.
      refits: rounds of rounding and refitting the levels; 0 rounds once, to the starting levels.
      level_bits: mantissa bits of a level, 0 to 7; fewer are cheaper to store.
      block_size, damping, activation_order: as in `gptq`.

    Returns:
      `Quantized`, with levels that are exact in bfloat16; `loss` is without the bits.

    Raises:
      ValueError: an argument's shape or value is not as above.
    """
    W, H = jnp.asarray(W), jnp.asarray(H)
    check_matrices(W, H, block_size, damping)
    lagrangian = jnp.asarray(lagrangian, jnp.float32)
    if lagrangian.shape != W.shape[:2]:
        raise ValueError(f"lagrangian: found shape {lagrangian.shape}, expected [experts, rows] = {W.shape[:2]}.")
    codes = jnp.zeros(W.shape[1], jnp.int32) if codes is None else jnp.asarray(codes, jnp.int32)
    if codes.shape != W.shape[1:2]:
        raise ValueError(f"codes: found shape {codes.shape}, expected [rows] = {W.shape[1:2]}.")
    wholes = [("refits", refits, 0, math.inf), ("descents", descents, 0, math.inf), ("level_bits", level_bits, 0, 7)]
    if steps is not None:
        wholes.append(("steps", steps, 1, equal_steps.MOST_STEPS))
    for name, value, least, most in wholes:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name}: found {value!r}, expected a whole number from {least} to {most}.")
    if steps is not None:
        quantized = equal_steps.quantize(
            W,
            H,
            lagrangian,
            codes,
            jnp.float32(steps),
            damping,
            refits=refits,
            descents=descents,
            level_bits=level_bits,
            block_size=block_size,
            activation_order=bool(activation_order),
        )
        return equal_steps.narrowed(quantized, steps)
    return _rate_distortion(W, H, lagrangian, codes, damping, refits, level_bits, block_size, bool(activation_order))


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _rate_distortion(W, H, lagrangian, codes, damping, refits, level_bits, block_size, activation_order) -> Quantized:
    one = functools.partial(
        _expert,
        codes=codes,
        damping=damping,
        refits=refits,
        level_bits=level_bits,
        block_size=block_size,
        activation_order=activation_order,
    )
    return jax.vmap(one)(W.astype(jnp.float32), H.astype(jnp.float32), lagrangian)


def _expert(W, H, lagrangian, *, codes, damping, refits, level_bits, block_size, activation_order) -> Quantized:
    """One expert: W [rows, columns], H [columns, columns], lagrangian and codes [rows]."""
    factored = factor(H, damping, block_size, unit=block_size, activation_order=activation_order)
    Wt = factored.arrange(W)  # [padded columns, rows]
    columns = W.shape[1]
    weight = jnp.concatenate([1 / jnp.diag(L) ** 2 for L in factored.L])  # of a column's squared error
    levels, zeros = _start(Wt[:columns], weight[:columns], lagrangian, codes)
    levels = coarse(levels, level_bits)

    def round_all(levels, zeros):
        rates = _rates(zeros)

        def quantize_column(w, l):  # w [1, rows], l [1, 1]
            symbols = _choose(w, 1 / l**2, levels, lagrangian, rates)
            q = _values(symbols, levels)
            return (w - q) * (1 / l), (q, symbols)

        loss, (_, symbols) = sweep(Wt, factored, in_blocks(quantize_column, block_size))
        return symbols, loss

    def round_and_refit(state, _):
        levels, zeros, *_ = state
        symbols, loss = round_all(levels, zeros)
        levels, loss = _refit(Wt, factored.H, symbols, levels, loss, level_bits)
        return (levels, _share_of_zeros(jnp.sum(symbols[:columns] != 0, 0), columns, codes), symbols, loss), None

    if refits:
        state = (levels, zeros, jnp.zeros(Wt.shape, jnp.uint8), jnp.zeros(len(W)))
        (levels, _, symbols, loss), _ = jax.lax.scan(round_and_refit, state, length=refits)
    else:
        symbols, loss = round_all(levels, zeros)
    symbols = factored.arrange_back(symbols)  # [rows, columns]
    Q = _values(symbols.T, levels).T
    return Quantized(Q, symbols, levels.T, factored.fallback, sum_in_order(loss))


@functools.partial(jax.jit, static_argnames="level_bits")
def refit_levels(
    W: jax.Array, H: jax.Array, quantized: Quantized, *, damping: float = 0.1, level_bits: int = 7
) -> Quantized:
    """Levels of ternary matrices anew, for the symbols they have: least (W - Q) H (W - Q)' of each row.

    Args:
      W, H: as `gptq` took them.
      quantized: what it made of them, with one grid per row.
      damping: as in `gptq`.
      level_bits: mantissa bits of a level.
    """

    def one(W, H, symbols, levels, loss, fallback):
        columns = W.shape[1]
        damp = jnp.maximum(damping / columns * sum_in_order(jnp.diag(H)), LEAST_DAMPING)
        H = jnp.where(fallback, jnp.eye(columns), H + damp * jnp.eye(columns))
        levels, change = _refit(W.T, H, symbols.T, levels.T, jnp.zeros(len(W)), level_bits)
        return _values(symbols.T, levels).T, levels.T, loss + sum_in_order(change)

    W, H = jnp.asarray(W, jnp.float32), jnp.asarray(H, jnp.float32)
    Q, levels, loss = jax.vmap(one)(W, H, quantized.symbols, quantized.levels, quantized.loss, quantized.fallback)
    return quantized._replace(Q=Q, levels=levels, loss=loss)


# --- The parts; levels are [2, rows], low <= 0 <= high, and weights [columns, rows] ---------------------------------


def _rates(zeros) -> _Rates:
    """Of a share of zeros, where both levels are equally frequent."""
    zeros = jnp.clip(zeros, LEAST_ZEROS, MOST_ZEROS)
    return _Rates(-jnp.log2(zeros), 1 - jnp.log2(1 - zeros))


def _choose(w, weight, levels, lagrangian, rates: _Rates):
    """argmin over symbols of weight (w - level)^2 + lagrangian bits, uint8; ties go to zero."""
    low, high = levels
    zero_cost = weight * w**2 + lagrangian * rates.zero
    low_cost = weight * (w - low) ** 2 + lagrangian * rates.level
    high_cost = weight * (w - high) ** 2 + lagrangian * rates.level
    # A level that is zero is none.
    is_low = (low < 0) & (low_cost < zero_cost) & (low_cost <= high_cost)
    is_high = (high > 0) & (high_cost < zero_cost) & ~is_low
    return jnp.where(is_high, 2, jnp.where(is_low, 1, 0)).astype(jnp.uint8)


def _values(symbols, levels):
    low, high = levels
    return jnp.where(symbols == 1, low, jnp.where(symbols == 2, high, 0.0))


def _share_of_zeros(nonzeros, columns: int, codes):
    """Of each row's code, [rows], from the rows' numbers of non-zeros [rows]."""
    of_codes = lambda counts: jax.ops.segment_sum(counts, codes, len(codes))
    total, rows = of_codes(nonzeros.astype(jnp.int32)), of_codes(jnp.ones_like(codes))
    return (1 - total / (columns * jnp.maximum(rows, 1)))[codes]


def _start(Wt, weight, lagrangian, codes):
    """Levels [2, rows], and shares of zeros [rows], by entropy-constrained scalar quantization.

    Args:
      Wt: [columns, rows].
      weight: [columns], of squared errors.
      lagrangian, codes: [rows].
    """
    columns, rows = Wt.shape
    deviation = jnp.sqrt(sum_in_order(Wt**2) / columns)
    levels = START_LEVEL * jnp.stack([-deviation, deviation])

    def step(state, _):
        levels, zeros = state
        rates = _rates(zeros)

        def terms(w, h):  # of columns, [block, rows] and [block, 1]
            symbols = _choose(w, h, levels, lagrangian, rates)
            chosen = jnp.stack([symbols == 1, symbols == 2], axis=1) & (h > 0)[:, None]  # [block, 2, rows]
            counted = h[:, None] * chosen
            return counted, counted * w[:, None], chosen.any(1).astype(jnp.int32)

        count, total, nonzeros = sum_columns(terms, rows, Wt, weight[:, None])
        levels = jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), levels)
        return (levels, _share_of_zeros(nonzeros, columns, codes)), None

    return jax.lax.scan(step, (levels, jnp.full(rows, START_ZEROS)), length=START_STEPS)[0]


def _refit(Wt, H, symbols, levels, loss, level_bits):
    """argmin over levels of each row's (w - q) H (w - q)', rounded, and what that is.

    With patterns a and b, the places of low and high:  (a'Ha a'Hb; b'Ha b'Hb) (low, high)' = (a'Hw, b'Hw)'.

    Args:
      Wt, symbols: [columns, rows].
      H: [columns, columns].
      levels: [2, rows], which the symbols were chosen for.
      loss: [rows], (w - q) H (w - q)' with those.
    """
    a, b = ((symbols == s).astype(jnp.float32) for s in (1, 2))
    Ha, Hb = matmul(H, a), matmul(H, b)
    products = lambda a, b, Ha, Hb, w: (Ha * a, Hb * b, Ha * b, Ha * w, Hb * w)
    aa, bb, ab, aw, bw = sum_columns(products, a.shape[1], a, b, Ha, Hb, Wt)  # [rows]

    def error(levels):  # (w - q) H (w - q)' without w H w'
        low, high = levels
        return low**2 * aa + high**2 * bb + 2 * low * high * ab - 2 * low * aw - 2 * high * bw

    # A row without one of the levels keeps that one; where the equations are of no use, it keeps both.
    aa_, bb_ = jnp.where(aa > 0, aa, 1.0), jnp.where(bb > 0, bb, 1.0)
    determinant = aa_ * bb_ - ab**2
    fitted = jnp.stack([(bb_ * aw - ab * bw) / determinant, (aa_ * bw - ab * aw) / determinant])
    fitted = jnp.where(jnp.stack([aa, bb]) > 0, fitted, levels)
    fitted = coarse(jnp.stack([jnp.minimum(fitted[0], 0.0), jnp.maximum(fitted[1], 0.0)]), level_bits)
    change = error(fitted) - error(levels)
    better = change < 0
    return jnp.where(better, fitted, levels), loss + jnp.where(better, change, 0.0)
