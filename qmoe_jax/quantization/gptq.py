"""GPTQ (Frantar et al. 2022) for all experts of a group at once, as QMoE uses it (section 3.2 and appendix).

W keeps the papers' orientation: rows are outputs, columns are inputs, and the layer computes W x.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qmoe_jax.quantization import grids
from qmoe_jax.quantization.grids import Grid

LEAST_DAMPING = 1e-6
# For speed alone. Panels are unrolled: more of them leave out more of the products with zeros, but compile longer.
PANELS = 8
SMALL_BLOCK = 32  # at most; one of all experts fits into a core's cache
WEIGHTS_AT_ONCE = 1 << 16  # of an expert, in sums over columns


class Quantized(NamedTuple):
    """Quantized matrices of all experts; rows are outputs.

    Attributes:
      Q: float32 [experts, rows, columns], quantized weights.
      symbols: uint8 [experts, rows, columns]; 0 is zero, k the row's level k - 1, however many there are.
      levels: float32 [experts, rows, L], rising; with a group size [experts, rows, groups, L], groups in the order in
        which columns were quantized. Symbols and levels give Q exactly: `grids.dequantize`.
      fallback: bool [experts], the Hessian was of no use (all zero, or its Cholesky factorisation failed) and the
        expert was rounded to nearest.
      loss: float32 [experts], tr (W - Q) H (W - Q)' with the damped Hessian (the identity where there is none).
        NaN if W holds NaN or Inf.
    """

    Q: jax.Array
    symbols: jax.Array
    levels: jax.Array
    fallback: jax.Array
    loss: jax.Array


def gptq(
    W: jax.Array,  # [experts, rows, columns]
    H: jax.Array,  # [experts, columns, columns]
    *,
    bits: float,
    block_size: int = 128,
    damping: float = 0.1,
    group_size: int | None = None,
    activation_order: bool = False,
) -> Quantized:
    """Quantizes column after column, and lets the columns to come make up for each error.

    With H^-1 = LL', L lower triangular, column i is rounded to the row's grid and its error spread by
    W[:, i:] -= (w_i - q_i) / L[i, i] * L[i:, i]'  (GPTQ, algorithm 1, whose upper triangular factor is L').
    H is never inverted as a whole: with H = UU', U = L'^-1, the columns of a panel are at its turn W + (W - Q) U L',
    where W - Q and U stand for the finished columns and L for the panel's own, and only within it are errors spread.

    Experts never mix: inputs sharded over their first axis stay so, without any collective.

    Args:
      W: weights, [experts, rows, columns], rows are outputs. Computed in float32.
      H: Hessians X'X at any scale, [experts, columns, columns]. An all-zero one marks a starved expert. A column
        whose input is always zero has a zero row in H and is rounded to nearest.
      bits: 1.5 (ternary) or 2.
      block_size: columns whose errors are applied to the rest in one matrix product; a matter of speed, not of result.
      damping: times mean diag H, at least 1e-6, is added to the diagonal.
      group_size: columns that share a grid, fitted when the group's turn comes; None: one grid per row, fitted to W.
      activation_order: take columns by falling diag H.

    Returns:
      `Quantized`.

    Raises:
      ValueError: an argument's shape or value is not as above.
    """
    W, H = jnp.asarray(W), jnp.asarray(H)
    _check(W, bits, group_size)
    check_matrices(W, H, block_size, damping)
    return _gptq(W, H, damping, bits, block_size, group_size, bool(activation_order))


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _gptq(W, H, damping, bits, block_size, group_size, activation_order) -> Quantized:
    one = functools.partial(
        _gptq_expert,
        damping=damping,
        bits=bits,
        block_size=block_size,
        group_size=group_size,
        activation_order=activation_order,
    )
    return jax.vmap(one)(W.astype(jnp.float32), H.astype(jnp.float32))


def _gptq_expert(W, H, *, damping, bits, block_size, group_size, activation_order) -> Quantized:
    """GPTQ of one expert: W float32 [rows, columns], H float32 [columns, columns]."""
    _, columns = W.shape
    # The grid is fitted where a group starts, and there all earlier errors must have been applied: whole blocks per
    # group.
    block = block_size if group_size is None else math.gcd(block_size, group_size)
    factored = factor(H, damping, block, unit=group_size or block, activation_order=activation_order)
    Wt = factored.arrange(W)

    def quantizer(grid):
        return functools.partial(_quantize_column, grid=grid, bits=bits)

    def quantize_group(Wt, L):
        grid = grids.fit(Wt.T)
        errors, (Q, symbols) = in_blocks(quantizer(grid), block)(Wt, L)
        return errors, (Q, symbols, grids.levels(grid, bits)[None])

    if group_size is None:
        grid = grids.fit(W)
        quantize, levels = in_blocks(quantizer(grid), block), grids.levels(grid, bits)
    else:
        quantize = functools.partial(_quantize_blocks, quantize_group, group_size)

    loss, (Q, symbols, *levels_of_groups) = sweep(Wt, factored, quantize)
    if group_size is not None:
        levels = levels_of_groups[0][: -(-columns // group_size)].swapaxes(0, 1)  # [rows, groups, L]
    Q, symbols = factored.arrange_back(Q), factored.arrange_back(symbols)
    return Quantized(Q, symbols, levels, factored.fallback, sum_in_order(loss))


class Factored(NamedTuple):
    """What the column loop needs of a Hessian [columns, columns], its columns in order and padded to whole panels.

    Attributes:
      U: for each panel, U' left of its diagonal block, [panel, columns before the panel], where UU' = H is damped and U
        upper triangular; zero for a fallback.
      L: for each panel, its diagonal block of H^-1's lower triangular factor, [panel, panel]; identity for a fallback.
      H: damped, [padded columns, padded columns]; identity for a fallback.
      order: int32 [columns].
      reordered: whether that isn't simply the columns' own order.
      fallback: bool, H was of no use.
    """

    U: list[jax.Array]
    L: list[jax.Array]
    H: jax.Array
    order: jax.Array
    reordered: bool
    fallback: jax.Array

    def arrange(self, W: jax.Array) -> jax.Array:
        """W [rows, columns] -> [padded columns, rows] in this order, so that one column is contiguous."""
        Wt = (W[:, self.order] if self.reordered else W).T
        return jnp.pad(Wt, ((0, len(self.H) - len(Wt)), (0, 0)))

    def arrange_back(self, Wt: jax.Array) -> jax.Array:
        """[padded columns, rows] -> [rows, columns] in W's own order."""
        W = Wt[: len(self.order)].T
        return W[:, jnp.argsort(self.order)] if self.reordered else W


def factor(H: jax.Array, damping: ArrayLike, block: int, *, unit: int, activation_order: bool) -> Factored:
    """Damps and factors one Hessian [columns, columns]; panels are whole multiples of `unit`, and so of `block`."""
    columns = len(H)
    small = _small(block)
    panel = unit * -(-columns // (unit * PANELS))
    padding = -columns % panel  # zeros in W disturb neither the grid nor the other columns
    order = jnp.argsort(-jnp.diag(H)) if activation_order else jnp.arange(columns)
    if activation_order:
        H = H.at[order[:, None], order].get(mode="promise_in_bounds", unique_indices=True)
    trace = sum_in_order(jnp.diag(H))
    damp = jnp.maximum(damping * (1 / columns) * trace, LEAST_DAMPING)
    H = jnp.pad(H, (0, padding)) + jnp.diag(jnp.where(jnp.arange(columns + padding) < columns, damp, 1.0))
    U, L = _factor(H, panel, small)
    fallback = (trace == 0) | ~jnp.all(jnp.isfinite(jnp.stack(L)))
    U = [jnp.where(fallback, 0.0, u) for u in U]
    L = [jnp.where(fallback, jnp.eye(panel), l) for l in L]
    H = jnp.where(fallback, jnp.eye(len(H)), H)
    return Factored(U, L, H, order.astype(jnp.int32), activation_order, fallback)


# Of W [columns, rows] and their part of L [columns, columns]: errors [columns, rows], and (Q, symbols, ...) like it.
Quantize = Callable[[jax.Array, jax.Array], tuple[jax.Array, tuple[jax.Array, ...]]]


def sweep(Wt: jax.Array, factored: Factored, quantize: Quantize) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The column loop, panel by panel.

    Args:
      Wt: [padded columns, rows].
      factored: of the Hessian.
      quantize: of a panel W [panel, rows] and its L; returns errors [panel, rows] and (Q, symbols, ...), as
        `in_blocks` makes it.

    Returns:
      Sum of squared errors of each row, [rows], and what `quantize` returned, of all columns.
    """
    loss, D, panels = jnp.zeros(Wt.shape[1]), Wt[:0], []  # D: (W - Q)' of all finished panels, [finished columns, rows]
    for W_panel, U_panel, L_panel in zip(jnp.split(Wt, len(factored.L)), factored.U, factored.L, strict=True):
        errors, outputs = quantize(W_panel + matmul(L_panel, matmul(U_panel, D)), L_panel)
        # (W - Q) U is errors', hence tr (W - Q) H (W - Q)' is the sum of squared errors.
        loss += sum_in_order(errors**2)
        D = jnp.concatenate([D, W_panel - outputs[0]])
        panels.append(outputs)
    return loss, tuple(map(jnp.concatenate, zip(*panels, strict=True)))


def in_blocks(quantize_column: Quantize, block: int) -> Quantize:
    """`quantize` for a panel from one for a column: w [1, rows], l [1, 1] -> error, (q, symbols)."""
    quantize = quantize_column
    for size in sorted({1, _small(_small(block), 8), _small(block), block}):
        quantize = functools.partial(_quantize_blocks, quantize, size)
    return quantize


def _small(block: int, most: int = SMALL_BLOCK) -> int:
    return max(size for size in range(1, most + 1) if block % size == 0)


def _quantize_blocks(quantize, size, W, L):
    """Quantizes W [columns, rows] by blocks of `size` columns, and applies each block's errors to the columns after it.

    Args:
      quantize: of a block W [size, rows] and its part of L [size, size]; returns errors [size, rows] and other arrays.
      size: divides columns.
      W: columns of one expert.
      L: [columns, columns], their part of L.

    Returns:
      What `quantize` returns, of all blocks along the first axis.
    """

    def step(W, start):
        L_columns = jax.lax.dynamic_slice_in_dim(L, start, size, axis=1)  # [columns, size]
        L_block = jax.lax.dynamic_slice_in_dim(L_columns, start, size)
        errors, outputs = quantize(jax.lax.dynamic_slice_in_dim(W, start, size), L_block)
        # L_columns is zero above the block: finished columns stay as they are.
        spread = L_columns * errors if size == 1 else matmul(L_columns, errors)
        return W - spread, (errors, outputs)

    _, outputs = jax.lax.scan(step, W, jnp.arange(0, len(W), size))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)


def _quantize_column(w, l, *, grid: Grid, bits):
    """Rounds a column w [1, rows]; l [1, 1] is its entry on L's diagonal."""
    q, symbols = grids.quantize(w, grid, bits)
    return (w - q) * (1 / l), (q, symbols)


def _factor(H: jax.Array, panel: int, block: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """Upper triangular U with UU' = H, by panels of columns from the last to the first.

    Returns:
      For each panel U' left of its diagonal block, [panel, columns before the panel], and L [panel, panel], the
      transposed inverse of U's diagonal block, which is also the diagonal block of H^-1's factor. L is not finite in
      some panel if H is not positive definite.
    """
    starts = range(0, len(H), panel)
    S = [H[start : start + panel, : start + panel] for start in starts]  # Schur complement, its lower half
    U, L = [], []
    for k, start in reversed(list(enumerate(starts))):
        Lt = _inverse_factor(S[k][:, start:], block)
        Ut = matmul(Lt, S[k][:, :start])
        for i, before in enumerate(starts[:k]):
            columns = slice(before, before + panel)
            S[i] = S[i] - matmul(_transpose(Ut[:, columns]), Ut[:, : columns.stop])
        U.append(Ut)
        L.append(_transpose(Lt))
    return U[::-1], L[::-1]


def _inverse_factor(H: jax.Array, block: int) -> jax.Array:
    """L' where L is lower triangular and LL' = H^-1, by bordering from the last block up; not finite if there is none.

    Where L covers the columns to the right of a block and h are the block's rows of H, Y = h L is known, the block's
    own factor is that of its Schur complement S = H_bb - YY', l'l = S^-1, and the new rows of L' are -l Y L'.

    jax.numpy.linalg.cholesky isn't used: on CPU, jaxlib's batched LAPACK calls wait inside the thread pool for other
    threads of the same pool, and all of them may be waiting when several devices factorise at once (jaxlib 0.10.2).
    """
    columns = len(H)

    def border(Lt, start):  # Lt = L' [columns, columns], rows from start + block on are finished, the others zero
        h = jax.lax.dynamic_slice_in_dim(H, start, block)  # [block, columns]
        h_block = jax.lax.dynamic_slice_in_dim(h, start, block, axis=1)  # [block, block]
        Y = matmul(h, _transpose(Lt))  # [block, columns]
        l = _inverse_factor_of_block(h_block - matmul(Y, _transpose(Y)))
        rows = jax.lax.dynamic_update_slice_in_dim(-matmul(matmul(l, Y), Lt), l, start, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(Lt, rows, start, axis=0), None

    starts = block * jnp.arange(columns // block)
    return jax.lax.scan(border, jnp.zeros_like(H), starts, reverse=True)[0]


def _inverse_factor_of_block(S: jax.Array) -> jax.Array:
    """Upper triangular l with l'l = S^-1, S [block, block]: (S | 1), S = rr', becomes (r' | l) from below up."""
    block = len(S)

    def eliminate(M, i):
        scale = 1 / jnp.sqrt(M[i, i])  # not finite unless S is positive definite
        row = M[i] * scale  # [2 block]
        above = jnp.where(jnp.arange(block) < i, M[:, i], 0.0) * scale  # [block]
        return (M - above[:, None] * row).at[i].set(row), None

    M = jnp.concatenate([S, jnp.eye(block)], axis=1)
    M, _ = jax.lax.scan(eliminate, M, jnp.arange(block), reverse=True)
    return M[:, block:]


matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _transpose(A: jax.Array) -> jax.Array:
    """A' as an array of its own: XLA folds a transpose into a product differently for one expert and for many."""
    return jax.lax.optimization_barrier(A.T)


def sum_in_order(x: jax.Array) -> jax.Array:
    """Sum over the first axis, one after the other: the order in which XLA adds depends on the number of experts."""
    return jax.lax.scan(lambda total, row: (total + row, None), jnp.zeros_like(x[0]), x)[0]


def sum_in_pairs(x: jax.Array) -> jax.Array:
    """Sum over the first axis, half onto half: as `sum_in_order`, in few steps."""
    while len(x) > 1:
        half = -(-len(x) // 2)
        x = x[:half] + jnp.pad(x[half:], [(0, 2 * half - len(x)), *[(0, 0)] * (x.ndim - 1)])
    return x[0]


def sum_columns(terms: Callable[..., Sequence[jax.Array]], rows: int, *arrays: jax.Array) -> list[jax.Array]:
    """Sums of what `terms` makes of columns, in an order of its own (see `sum_in_order`), without keeping it all.

    Args:
      terms: of arrays [block, ...], which may be padded with zeros, to a tuple of such.
      rows: of a column.
      *arrays: [columns, ...].
    """
    columns = len(arrays[0])
    block = min(columns, max(8, WEIGHTS_AT_ONCE // rows))
    padded = [jnp.pad(a, ((0, -columns % block), *[(0, 0)] * (a.ndim - 1))) for a in arrays]
    blocks = [a.reshape(-1, block, *a.shape[1:]) for a in padded]

    def add(sums, block):
        return [total + sum_in_pairs(x) for total, x in zip(sums, terms(*block), strict=True)], None

    zeros = [jnp.zeros(x.shape[1:], x.dtype) for x in jax.eval_shape(terms, *(b[0] for b in blocks))]
    return jax.lax.scan(add, zeros, blocks)[0]


def round_to_nearest(W: jax.Array, *, bits: float, group_size: int | None = None) -> Quantized:
    """Rounds every weight to its row's grid; what `gptq` does under an identity Hessian.

    Args:
      W: weights, [experts, rows, columns], rows are outputs. Computed in float32.
      bits: 1.5 (ternary) or 2.
      group_size: columns that share a grid; None: one grid per row.

    Returns:
      `Quantized`, with the identity as Hessian in `loss`, and no fallback.

    Raises:
      ValueError: an argument's shape or value is not as above.
    """
    W = jnp.asarray(W)
    _check(W, bits, group_size)
    return _round_to_nearest(W, bits, group_size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _round_to_nearest(W, bits, group_size) -> Quantized:
    W = W.astype(jnp.float32)
    experts, rows, columns = W.shape
    group = group_size or columns
    padded = jnp.pad(W, ((0, 0), (0, 0), (0, -columns % group)))
    padded = padded.reshape(experts, rows, -1, group)
    grid = grids.fit(padded)  # [experts, rows, groups]
    Q, symbols = grids.quantize(padded, Grid(grid.low[..., None], grid.high[..., None]), bits)
    Q, symbols = (a.reshape(experts, rows, -1)[..., :columns] for a in (Q, symbols))
    levels = grids.levels(grid, bits)  # [experts, rows, groups, L]
    return Quantized(
        Q,
        symbols,
        levels[:, :, 0] if group_size is None else levels,
        fallback=jnp.zeros(experts, bool),
        loss=jnp.sum((W - Q) ** 2, axis=(1, 2)),
    )


def check_matrices(W: jax.Array, H: jax.Array, block_size: int, damping: ArrayLike) -> None:
    """Raises ValueError unless these are what `gptq` takes."""
    _check_weights(W)
    experts, _, columns = W.shape
    if H.shape != (experts, columns, columns):
        raise ValueError(
            f"H: found shape {H.shape}, expected [experts, columns, columns] = {(experts, columns, columns)} "
            f"for W of shape {W.shape}."
        )
    _check_size("block_size", block_size)
    if isinstance(damping, (int, float)) and not 0 <= damping < math.inf:
        raise ValueError(f"damping: found {damping}, expected a finite number >= 0.")


def _check_weights(W) -> None:
    if W.ndim != 3 or 0 in W.shape:
        raise ValueError(f"W: found shape {W.shape}, expected [experts, rows, columns], none of them zero.")
    if not jnp.issubdtype(W.dtype, jnp.floating):
        raise ValueError(f"W: found dtype {W.dtype}, expected floating point.")


def _check(W, bits, group_size) -> None:
    _check_weights(W)
    if bits not in grids.BITS:
        raise ValueError(f"bits: found {bits!r}, expected 1.5 (ternary) or 2.")
    if group_size is not None:
        _check_size("group_size", group_size)


def _check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name}: found {size!r}, expected a whole number of columns, at least 1.")
