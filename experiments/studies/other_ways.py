"""Other ways to few bits, each in a page of NumPy, to be measured beside this project's: see `studies/methods.py`.

All are written from their papers' equations, for one expert's matrix W [out, in] with H [in, in] of its inputs, in
float64. Bits are counted in their favour: symbols by their empirical entropy, as an ideal code would store them, and
what a method keeps beside them as it says. None of the numbers here are of the methods' own programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qmoe_jax.quantization.account import entropy

DAMPING = 0.1  # of H's mean diagonal, as everywhere in this project
SCALE_BITS = 16


class Result(NamedTuple):
    """A matrix as a method leaves it, and what it takes.

    Attributes:
      Q: [out, in].
      bits: in all, of the whole matrix.
    """

    Q: np.ndarray
    bits: float


def damped(H: np.ndarray) -> np.ndarray:
    """H with something on its diagonal; 1 where nothing was seen at all."""
    mean = float(np.mean(np.diag(H)))
    return H + (DAMPING * mean if mean > 0 else 1.0) * np.eye(len(H))


def error_feedback(
    W: np.ndarray, H: np.ndarray, quantize: Callable[[int, np.ndarray, float], np.ndarray]
) -> np.ndarray:
    """GPTQ's loop (Frantar et al. 2022): each column's error is taken up by the columns that are still to come.

    Args:
      W: [out, in].
      H: [in, in].
      quantize: of a column's number, its values by now [out] and U[i, i]: the values that are kept.
    """
    U = np.linalg.cholesky(np.linalg.inv(damped(H))).T  # H^-1 = U' U
    W, Q = W.copy(), np.empty_like(W)
    for i, column in enumerate(U):
        Q[:, i] = quantize(i, W, column[i])
        W[:, i:] -= np.outer((W[:, i] - Q[:, i]) / column[i], column[i:])
    return Q


# --- Half-quadratic quantization -------------------------------------------------------------------------------------


def half_quadratic(W: np.ndarray, levels: int, group: int, steps: int = 20, p: float = 0.7) -> Result:
    """HQQ (Badri and Shaji 2023): zeros of groups for a sparse error, sum |W - Q|^p, without any data.

    With the scale s of a group fixed by its extremes, error E and zero z are found in turn:
    E = shrink(W - s (q - z)), z = mean(q - (W - E) / s).

    Args:
      W: [out, in].
      levels: values of a weight.
      group: consecutive weights of a row that share scale and zero, 16 bits each.
      steps: at most.
      p: of the norm.
    """
    padded = np.pad(W, ((0, 0), (0, -W.shape[1] % group)), mode="edge")
    G = padded.reshape(len(W), -1, group)
    low, high = G.min(-1, keepdims=True), G.max(-1, keepdims=True)
    s = np.maximum(high - low, 1e-12) / (levels - 1)
    z, beta, best = -low / s, 10.0, np.inf
    kept = (s, z)
    for _ in range(steps):
        q = np.clip(np.round(G / s + z), 0, levels - 1)
        E = G - s * (q - z)
        error = float(np.mean(np.abs(E)))
        if error >= best:
            break
        best, kept = error, (s, z)
        size = np.abs(E)
        E = np.sign(E) * np.maximum(size - np.maximum(size, 1e-8) ** (p - 1) / beta, 0)
        z, beta = np.mean(q - (G - E) / s, axis=-1, keepdims=True), 1.01 * beta
    s, z = (a.astype(np.float16).astype(float) for a in kept)
    q = np.clip(np.round(G / s + z), 0, levels - 1)
    shape = padded.shape
    symbols = q.astype(np.int64).reshape(shape)[:, : W.shape[1]]
    bits = entropy(symbols) * symbols.size + 2 * SCALE_BITS * s.size
    return Result((s * (q - z)).reshape(shape)[:, : W.shape[1]], bits)


# --- Groups, and outliers at high precision --------------------------------------------------------------------------


def sparse_outliers(
    W: np.ndarray, H: np.ndarray, levels: int, share: float = 0.01, group: int = 16, meta_bits: int = 3
) -> Result:
    """SpQR (Dettmers et al. 2023): GPTQ to small groups' own grids, but for few weights, which stay as they are.

    Outliers are those that a first round to the grids costs most, (w - q)^2 / U[i, i]^2. Scales and zeros of `group`
    consecutive weights have `meta_bits` bits each, on a grid of 16-bit scale and zero for every 16 rows.

    Args:
      W: [out, in].
      H: [in, in].
      levels: values of a weight.
      share: of outliers; each takes 32 bits, value and place.
      group, meta_bits: see above.
    """
    U = np.linalg.cholesky(np.linalg.inv(damped(H))).T
    cost = np.empty_like(W)
    for start in range(0, W.shape[1], group):
        part = W[:, start : start + group]
        s, z = _grids(part, np.zeros(part.shape, bool), levels, meta_bits)
        q = np.clip(np.round(part / s + z), 0, levels - 1)
        cost[:, start : start + group] = (part - s * (q - z)) ** 2 / np.diag(U)[start : start + group] ** 2
    outlier = cost > np.quantile(cost, 1 - share)
    symbols = np.zeros(W.shape, np.int64)
    s = z = np.ones((len(W), 1))

    def quantize(i, W, _):
        nonlocal s, z
        if i % group == 0:
            s, z = _grids(W[:, i : i + group], outlier[:, i : i + group], levels, meta_bits)
        q = np.clip(np.round(W[:, i] / s[:, 0] + z[:, 0]), 0, levels - 1)
        symbols[:, i] = q
        return np.where(outlier[:, i], W[:, i], s[:, 0] * (q - z[:, 0]))

    Q = error_feedback(W, H, quantize)
    groups = len(W) * -(-W.shape[1] // group)
    grids = 2 * meta_bits * groups + 4 * SCALE_BITS * -(-groups // 16)
    return Result(Q, entropy(symbols[~outlier]) * symbols.size + grids + 32 * int(outlier.sum()))


def _grids(part: np.ndarray, outlier: np.ndarray, levels: int, meta_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of each row of a group [out, group], themselves on a grid for every 16 rows: [out, 1]."""
    middle = np.median(part, axis=1, keepdims=True)
    inner = np.where(outlier, middle, part)
    low, high = inner.min(1), inner.max(1)
    s = _on_grid(np.maximum(high - low, 1e-12) / (levels - 1), meta_bits)
    z = _on_grid(-low / s, meta_bits)
    return s[:, None], z[:, None]


def _on_grid(values: np.ndarray, bits: int) -> np.ndarray:
    """values [out] > 0, each 16 on 2^bits values from the least to the largest of them."""
    found = np.empty_like(values)
    for start in range(0, len(values), 16):
        v = values[start : start + 16]
        step = max((v.max() - v.min()) / (2**bits - 1), 1e-12)
        found[start : start + 16] = v.min() + step * np.round((v - v.min()) / step)
    return np.maximum(found, 1e-12)


# --- Incoherence -----------------------------------------------------------------------------------------------------


def rotation(n: int, seed: int) -> np.ndarray:
    """A random orthogonal matrix [n, n] as QuIP# has it: Hadamard's, times random signs (Tseng et al. 2024).

    Where n isn't a power of two, the odd factor is a random orthogonal matrix.
    """
    random = np.random.default_rng(seed)
    R, odd = np.ones((1, 1)), n
    while odd % 2 == 0:
        R, odd = np.kron(R, np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)), odd // 2
    Q, _ = np.linalg.qr(random.standard_normal((odd, odd)))
    return np.kron(Q, R) * random.choice([-1.0, 1.0], n)


class Turned(NamedTuple):
    """W and H in a basis in which no weight and no direction stands out: U W V', V H V'."""

    W: np.ndarray
    H: np.ndarray
    U: np.ndarray
    V: np.ndarray

    def back(self, Q: np.ndarray) -> np.ndarray:
        return self.U.T @ Q @ self.V


def turned(W: np.ndarray, H: np.ndarray, seed: int) -> Turned:
    U, V = rotation(len(W), seed), rotation(len(H), seed + 1)
    return Turned(U @ W @ V.T, V @ H @ V.T, U, V)


# --- Pruning of whole experts ----------------------------------------------------------------------------------------


def reap(norms: np.ndarray, gates: np.ndarray) -> float:
    """REAP's score of an expert (Lasby et al. 2025): mean of gate times output norm over its tokens; 0 without any."""
    return float(np.mean(gates * norms)) if len(gates) else 0.0
