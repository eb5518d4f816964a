"""Shapes and loads, shared by tests, benchmark and tuning."""

import math

import numpy as np

# (out, in) of the paper's matrices.
SHAPES = ((768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (2080, 6144), (6144, 2080))

# (tokens, experts they are spread over).
LOADS = ((1, 1), (8, 1), (64, 1), (8, 8))

# The paper's distribution of trits.
PROBABILITIES = (0.885, 0.0575, 0.0575)


def random_trits(experts: int, out: int, width: int, seed: int = 0) -> np.ndarray:
    """Independent trits with the paper's probabilities, uint8 [experts, out, in]."""
    uniform = np.random.default_rng(seed).random((experts, out, width), np.float32)
    zero, low, _ = np.cumsum(PROBABILITIES)
    return (uniform >= zero).astype(np.uint8) + (uniform >= low)


# P(|w| > t) of weights of variance 1.
TAILS = {
    "gaussian": lambda t: math.erfc(t / math.sqrt(2)),
    "laplace": lambda t: math.exp(-t * math.sqrt(2)),
}
DEAD_ZONE = 0.6  # of a step: what is below becomes zero


def magnitudes(distribution: str, step: float) -> list[float]:
    """P(0), P(magnitude 1), ... up to 7 of weights rounded with a dead zone; the last one takes the rest."""
    beyond = [1.0, *(TAILS[distribution](step * (DEAD_ZONE + k)) for k in range(7))]
    return [a - b for a, b in zip(beyond, [*beyond[1:], 0.0], strict=True)]


def entropy(probabilities: list[float]) -> float:
    """Bits of a symbol with a sign, from `magnitudes`."""
    signs = 1 - probabilities[0]
    return signs - sum(p * math.log2(p) for p in probabilities if p > 0)


def rounded(
    distribution: str, bits: float, experts: int, out: int, width: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Independent weights rounded with a dead zone to so many bits of entropy.

    Returns:
      symbols: uint8 [experts, out, in], with L even and as many levels as the rate wants.
      levels: float32 [experts, out, L]: a scale of each row, of three bits of mantissa, times a ladder.
    """
    low, high = 1e-2, 1e2
    for _ in range(60):
        step = math.sqrt(low * high)
        low, high = (step, high) if entropy(magnitudes(distribution, step)) > bits else (low, step)
    probabilities = magnitudes(distribution, step)
    most = next(k for k in range(1, 8) if sum(probabilities[k + 1 :]) < 2e-3 * (1 - probabilities[0]) or k == 7)
    rng = np.random.default_rng(seed)
    shape = (experts, out, width)
    W = rng.standard_normal(shape, np.float32) if distribution == "gaussian" else rng.laplace(size=shape) / math.sqrt(2)
    magnitude = np.minimum(np.floor(np.abs(W) / np.float32(step) + np.float32(1 - DEAD_ZONE)), most).astype(np.int8)
    symbols = np.where(magnitude == 0, 0, np.where(W < 0, most + 1 - magnitude, most + magnitude)).astype(np.uint8)
    ladder = np.array([*range(-most, 0), *range(1, most + 1)], np.float32) / most
    scale = rng.integers(8, 16, (experts, out, 1)) * np.exp2(rng.integers(-9, -6, (experts, out, 1)))
    return symbols, (scale * ladder).astype(np.float32)
