"""How far quantized experts' outputs are from what they were: what compression costs each layer by itself.

    error  = sum_t g_t^2 |y_t - ŷ_t|^2,   signal = sum_t g_t^2 |y_t|^2

over the validation tokens t of an expert, which no Hessian has seen: y, ŷ are the outputs of the unquantized and of the
quantized expert on the same input, g_t is the router's probability. error / signal is the share of the output that is
lost: 0 exact, 1 as bad as no expert.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qmoe_jax.models.family import Expert
from qmoe_jax.quantization.statistics import dot

TOKENS_PER_EXPERT = 128  # Evenly spaced; the least count that leaves compression as fast as it was.


class OutputError(NamedTuple):
    """Of each expert; sums over all its validation tokens, estimated from a sample where they are many."""

    error: np.ndarray  # float64 [experts]
    signal: np.ndarray  # float64 [experts]

    def relative(self) -> list[float | None]:
        """error / signal of each expert; None where it has no validation tokens, or no output."""
        return [float(e / s) if s > 0 else None for e, s in zip(self.error, self.signal, strict=True)]

    def total(self) -> float | None:
        """That of all of them together."""
        return OutputError(self.error.sum(keepdims=True), self.signal.sum(keepdims=True)).relative()[0]


def output_error(
    expert: Expert,
    kernels: Mapping[str, jax.Array],
    quantized: Mapping[str, jax.Array],
    inputs: np.ndarray,
    tokens: Sequence[np.ndarray],
    gates: Sequence[np.ndarray],
    sharding: NamedSharding,
) -> OutputError:
    """Both experts on the same tokens.

    Args:
      expert: the MLP.
      kernels: unquantized, by name, [experts, in, out]; and biases.
      quantized: the same, float32.
      inputs: [all tokens, d_model].
      tokens: per expert, the rows of `inputs` to measure on.
      gates: per expert, its probability for each of them.
      sharding: of the expert axis.
    """
    shape = (len(tokens), TOKENS_PER_EXPERT)
    index, weight = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for e, (rows, gate) in enumerate(zip(tokens, gates, strict=True)):
        taken = min(len(rows), TOKENS_PER_EXPERT)
        sample = np.arange(taken) * len(rows) // max(taken, 1)
        index[e, :taken] = rows[sample]
        weight[e, :taken] = gate[sample] ** 2 * (len(rows) / max(taken, 1))
    X, weight = jax.device_put((inputs[index], weight), sharding)
    return OutputError(*np.asarray(_sums(expert, dict(kernels), dict(quantized), X, weight), np.float64))


@functools.partial(jax.jit, static_argnums=0)
def _sums(expert, kernels, quantized, X, weight):
    """X [experts, tokens, d_model], weight [experts, tokens] -> error and signal, [2, experts]."""
    y, approximate = _outputs(expert, kernels, X), _outputs(expert, quantized, X)
    return jnp.stack([jnp.sum(weight * jnp.sum(v**2, -1), -1) for v in (y - approximate, y)])


def _outputs(expert, kernels, X):
    """[experts, tokens, d_model]."""
    return expert(X, {m: k.astype(jnp.float32) for m, k in kernels.items()}, dot)
