"""One Lagrangian for a target rate, found while the model streams by.

The rate that a Lagrangian gives is known only when a matrix is quantized, and one Lagrangian should serve all matrices,
of which the later ones have not been seen. What is known cheaply is the curve of a matrix: the entropy of its symbols
against the Lagrangian for plain scalar quantization of some of its rows, weighted by H's diagonal. Quantizing then
gives what it gives at another Lagrangian, as correlated inputs make errors cheaper, and bits besides, for levels and
offsets; both differ little from group to group, and are learnt:

    bits(lambda) = curve(shift * lambda) + extra

The Lagrangian is the one for which all that is still to come, taken for like what has been, uses up what the target
leaves. So it settles early, and the last groups make good what the first ones missed.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.quantization.rate_distortion import start_entropy

# Of the curve: Lagrangians relative to the mean weighted square of a weight, and rows of each matrix.
POINTS = 2.0 ** np.arange(-14, 5)
ROWS = 32
# What is left is taken for at least this share of the whole, so that the last group isn't made to pay for everything.
LEAST_LEFT = 0.08
MEMORY = 0.5  # of the last group in what is learnt


class RateControl:
    """Finds Lagrangians for matrices, told what became of each.

    Args:
      target_bits: per weight, as stored, over all matrices.
      weights: by matrix name (wi, wo, ...), how many weights of the model are in matrices of that name.
    """

    def __init__(self, target_bits: float, weights: dict[str, int]):
        self.target_bits, self.left = target_bits, dict(weights)
        self.total = sum(weights.values())
        self.bits_spent = 0.0
        self.kinds: dict[str, _Kind] = {}

    def lagrangian(self, matrix: str, W: jax.Array, H: jax.Array, importance: jax.Array | None) -> float:
        """For the matrices W [experts, rows, columns], with Hessians H and the rows' importance [experts, rows]."""
        kind = self.kinds.setdefault(matrix, _Kind.like(self.kinds.values()))
        kind.add_curve(W, H, importance)
        left = sum(self.left.values())
        horizon = max(left, LEAST_LEFT * self.total)
        allowed = (self.target_bits * self.total - self.bits_spent + (horizon - left) * self.target_bits) / horizon

        def bits(log_lagrangian: float) -> float:
            return sum(n * self.kinds.get(m, kind).bits(log_lagrangian) for m, n in self.left.items()) / left

        low, high = -60.0, 60.0  # of log2; bits fall
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if bits(middle) > allowed else (low, middle)
        return 2.0**low

    def spent(
        self, matrix: str, lagrangian: float, symbols: np.ndarray, entropy: float, experts: CompressedExperts | None
    ) -> None:
        """Tells what became of the matrices that `lagrangian` was last called for.

        Args:
          matrix, lagrangian: of that call.
          symbols: uint8 [experts, rows, columns].
          entropy: of the symbols, bits per weight.
          experts: as stored; None: entropy is all that counts.
        """
        stored = 8 * experts.nbytes / symbols.size if experts is not None else entropy
        self.left[matrix] -= symbols.size
        self.bits_spent += stored * symbols.size
        self.kinds[matrix].learn(math.log2(lagrangian), entropy, stored)


class _Kind:
    """Matrices of one name: their mean curve, bits [points] against log2 of the Lagrangian, and what was learnt."""

    def __init__(self, log_shift: float = 0.0, extra: float = 0.0):
        self.log_shift, self.extra = log_shift, extra
        self.curves: list[tuple[np.ndarray, np.ndarray]] = []
        self.learnt = 0

    @classmethod
    def like(cls, others) -> _Kind:
        """Before anything is known: what the others have learnt."""
        known = [k for k in others if k.learnt]
        if not known:
            return cls()
        return cls(np.mean([k.log_shift for k in known]), np.mean([k.extra for k in known]))

    def add_curve(self, W, H, importance) -> None:
        scale, bits = _curve(W, H, jnp.ones(W.shape[:2]) if importance is None else importance)
        self.curves.append((np.log2(np.maximum(np.float64(scale), 1e-30) * POINTS), np.asarray(bits, np.float64)))

    def scalar_bits(self, log_lagrangian: float, curves) -> float:
        return float(np.mean([np.interp(log_lagrangian, x, y) for x, y in curves]))

    def bits(self, log_lagrangian: float) -> float:
        return self.scalar_bits(log_lagrangian + self.log_shift, self.curves) + self.extra

    def learn(self, log_lagrangian: float, entropy: float, stored: float) -> None:
        x, y = self.curves[-1]
        found = np.interp(entropy, y[::-1], x[::-1])  # where the curve has as many bits
        rate = MEMORY if self.learnt else 1.0
        self.log_shift += rate * (found - log_lagrangian - self.log_shift)
        self.extra += rate * (stored - entropy - self.extra)
        self.learnt += 1


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
