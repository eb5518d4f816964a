"""Rate-distortion GPTQ with as many levels as the rate wants, at equal steps, for .2 to 3 bits a weight.

A row has the levels step k, k = -K .. K: one number. With entropy-coded symbols, uniform levels and a dead zone
that follows from the price of bits are nearly optimal at every rate (Sullivan 1996), and a level that isn't worth its
bits is hardly used. Of each expert's matrix, with L the factor of H^-1 as in GPTQ:

    start    step = sqrt(6 lambda / (h ln 2)), at which one bit more is worth lambda at high rates (h: mean of
             1 / L[i, i]^2), but as wide as K of them need; bits by a few rounds of scalar quantization
    round    GPTQ's column loop with  symbol = argmin_k (w - level_k)^2 / L[i, i]^2 + lambda bits(k)
    descend  symbol after symbol anew, all others given:  argmin_k H[i, i] (w_i - level_k)^2 + lambda bits(k), with w_i
             where the error's gradient is zero; it can only gain, and does what GPTQ can't: revise early columns
    refit    step of each row = argmin (w - q) H (w - q)' for its symbols: one linear equation
    round, descend and refit again
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from qmoe_jax.quantization.gptq import Quantized, factor, in_blocks, matmul, sum_columns, sum_in_order, sweep
from qmoe_jax.quantization.grids import coarse

MOST_STEPS = 7  # to either side: 14 levels beside zero, and zero, are 15 symbols
# The start: the step that pays at high rates, times a little more as rates aren't; at least so many standard deviations
# within reach, and at most so many in one step.
WIDER, REACH, WIDEST = 1.15, 2.5, 3.0
START_ROUNDS = 4
LEAST_SHARE = 1e-4  # of a symbol that bits are computed for: what is rare for now may come back


@functools.partial(jax.jit, static_argnames=("refits", "descents", "level_bits", "block_size", "activation_order"))
def quantize(
    W: jax.Array,
    H: jax.Array,
    lagrangian: jax.Array,
    codes: jax.Array,
    steps: jax.Array,
    damping: jax.Array,
    *,
    refits: int,
    descents: int,
    level_bits: int,
    block_size: int,
    activation_order: bool,
) -> Quantized:
    """All experts of a group, with room for `MOST_STEPS` levels on either side, whatever `steps` is.

    Args:
      W, H, lagrangian, codes, damping, refits, level_bits, block_size, activation_order: as `rate_distortion` takes
        them.
      steps: int, K: how many levels either side has; a program serves all of them.
      descents: passes over all symbols after each rounding.

    Returns:
      `Quantized` with 2 `MOST_STEPS` levels a row, of which the K next to zero on either side are in use (`narrowed`
      leaves out the others).
    """
    one = functools.partial(
        _expert,
        codes=codes,
        steps=steps,
        damping=damping,
        refits=refits,
        descents=descents,
        level_bits=level_bits,
        block_size=block_size,
        activation_order=activation_order,
    )
    return jax.vmap(one)(W.astype(jnp.float32), H.astype(jnp.float32), lagrangian)


def narrowed(quantized: Quantized, steps: int) -> Quantized:
    """With 2 `steps` levels a row, and not the others: what had one of these has the last that is left."""
    unused = MOST_STEPS - steps
    symbols = jnp.clip(quantized.symbols.astype(jnp.int32) - unused, 1, 2 * steps)
    symbols = jnp.where(quantized.symbols > 0, symbols, 0).astype(jnp.uint8)
    return quantized._replace(symbols=symbols, levels=quantized.levels[..., unused : 2 * MOST_STEPS - unused])


def _expert(
    W, H, lagrangian, *, codes, steps, damping, refits, descents, level_bits, block_size, activation_order
) -> Quantized:
    """One expert: W [rows, columns], H [columns, columns], lagrangian and codes [rows]."""
    factored = factor(H, damping, block_size, unit=block_size, activation_order=activation_order)
    Wt = factored.arrange(W)  # [padded columns, rows]
    columns = W.shape[1]
    weight = jnp.concatenate([1 / jnp.diag(L) ** 2 for L in factored.L])  # of a column's squared error
    numbers = _numbers()
    beyond = jnp.abs(numbers) > steps

    def levels_of(step):  # [levels, rows]
        return (step * numbers[:, None]).astype(jnp.bfloat16).astype(jnp.float32)

    def prices_of(bits, step):  # [1 + levels, rows]; a row of zeros has no levels
        unused = beyond[:, None] | (step == 0)
        return lagrangian * jnp.concatenate([bits[:1], jnp.where(unused, 0.0, bits[1:])]), unused

    step, bits = _start(Wt[:columns], weight[:columns], lagrangian, codes, steps, levels_of, prices_of)
    step = coarse(step, level_bits)
    # The gradient of (w - q) H (w - q)' is zero where H q = H w.
    Hw = matmul(factored.H, Wt)
    before, after = jnp.tril(factored.H), jnp.triu(factored.H, 1)

    def round_all(step, bits):
        levels, prices = levels_of(step), prices_of(bits, step)

        def quantize_column(w, l):  # w [1, rows], l [1, 1]
            symbols, q = choose(w, 1 / l**2, levels, *prices)
            return (w - q) * (1 / l), (q, symbols)

        return sweep(Wt, factored, in_blocks(quantize_column, block_size))[1][1]

    def descend(symbols, step, bits):
        levels, prices = levels_of(step), prices_of(bits, step)

        def quantize_column(g, h):  # g [1, rows]: H w less what the other columns give; h [1, 1], of H's diagonal
            symbols, q = choose(g / h, h, levels, *prices)
            return q, (q, symbols)

        # Columns before one have their new values, those after it still the old ones.
        gradients = Hw - matmul(after, values(symbols, levels))
        return in_blocks(quantize_column, block_size)(gradients, before)[1][1]

    def improve(state, _):
        _, step, bits = state
        symbols = round_all(step, bits)
        symbols = jax.lax.fori_loop(0, descents, lambda _, symbols: descend(symbols, step, bits), symbols)
        return (
            symbols,
            _refit(factored.H, Hw, symbols, step, level_bits),
            _bits(symbols[:columns], codes),
        ), None

    if refits:
        none = jnp.zeros(Wt.shape, jnp.uint8)  # Each round begins anew.
        (symbols, step, _), _ = jax.lax.scan(improve, (none, step, bits), length=refits)
    else:
        symbols = round_all(step, bits)
    levels = levels_of(step)
    E = Wt - values(symbols, levels)
    loss = sum_columns(lambda e, he: (e * he,), E.shape[1], E, matmul(factored.H, E))[0]
    symbols = factored.arrange_back(symbols)  # [rows, columns]
    return Quantized(values(symbols.T, levels).T, symbols, levels.T, factored.fallback, sum_in_order(loss))


def _numbers() -> jax.Array:
    """Of the levels beside zero, rising: -K .. -1, 1 .. K."""
    up = jnp.arange(1.0, MOST_STEPS + 1)
    return jnp.concatenate([-up[::-1], up])


def choose(
    w: jax.Array, weight: jax.Array, levels: jax.Array, prices: jax.Array, unused: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """argmin over symbols of weight (w - level)^2 + price; ties go to zero, and then to the lower level.

    Args:
      w: [columns, rows].
      weight: broadcasts against it.
      levels: [levels, rows], float32.
      prices: [1 + levels, rows], of zero and of each level.
      unused: bool [levels, rows].

    Returns:
      Symbols uint8 and values float32, [columns, rows].
    """
    least, symbols, q = weight * w**2 + prices[0], jnp.zeros(w.shape, jnp.uint8), jnp.zeros_like(w)
    for k in range(len(levels)):
        cost = weight * (w - levels[k]) ** 2 + prices[k + 1]
        better = (cost < least) & ~unused[k]
        least = jnp.where(better, cost, least)
        symbols = jnp.where(better, jnp.uint8(k + 1), symbols)
        q = jnp.where(better, levels[k], q)
    return symbols, q


def values(symbols: jax.Array, levels: jax.Array) -> jax.Array:
    """[columns, rows] from symbols and levels [levels, rows]."""
    q = jnp.zeros(symbols.shape, jnp.float32)
    for k in range(len(levels)):
        q = jnp.where(symbols == k + 1, levels[k], q)
    return q


def _bits(symbols, codes):
    """Bits of each symbol, [1 + levels, rows], by how often the rows of a code use it; symbols [columns, rows]."""
    counts = jnp.stack([jnp.sum(symbols == k, 0, dtype=jnp.int32) for k in range(2 * MOST_STEPS + 1)])
    of_codes = jax.ops.segment_sum(counts.T, codes, len(codes))[codes].T
    return -jnp.log2(jnp.maximum(of_codes / jnp.maximum(jnp.sum(of_codes, 0), 1), LEAST_SHARE))


def _start(Wt, weight, lagrangian, codes, steps, levels_of, prices_of):
    """Steps [rows] and bits [1 + levels, rows], by entropy-constrained scalar quantization of Wt [columns, rows]."""
    columns, rows = Wt.shape
    deviation = jnp.sqrt(sum_in_order(Wt**2) / columns)
    step = WIDER * jnp.sqrt(6 / math.log(2) * lagrangian * columns / sum_in_order(weight))
    step = jnp.clip(step, REACH / steps * deviation, WIDEST * deviation)

    def again(state, _):
        step, bits = state
        levels = levels_of(step)
        symbols, q = choose(Wt, weight[:, None], levels, *prices_of(bits, step))
        qq, qw = sum_columns(lambda w, q, h: (h * q**2, h * q * w), rows, Wt, q, weight[:, None])
        return (
            jnp.where((qq > 0) & (qw > 0), step * qw / jnp.where(qq > 0, qq, 1.0), step),
            _bits(symbols, codes),
        ), None

    guess = 1 + jnp.abs(jnp.concatenate([jnp.zeros(1), _numbers()]))
    return jax.lax.scan(again, (step, jnp.broadcast_to(guess[:, None], (len(guess), rows))), length=START_ROUNDS)[0]


def _refit(H, Hw, symbols, step, level_bits):
    """argmin over the steps of (w - q) H (w - q)', [rows], rounded; rows without symbols keep theirs."""
    number = symbols.astype(jnp.int32) - MOST_STEPS
    u = jnp.where(symbols == 0, 0, jnp.where(number <= 0, number - 1, number)).astype(jnp.float32)
    uu, uw = sum_columns(lambda u, hu, hw: (u * hu, u * hw), u.shape[1], u, matmul(H, u), Hw)
    fitted = coarse(jnp.where(uu > 0, uw / jnp.where(uu > 0, uu, 1.0), 0.0), level_bits)
    return jnp.where(fitted > 0, fitted, step)
