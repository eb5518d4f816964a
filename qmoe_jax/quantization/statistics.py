"""What calibration tokens tell of a group of experts: weighted Hessians of their inputs and of their hidden units.

Tokens come in chunks of one size; of each chunk every expert has its own. What is found for an expert is the same to
the bit whatever experts share the group, and on however many devices, if each has at least two. X are an expert's
inputs; its hidden units are what its inner matrices and its activation make of them, and its last matrix maps back
(`family.Expert`). Kernels are [in, out].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qmoe_jax.models.family import Expert
from qmoe_jax.quantization.gptq import sum_in_pairs
from qmoe_jax.quantization.hessian import accumulate_weighted

TOKENS_PER_CHUNK = 512  # of each expert, that are on the device at once
IMPORTANCE_TOKENS = 512  # that a hidden unit's importance is taken from
SAMPLE = 256  # tokens of the layer that `shrinkage` stands for


Kernels = Mapping[str, jax.Array]


class Samples(NamedTuple):
    """Rows of the layer's inputs, and what each counts: one expert's tokens."""

    rows: np.ndarray  # int [tokens]
    weights: np.ndarray  # float32 [tokens]


def sample_rows(rows: np.ndarray, most: int = SAMPLE) -> np.ndarray:
    """Up to `most` of these rows, evenly spread; of a sample, itself."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]


def weighted_tokens(
    tokens: Sequence[np.ndarray],
    gates: Sequence[np.ndarray],
    calibration: np.ndarray,
    *,
    router_weighted: bool,
    shrinkage: float,
    sample_starved: bool = True,
    min_tokens: int = 0,
) -> list[Samples]:
    """The tokens of each expert, with weights.

    Args:
      tokens: per expert, rows of the calibration tokens routed to it.
      gates: per expert, their router probabilities. An output is multiplied by its own, so its squared error counts
        with the square.
      calibration: rows of all calibration tokens.
      router_weighted: weight by the squares, otherwise equally.
      shrinkage: weight, in the expert's mean tokens, of a sample from all calibration tokens. It gives directions that
        an expert has not seen the weight that they have in the layer.
      sample_starved: an expert without tokens of its own gets the sample in any case.
      min_tokens: an expert that has fewer gets tokens from all calibration tokens, evenly spread, for those that it
        lacks; each weighs as its own do in the mean.
    """
    weights = [g.astype(np.float32) ** 2 if router_weighted else np.ones(len(g), np.float32) for g in gates]
    sample = sample_rows(calibration)

    def with_sample(rows, weight):
        mean = weight.mean() if len(rows) else 1.0
        if len(rows) < min_tokens and len(calibration):
            more = sample_rows(calibration, min_tokens - len(rows))
            each = np.full(len(more), mean * (min_tokens - len(rows)) / len(more), np.float32)
            rows, weight = np.concatenate([rows, more]), np.concatenate([weight, each])
        total = shrinkage if len(rows) else shrinkage or float(sample_starved)
        if not total or not len(sample):
            return Samples(rows, weight)
        each = np.full(len(sample), total * mean / len(sample), np.float32)
        return Samples(np.concatenate([rows, sample]), np.concatenate([weight, each]))

    return list(map(with_sample, tokens, weights))


def input_hessians(inputs: np.ndarray, samples: Sequence[Samples], sharding: NamedSharding) -> jax.Array:
    """2/n X'X, weighted, of the inputs of the inner matrices: float32 [experts, d_model, d_model].

    Args:
      inputs: [all tokens, d_model].
      samples: per expert.
      sharding: of the expert axis.
    """
    H = _Hessian(sharding, len(samples), inputs.shape[1])
    for X, weight, n, total in _chunks(inputs, samples, sharding):
        H.add(n, X, weight, total)
    return H.whole()


def hidden_importance(
    expert: Expert, kernels: Kernels, inputs: np.ndarray, samples: Sequence[Samples], sharding: NamedSharding
) -> dict[str, jax.Array]:
    """What the squared error of each hidden unit counts in the output: float32 [experts, d_ff], by inner matrix.

    An error of unit j's sum comes out as error * activation'(sum) * last[j]: its square counts |last[j]|^2 times the
    mean square of the derivative over the expert's tokens, of which a sample tells enough. At least a thousandth of the
    mean.
    """
    spread = [np.linspace(0, len(s.rows) - 1, min(IMPORTANCE_TOKENS, len(s.rows))).astype(int) for s in samples]
    samples = [Samples(s.rows[i], s.weights[i]) for s, i in zip(samples, spread, strict=True)]
    experts, d_ff, _ = kernels[expert.last].shape
    slopes = _zeros(sharding, experts, len(expert.inner), d_ff)
    for X, weight, n, total in _chunks(inputs, samples, sharding):
        slopes = _accumulate_slopes(expert, slopes, n, kernels, X, weight, total)
    return dict(zip(expert.inner, _importance(slopes, kernels[expert.last]), strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _accumulate_slopes(expert, slopes, n, kernels, X, weight, total):
    sums = jnp.stack([expert.product(m, X, kernels, dot) for m in expert.inner])  # [matrices, experts, tokens, d_ff]
    _, derivative = jax.vjp(lambda s: expert.activation(list(s)), sums)
    (slope,) = derivative(jnp.ones(sums.shape[1:], sums.dtype))
    new = sum_in_pairs(jnp.moveaxis(slope**2 * weight[..., None], 2, 0))  # [matrices, experts, d_ff]
    per_token = 1 / jnp.where(total > 0, total, 1.0)
    added = slopes * (n * per_token)[:, None, None] + per_token[:, None, None] * new.swapaxes(0, 1)
    return jnp.where((total > n)[:, None, None], added, slopes)


@jax.jit
def _importance(slopes, last):
    squares = sum_in_pairs(jnp.moveaxis(last.astype(jnp.float32) ** 2, 2, 0))  # [experts, d_ff]
    found = slopes * squares[:, None]  # [experts, matrices, d_ff]
    mean = sum_in_pairs(jnp.moveaxis(found, 2, 0))[..., None] / found.shape[-1]
    found = jnp.where(mean > 0, jnp.maximum(found, 1e-3 * mean), 1.0)
    return list(jnp.unstack(found, axis=1))


def hidden_statistics(
    expert: Expert,
    kernels: Kernels,
    now: Kernels,
    inputs: np.ndarray,
    samples: Sequence[Samples],
    sharding: NamedSharding,
    *,
    residuals: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Statistics of the last matrix's inputs, which are those that the (quantized) inner matrices make.

    Args:
      expert: the MLP.
      kernels: by name, float32 [experts, in, out], unquantized; and biases.
      now: those that make the hidden units.
      inputs, samples, sharding: as in `input_hessians`.
      residuals: whether R is wanted.

    Returns:
      H = 2/n sum of â â', [experts, d_ff, d_ff], for the hidden units â that `now` makes; and, or None,
      R = 2/n sum of W (a - â) â', [experts, d_model, d_ff], where a are the unquantized expert's, W its last matrix.
    """
    experts, d_ff, d_model = kernels[expert.last].shape
    H, R = _Hessian(sharding, experts, d_ff), _zeros(sharding, experts, d_model, d_ff)
    for X, weight, n, total in _chunks(inputs, samples, sharding):
        found = _hidden(expert, X, now)
        H.add(n, found, weight, total)
        if residuals:
            R = _add(R, n, _lacking(expert, X, found, kernels), found, weight, total)
    return H.whole(), R if residuals else None


def output_peaks(
    expert: Expert, kernels: Kernels, inputs: np.ndarray, samples: Sequence[Samples], sharding: NamedSharding
) -> np.ndarray:
    """The largest |output| that an expert has for any of its tokens, before gates: float32 [experts].

    Massive activations of a whole model come from few experts' outputs (Su et al. 2025, arXiv:2507.23279).
    """
    peaks = np.zeros(len(samples), np.float32)
    for X, weight, _, _ in _chunks(inputs, samples, sharding):
        peaks = np.maximum(peaks, _largest_outputs(expert, X, kernels, weight))
    return peaks


@functools.partial(jax.jit, static_argnums=0)
def _largest_outputs(expert, X, kernels, weight):
    kernels = {m: k.astype(jnp.float32) for m, k in kernels.items()}
    return jnp.max(jnp.abs(expert(X, kernels, dot)) * (weight > 0)[..., None], axis=(1, 2))


class _Hessian:
    """Sums of which only blocks from the diagonal on are computed; those below are their transposes."""

    PANELS = 4  # 5/8 of the work; of narrow ones it is less than compiling four programs takes
    NARROW = 1024

    def __init__(self, sharding: NamedSharding, experts: int, columns: int):
        width = columns if columns < self.NARROW else -(-columns // self.PANELS)
        self.starts = range(0, columns, width)
        self.panels = [_zeros(sharding, experts, min(width, columns - s), columns - s) for s in self.starts]

    def add(self, n, X, weight, total) -> None:
        """As `accumulate_weighted`, X [experts, tokens, columns]."""
        for k, (start, S) in enumerate(zip(self.starts, self.panels, strict=True)):
            self.panels[k] = _add_panel(S, n, X, weight, total, start)

    def whole(self) -> jax.Array:
        """float32 [experts, columns, columns]."""
        return _from_panels(self.panels)


@functools.partial(jax.jit, static_argnames="start", donate_argnums=0)
def _add_panel(S, n, X, weight, total, start):
    return accumulate_weighted(S, n, X[..., start : start + S.shape[1]], X[..., start:], weight, total)


_add = jax.jit(accumulate_weighted, donate_argnums=0)


@jax.jit
def _from_panels(panels):
    columns = panels[0].shape[2]
    wide = [jnp.pad(S, ((0, 0), (0, 0), (columns - S.shape[2], 0))) for S in panels]
    upper = jnp.triu(jnp.concatenate(wide, axis=1))
    return upper + jnp.triu(upper, 1).swapaxes(1, 2)


def dot(X: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Every expert's own tokens: X [experts, tokens, in], kernel [experts, in, out]."""
    Y = jnp.einsum("eti,eio->eto", X.astype(jnp.float32), kernel, precision="highest")
    return Y if bias is None else Y + bias[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _hidden(expert, X, kernels):
    return expert.hidden(X, kernels, dot)


@functools.partial(jax.jit, static_argnums=0)
def _lacking(expert, X, now, kernels):
    hidden = _hidden(expert, X, kernels)
    return jnp.einsum("etf,efo->eto", hidden - now, kernels[expert.last], precision="highest")


def _zeros(sharding, experts, rows, columns):
    return jax.device_put(jnp.zeros((experts, rows, columns)), sharding)


def _chunks(inputs, samples: Sequence[Samples], sharding) -> Iterator[tuple[jax.Array, ...]]:
    """X [experts, chunk, d_model], weights [experts, chunk], and their sums before and after it, until all have come.

    A chunk has the same shape in every group, as the order in which a product adds up depends on it.
    """
    most = max(len(s.rows) for s in samples)
    n = np.zeros(len(samples), np.float32)
    for first in range(0, most, TOKENS_PER_CHUNK):
        index = np.zeros((len(samples), TOKENS_PER_CHUNK), np.int64)
        weight = np.zeros((len(samples), TOKENS_PER_CHUNK), np.float32)
        total = n.copy()
        for e, (rows, weights) in enumerate(samples):
            rows, weights = rows[first : first + TOKENS_PER_CHUNK], weights[first : first + TOKENS_PER_CHUNK]
            index[e, : len(rows)] = rows
            weight[e, : len(rows)] = weights
            total[e] += weights.sum()
        yield jax.device_put((inputs[index], weight, n, total), sharding)
        n = total
