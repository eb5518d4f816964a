"""GPTQ (Frantar et al. 2022) for all experts of a group at once, as QMoE uses it (section 3.2 and appendix).

W keeps the papers' orientation: rows are outputs, columns are inputs, and the layer computes W x.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qmoe_jax.quantization import grids
from qmoe_jax.quantization.grids import Grid

LEAST_DAMPING = 1e-6


class Quantized(NamedTuple):
    """Quantized matrices of all experts; rows are outputs.

    Attributes:
      Q: float32 [experts, rows, columns], quantized weights.
      symbols: uint8 [experts, rows, columns], see `grids`.
      levels: float32 [experts, rows, 2], (low, high) of each row's grid; with a group size
        [experts, rows, groups, 2]. Symbols and levels give Q exactly: `dequantize`.
      order: int32 [experts, columns], columns in the order in which they were quantized; group g is
        order[g * group_size : (g + 1) * group_size].
      fallback: bool [experts], the Hessian was of no use (all zero, or its Cholesky factorisation failed) and the
        expert was rounded to nearest.
      loss: float32 [experts], tr (W - Q) H (W - Q)' with the damped Hessian (the identity where there is none).
        NaN if W holds NaN or Inf.
    """

    Q: jax.Array
    symbols: jax.Array
    levels: jax.Array
    order: jax.Array
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
    experts, _, columns = W.shape
    if H.shape != (experts, columns, columns):
        raise ValueError(
            f"H: found shape {H.shape}, expected [experts, columns, columns] = {(experts, columns, columns)} "
            f"for W of shape {W.shape}."
        )
    _check_size("block_size", block_size)
    if isinstance(damping, (int, float)) and not 0 <= damping < math.inf:
        raise ValueError(f"damping: found {damping}, expected a finite number >= 0.")
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
    rows, columns = W.shape
    # The grid is fitted where a group starts, and there all earlier errors must have been applied: whole blocks per
    # group. Columns are padded to whole groups; zeros disturb neither the grid nor the other columns.
    block = block_size if group_size is None else math.gcd(block_size, group_size)
    group = group_size or -(-columns // block) * block
    groups = -(-columns // group)
    padding = groups * group - columns

    if activation_order:
        order = jnp.argsort(-jnp.diag(H))
        W, H = W[:, order], H[order][:, order]
    else:
        order = jnp.arange(columns)
    trace = _sum(jnp.diag(H))
    H = H + jnp.maximum(damping * (1 / columns) * trace, LEAST_DAMPING) * jnp.eye(columns)
    H = jax.scipy.linalg.block_diag(H, jnp.eye(padding))
    L = _inverse_factor(H, block)
    fallback = (trace == 0) | ~jnp.all(jnp.isfinite(L))
    L = jnp.where(fallback, jnp.eye(len(L)), L)
    Wt = jnp.pad(W.T, ((0, padding), (0, 0)))  # [padded columns, rows], so that one column is contiguous

    def quantize_group(Wt, start):
        grid = grids.fit(jax.lax.dynamic_slice_in_dim(Wt, start, group).T)
        step = functools.partial(_quantize_block, L=L, grid=grid, bits=bits, block=block)
        Wt, (Q, symbols, loss) = jax.lax.scan(step, Wt, start + block * jnp.arange(group // block))
        return Wt, (Q, symbols, loss, jnp.stack(grid, -1))

    _, (Q, symbols, loss, levels) = jax.lax.scan(quantize_group, Wt, group * jnp.arange(groups))
    Q, symbols = (a.reshape(-1, rows)[:columns].T for a in (Q, symbols))  # [rows, columns]
    if activation_order:
        back = jnp.argsort(order)
        Q, symbols = Q[:, back], symbols[:, back]
    levels = levels[0] if group_size is None else levels.swapaxes(0, 1)  # [rows, 2] or [rows, groups, 2]
    return Quantized(Q, symbols, levels, order.astype(jnp.int32), fallback, _sum(_sum(loss.reshape(-1, rows))))


def _quantize_block(Wt, start, *, L, grid: Grid, bits, block):
    """Columns start .. start + block of one expert, Wt [columns, rows]; returns Wt with their errors applied."""
    L_columns = jax.lax.dynamic_slice_in_dim(L, start, block, axis=1)  # [columns, block]
    L_block = jax.lax.dynamic_slice_in_dim(L_columns, start, block)  # [block, block]

    def quantize_column(W_block, i):
        w, l = W_block[i], L_block[:, i]  # [rows], [block]
        q, symbols = grids.quantize(w, grid, bits)
        error = (w - q) * (1 / l[i])
        # l is zero above i: finished columns stay as they are.
        return W_block - l[:, None] * error, (q, symbols, error)

    W_block = jax.lax.dynamic_slice_in_dim(Wt, start, block)
    _, (Q, symbols, errors) = jax.lax.scan(quantize_column, W_block, jnp.arange(block))  # [block, rows]
    # Likewise for L's columns. (W - Q)' is L errors, hence tr (W - Q) H (W - Q)' is the sum of squared errors.
    # The product's left side isn't transposed on the fly: XLA would do that differently for one expert and for many.
    Wt = Wt - _matmul(L_columns, errors)
    return Wt, (Q, symbols, _sum(errors**2))


def _inverse_factor(H: jax.Array, block: int) -> jax.Array:
    """Lower triangular L with LL' = H^-1, by bordering from the last block to the first; not finite if there is none.

    Where L covers the columns to the right of a block and h are the block's rows of H, Y = h L is known, the block's
    own factor is that of its Schur complement S = H_bb - YY', u'u = S^-1, and the new columns of L are -L Y' u'.

    jax.numpy.linalg.cholesky isn't used: on CPU, jaxlib's batched LAPACK calls wait inside the thread pool for other
    threads of the same pool, and all of them may be waiting when several devices factorise at once (jaxlib 0.10.2).
    """
    columns = len(H)

    def border(U, start):  # U = L' [columns, columns], rows from start + block on are finished, the others zero
        h = jax.lax.dynamic_slice_in_dim(H, start, block)  # [block, columns]
        h_block = jax.lax.dynamic_slice_in_dim(h, start, block, axis=1)  # [block, block]
        Y = _matmul(h, _transpose(U))  # [block, columns]
        u = _inverse_factor_of_block(h_block - _matmul(Y, _transpose(Y)))
        U_rows = jax.lax.dynamic_update_slice_in_dim(-_matmul(_matmul(u, Y), U), u, start, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(U, U_rows, start, axis=0), None

    starts = block * jnp.arange(columns // block)
    U, _ = jax.lax.scan(border, jnp.zeros_like(H), starts, reverse=True)
    return U.T


def _inverse_factor_of_block(S: jax.Array) -> jax.Array:
    """Upper triangular u with u'u = S^-1, S [block, block]: (S | 1), S = rr', becomes (r' | u) from below up."""
    block = len(S)

    def eliminate(M, i):
        scale = 1 / jnp.sqrt(M[i, i])  # not finite unless S is positive definite
        row = M[i] * scale  # [2 block]
        above = jnp.where(jnp.arange(block) < i, M[:, i], 0.0) * scale  # [block]
        return (M - above[:, None] * row).at[i].set(row), None

    M = jnp.concatenate([S, jnp.eye(block)], axis=1)
    M, _ = jax.lax.scan(eliminate, M, jnp.arange(block), reverse=True)
    return M[:, block:]


_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _transpose(A: jax.Array) -> jax.Array:
    """A' as an array of its own: XLA folds a transpose into a product differently for one expert and for many."""
    return jax.lax.optimization_barrier(A.T)


def _sum(x: jax.Array) -> jax.Array:
    """Sum over the first axis, one after the other: the order in which XLA adds depends on the number of experts."""
    return jax.lax.scan(lambda total, row: (total + row, None), jnp.zeros_like(x[0]), x)[0]


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
    levels = jnp.stack(grid, -1)  # [experts, rows, groups, 2]
    return Quantized(
        Q,
        symbols,
        levels[:, :, 0] if group_size is None else levels,
        order=jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), (experts, columns)),
        fallback=jnp.zeros(experts, bool),
        loss=jnp.sum((W - Q) ** 2, axis=(1, 2)),
    )


def _check(W, bits, group_size) -> None:
    if W.ndim != 3 or 0 in W.shape:
        raise ValueError(f"W: found shape {W.shape}, expected [experts, rows, columns], none of them zero.")
    if not jnp.issubdtype(W.dtype, jnp.floating):
        raise ValueError(f"W: found dtype {W.dtype}, expected floating point.")
    if bits not in grids.BITS:
        raise ValueError(f"bits: found {bits!r}, expected 1.5 (ternary) or 2.")
    if group_size is not None:
        _check_size("group_size", group_size)


def _check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name}: found {size!r}, expected a whole number of columns, at least 1.")
