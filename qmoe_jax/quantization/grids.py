"""The values that a row of weights may take: ternary and 2-bit grids, both spanned by the row's minimum and maximum.

Symbols are what a codec stores. Ternary: 0 is zero, 1 the minimum, 2 the maximum. 2-bit: 0..3 from the bottom up.
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

    A min or max is a weight, so the grid of bfloat16 weights is exact in bfloat16.
    """
    return Grid(low=jnp.minimum(W.min(-1), 0.0), high=jnp.maximum(W.max(-1), 0.0))


def quantize(w: jax.Array, grid: Grid, bits: float) -> tuple[jax.Array, jax.Array]:
    """Nearest grid value of each weight.

    Args:
      w: float32, any shape against which the grid broadcasts.
      grid: the rows' grid.
      bits: 1.5 (ternary {low, 0, high}, rounded at half) or 2 (four equidistant levels, one of them zero).

    Returns:
      Values float32 and symbols uint8, both of w's shape.
    """
    if bits == 1.5:
        # low < 0 < high: where a row has no weights of one sign, that level is zero and so is its symbol.
        at_low = (w < grid.low / 2) & (grid.low < 0)
        at_high = (w > grid.high / 2) & (grid.high > 0)
        symbols = jnp.where(at_high, 2, jnp.where(at_low, 1, 0))
    else:
        scale, zero = _scale_and_zero(grid)
        symbols = jnp.clip(jnp.round(w / scale) + zero, 0, 3)
    symbols = symbols.astype(jnp.uint8)
    return dequantize(symbols, grid, bits), symbols


def dequantize(symbols: jax.Array, grid: Grid, bits: float) -> jax.Array:
    """Values, float32, of uint8 symbols of any shape against which the grid broadcasts."""
    if bits == 1.5:
        return jnp.where(symbols == 2, grid.high, jnp.where(symbols == 1, grid.low, 0.0))
    scale, zero = _scale_and_zero(grid)
    return scale * (symbols.astype(jnp.float32) - zero)


def three_levels(symbols: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """2-bit symbols as codecs store them: 0 is zero, k = 1, 2, 3 the row's level k - 1.

    Args:
      symbols: uint8 [..., rows, columns], 0..3 from the bottom up.
      grid: the rows' grid.

    Returns:
      Symbols uint8 [..., rows, columns], and the three levels beside zero, rising, bfloat16 [..., rows, 3].
    """
    scale, zero = (a[..., None] for a in _scale_and_zero(grid))
    steps = jnp.arange(3) - zero
    levels = scale * jnp.where(steps < 0, steps, steps + 1)
    levels = jnp.where((grid.low < grid.high)[..., None], levels, 0.0)  # A row of zeros has none.
    relative = jnp.where(symbols == zero, 0, jnp.where(symbols < zero, symbols + 1, symbols))
    return relative.astype(jnp.uint8), levels.astype(jnp.bfloat16)


def _scale_and_zero(grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Step of the 2-bit grid and the symbol of zero (GPTQ's asymmetric quantizer). A row of zeros gets step 1."""
    scale = (grid.high - grid.low) / 3
    scale = jnp.where(scale > 0, scale, 1.0)
    return scale, jnp.round(-grid.low / scale)
