"""The values that a row of weights may take: ternary and 2-bit grids, both spanned by the row's minimum and maximum.

Symbols are numbered as codecs store them, whatever the number of levels: 0 is zero, k = 1..L the row's level k - 1.
Levels rise. Ternary: minimum and maximum. 2-bit: the three values beside zero.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

BITS = (1.5, 2)  # 1.5 is the paper's name for ternary


class Grid(NamedTuple):
    """Least and greatest value of each row, zero included: low <= 0 <= high, float32 [..., rows]."""

    low: jax.Array
    high: jax.Array


def fit(W: jax.Array) -> Grid:
    """Grid of every row of W [..., rows, columns]: {row min, row max}, widened to hold zero (QMoE, section 3.2).

    A min or max is a weight, so the ternary grid of bfloat16 weights is exact in bfloat16.
    """
    return Grid(low=jnp.minimum(W.min(-1), 0.0), high=jnp.maximum(W.max(-1), 0.0))


def quantize(w: jax.Array, grid: Grid, bits: float) -> tuple[jax.Array, jax.Array]:
    """Nearest grid value of each weight.

    Args:
      w: float32, any shape against which the grid broadcasts.
      grid: the rows' grid.
      bits: 1.5 (ternary {low, 0, high}, rounded at half) or 2 (four equidistant values, one of them zero).

    Returns:
      Values float32 and symbols uint8, both of w's shape.
    """
    if bits == 1.5:
        # low < 0 < high: where a row has no weights of one sign, that level is zero and so is its symbol.
        at_low = (w < grid.low / 2) & (grid.low < 0)
        at_high = (w > grid.high / 2) & (grid.high > 0)
        values = jnp.where(at_high, grid.high, jnp.where(at_low, grid.low, 0.0))
        return values, jnp.where(at_high, 2, jnp.where(at_low, 1, 0)).astype(jnp.uint8)
    scale, zero = _scale_and_zero(grid)
    place = jnp.clip(jnp.round(w / scale) + zero, 0, 3)  # 0..3 from the bottom up
    symbols = jnp.where(place == zero, 0, jnp.where(place < zero, place + 1, place))
    return scale * (place - zero), symbols.astype(jnp.uint8)


def levels(grid: Grid, bits: float) -> jax.Array:
    """The values beside zero, rising: float32 [..., L], L = 2 (ternary) or 3 (2 bits)."""
    if bits == 1.5:
        return jnp.stack(grid, -1)
    scale, zero = (a[..., None] for a in _scale_and_zero(grid))
    steps = jnp.arange(3) - zero
    found = scale * jnp.where(steps < 0, steps, steps + 1)
    return jnp.where((grid.low < grid.high)[..., None], found, 0.0)  # A row of zeros has none.


def without_unused(symbols: jax.Array, levels: jax.Array) -> jax.Array:
    """`levels` [..., rows, L], those of rows that use none, as symbols uint8 [..., rows, columns] say, zero.

    Nothing depends on them, and zeros take hardly any bits.
    """
    return jnp.where((symbols > 0).any(-1)[..., None], levels, 0)


def dequantize(symbols: jax.Array, levels: jax.Array) -> jax.Array:
    """Values, float32, of symbols uint8 [..., rows, columns] with levels [..., rows, L]."""
    values = jnp.zeros(symbols.shape, jnp.float32)
    for k, level in enumerate(jnp.unstack(levels.astype(jnp.float32), axis=-1), start=1):
        values = jnp.where(symbols == k, level[..., None], values)
    return values


def _scale_and_zero(grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Step of the 2-bit grid, and which of its values, from 0, is zero (GPTQ's asymmetric quantizer).

    A row of zeros gets step 1.
    """
    scale = (grid.high - grid.low) / 3
    scale = jnp.where(scale > 0, scale, 1.0)
    return scale, jnp.round(-grid.low / scale)


def coarse(levels: jax.Array, bits: int) -> jax.Array:
    """Rounds float32 to `bits` bits of mantissa."""
    unit = jnp.uint32(1) << (23 - bits)
    word = jax.lax.bitcast_convert_type(levels, jnp.uint32)
    return jax.lax.bitcast_convert_type((word + (unit >> 1)) & ~(unit - 1), jnp.float32)
