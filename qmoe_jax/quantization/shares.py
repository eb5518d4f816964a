"""What an expert's squared error counts, by how much of the layer's output it makes.

An expert's output is multiplied by its gate p, so of a layer's squared error, summed over tokens, expert e makes

    sum over its tokens of p^2 |error|^2  =  share_e * (its mean squared error, tokens weighted by p^2)

with share_e its sum of p^2. Bits of all experts would then be bought at one price if errors counted by their shares.
What the loss makes of it grows slower: tokens of rare experts count more than others, and those that a rare expert
will see in use are less like the few that it was calibrated on. So the share counts to a power (`share_power`).
"""

from __future__ import annotations

import numpy as np

UNIT = 2.0**-32  # of squared gates: sums of whole numbers don't depend on their order, or on how many processes add up
LEAST, MOST = 1e-3, 1e3  # of the layer's mean


def squared_gates(expert: np.ndarray, gate: np.ndarray, num_experts: int) -> np.ndarray:
    """Sum of squared gates of each expert, int64 [num_experts] in units of 2^-32.

    Args:
      expert: int [tokens, choices], which expert a token goes to; `num_experts`: none.
      gate: float [tokens, choices], by which its output is multiplied.
    """
    squares = np.rint(gate.astype(np.float64) ** 2 / UNIT).astype(np.int64)
    sums = np.zeros(num_experts + 1, np.int64)
    np.add.at(sums, expert.reshape(-1), squares.reshape(-1))
    return sums[:num_experts]


def weights(sums: np.ndarray, power: float) -> np.ndarray:
    """(share / mean share)^power of a layer's experts, float32 [experts]; within `LEAST` and `MOST` before the power.

    Args:
      sums: int [experts], of squared gates; any unit.
      power: 0: all count equally; 1: as a token's squared error does, whichever expert it comes from.
    """
    mean = sums.mean()
    relative = sums / mean if mean > 0 else np.ones(len(sums))
    return (np.clip(relative, LEAST, MOST) ** power).astype(np.float32)


def of_strata(weights: np.ndarray, few: int) -> np.ndarray:
    """Weights that stand for a layer's, float32 [few]: geometric means of as many parts of them, by size.

    A trial of few experts takes these instead of their own, so that it spends what the whole layer will. In the order
    of the first experts' own weights, and equal to them if all are tried.
    """
    means = [np.exp(np.mean(np.log(part))) for part in np.array_split(np.sort(weights), few)]
    found = np.empty(few, np.float32)
    found[np.argsort(weights[:few], kind="stable")] = means
    return weights[:few] if few == len(weights) else found
