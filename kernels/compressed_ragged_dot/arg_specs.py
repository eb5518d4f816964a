"""Shapes and loads, shared by tests, benchmark and tuning."""

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
