"""One Lagrangian for a target rate, found while the model streams by.

The rate that a Lagrangian gives is known only when a matrix is quantized, and one Lagrangian should serve all matrices,
of which the later ones have not been seen. What is known cheaply is the curve of a matrix: the entropy of its symbols
against the Lagrangian for plain scalar quantization of some of its rows, weighted by H's diagonal. Quantizing then
gives what it gives at another Lagrangian, as correlated inputs make errors cheaper, and bits besides, for levels and
offsets; both differ little from group to group, and are learnt:

    bits(lambda) = curve(shift * lambda) + extra

The Lagrangian is the one for which all that is still to come, taken for like what has been, uses up what the target
leaves. So it settles early, and the last groups make good what the first ones missed. Before a layer's first matrices
are quantized, those of a few experts are, as a trial.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.quantization.rate_distortion import start_entropy

# Of the curve: Lagrangians relative to the mean weighted square of a weight, and rows of each matrix.
POINTS = 2.0 ** np.arange(-14, 5)
ROWS = 32
# What is left is taken for at least this share of the whole, so that the last group isn't made to pay for everything.
LEAST_LEFT = 0.08
# From one matrix to the next the Lagrangian changes by this factor at most.
MOST_CHANGE = 2.0
MEMORY = 0.5  # of the last group in what is learnt
MOST_SHIFT = 3.0  # powers of two
INFORMATIVE = (0.03, 1.5)  # entropies that tell where on its curve a matrix is


class RateControl:
    """Finds Lagrangians for matrices, told what became of each.

    Args:
      target_bits: per weight, as stored, over all matrices.
      weights: by matrix name (wi, wo, ...), how many weights of the model are in matrices of that name.
    """

    def __init__(self, target_bits: float, weights: dict[str, int]):
        self.target_bits, self.weights, self.left = target_bits, dict(weights), dict(weights)
        self.bits_spent = 0.0
        self.last: float | None = None
        self.kinds: dict[str, _Kind] = {}

    def see(self, matrix: str, W: jax.Array, H: jax.Array, importance: jax.Array | None) -> None:
        """Takes note of the matrices to come, W [experts, rows, columns], with Hessians H and the rows' importance."""
        self.kinds.setdefault(matrix, _Kind()).add_curve(W, H, importance)

    def lagrangian(self) -> float:
        """For the matrices seen last."""
        total, left = sum(self.weights.values()), sum(self.left.values())
        more = max(0.0, LEAST_LEFT * total - left)  # beyond the last group, as if the model began anew
        share = {m: self.left[m] + more * n / total for m, n in self.weights.items()}
        allowed = self.target_bits * (total + more) - self.bits_spent

        def bits(log_lagrangian: float) -> float:  # Of names not seen yet, the target is expected.
            expected = {m: k.bits(log_lagrangian) for m, k in self.kinds.items()}
            return sum(n * expected.get(m, self.target_bits) for m, n in share.items())

        low, high = -60.0, 60.0  # of log2; bits fall
        if all(self.left[m] < n for m, n in self.weights.items()):  # At first it may jump.
            low, high = math.log2(self.last / MOST_CHANGE), math.log2(self.last * MOST_CHANGE)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if bits(middle) > allowed else (low, middle)
        return 2.0**low

    def learn(self, matrix: str, lagrangian: float, entropy: float, stored: float) -> None:
        """Tells what a trial came to: entropy of the symbols and stored bits, per weight."""
        self.kinds[matrix].learn(math.log2(lagrangian), entropy, stored, 1.0)

    def spent(self, matrix: str, lagrangian: float, entropy: float, stored: float, weights: int) -> None:
        """Tells what the matrices seen last came to, and how many weights they have."""
        self.kinds[matrix].learn(math.log2(lagrangian), entropy, stored, MEMORY)
        self.last = lagrangian
        self.left[matrix] -= weights
        self.bits_spent += stored * weights


class _Kind:
    """Matrices of one name: their mean curve, bits [points] against log2 of the Lagrangian, and what was learnt."""

    def __init__(self):
        self.log_shift = self.extra = 0.0
        self.curves: list[tuple[np.ndarray, np.ndarray]] = []

    def add_curve(self, W, H, importance) -> None:
        scale, bits = _curve(W, H, jnp.ones(W.shape[:2]) if importance is None else importance)
        falling = np.maximum.accumulate(np.asarray(bits, np.float64)[::-1])[::-1]
        self.curves.append((np.log2(np.maximum(np.float64(scale), 1e-30) * POINTS), falling))

    def bits(self, log_lagrangian: float) -> float:
        at = log_lagrangian + self.log_shift
        return float(np.mean([np.interp(at, x, y) for x, y in self.curves])) + self.extra

    def learn(self, log_lagrangian: float, entropy: float, stored: float, rate: float) -> None:
        x, y = self.curves[-1]
        found = np.interp(entropy, y[::-1], x[::-1])  # where the curve has as many bits
        if INFORMATIVE[0] < entropy < INFORMATIVE[1]:  # Elsewhere curves are flat.
            change = np.clip(found - log_lagrangian, -MOST_SHIFT, MOST_SHIFT) - self.log_shift
            self.log_shift += rate * change
        self.extra += rate * (stored - entropy - self.extra)


@functools.partial(jax.jit, static_argnames="rows")
def _curve(W, H, importance, rows: int = ROWS):
    """Mean weighted square of a weight, and entropy [points] at POINTS times that."""
    step = max(1, W.shape[1] // rows)
    W, importance = W[:, ::step], importance[:, ::step]
    weight = jnp.diagonal(H, axis1=1, axis2=2)
    weight = weight + 1e-6 * weight.mean(-1, keepdims=True) + 1e-12  # [experts, columns]
    scale = jnp.mean(importance[..., None] * weight[:, None] * W**2)

    def entropy(point):
        return jax.vmap(start_entropy)(W, weight, point * scale / importance).mean()

    return scale, jax.lax.map(entropy, jnp.asarray(POINTS, jnp.float32))
