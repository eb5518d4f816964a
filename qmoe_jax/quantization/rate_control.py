"""One Lagrangian for a target rate, found while the model streams by.

The rate that a Lagrangian gives is known only when matrices are quantized, and one Lagrangian should serve all of
them, of which the later ones have not been seen. So before a layer's matrices of one name are quantized, a sample of
their rows is, at a few Lagrangians at once, and encoded. That gives a piece of the curve bits(lambda) of this layer;
those of earlier layers, each moved to what the whole layer came to, stand for the layers still to come. The Lagrangian
is the one for which all that is left, at these rates, uses up what the target leaves:

    weights bits(lambda) + sum over names (weights left) (mean bits of earlier layers)(lambda) = bits allowed

where a matrix that is yet to come in the same layer counts by the layers that were like this one so far.
It depends on whole layers only, never on how experts are grouped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Lagrangians of one trial, in log2: about the one that is likely, and about one that is a guess.
TRIAL = (-2.25, -0.75, 0.75, 2.25)
FIRST_TRIAL = (-6.0, -2.0, 2.0, 6.0)
MOST_TRIALS = 4
MOST_STEP = 4.0  # beyond all that were tried
CLOSE = 0.15  # nearer than this to one that was tried, no other trial is needed
BRACKET = 1.5  # nor between two that are no farther than this from each other
MOST_RISE, MOST_FALL = 1.0, 3.0  # above and below all Lagrangians so far; at first it may jump
LAST_RISE, LAST_FALL = 2.0, 6.0  # likewise in the last layer, which has to make up for what all others came to
# Where too much was spent, what is left is taken for at least this share of the whole, so that the last matrices don't
# pay for everything.
LEAST_LEFT = 0.08
LIKE = 0.1  # bits; layers that differ by less count about equally
STEEPEST, FLATTEST = -1.0, -0.02  # bits for each power of two
MOST_BITS = 4.0


class RateControl:
    """Finds the Lagrangians of whole layers' matrices, told what became of each.

    Args:
      target_bits: per weight, as stored, over all matrices.
      weights: by matrix name, how many weights of the model are in matrices of that name.
    """

    def __init__(self, target_bits: float, weights: dict[str, int]):
        self.allowed = target_bits * sum(weights.values())  # bits that are left
        self.target_bits, self.left, self.total = target_bits, dict(weights), sum(weights.values())
        self.curves: dict[str, list[Curve]] = {m: [] for m in weights}  # of each layer so far
        self.begun: dict[str, float] = {}  # bits that matrices of the present layer will come to, by their trials
        self.logs: list[float] = []  # log2 of all Lagrangians so far

    def find(
        self, matrix: str, weights: int, guess: float, rates: Callable[[Sequence[float]], Sequence[float]]
    ) -> float:
        """The Lagrangian for all matrices of this name in the next layer.

        Args:
          matrix: the name.
          weights: how many they are in this layer.
          guess: where to begin if there is nothing to go by.
          rates: from as many Lagrangians as a trial has to the stored bits per weight of a sample of them at each.
        """
        self.left[matrix] -= weights
        curve = Curve()
        self.curves[matrix].append(curve)
        low, high = -100.0, 100.0
        if len(self.logs) >= len(self.left):
            last = not self.left[matrix]
            low = min(self.logs) - (LAST_FALL if last else MOST_FALL)
            high = max(self.logs) + (LAST_RISE if last else MOST_RISE)
        trial, wanted = (TRIAL, self.logs[-1]) if self.logs else (FIRST_TRIAL, math.log2(max(guess, 1e-30)))
        for _ in range(MOST_TRIALS):
            logs = [wanted + step for step in trial]
            for log, bits in zip(logs, rates([2.0**log for log in logs]), strict=True):
                curve.add(log, bits)
            wanted = min(self._solve(matrix, weights, 0.0), self._solve(matrix, weights, LEAST_LEFT))
            wanted = min(max(wanted, low), high)
            if curve.knows(wanted):
                break
            trial, wanted = TRIAL, min(max(wanted, curve.logs[0] - MOST_STEP), curve.logs[-1] + MOST_STEP)
        self.logs.append(wanted)
        self.begun[matrix] = weights * curve(wanted)
        return 2.0**wanted

    def _solve(self, now: str, weights: int, least_left: float) -> float:
        """log2 of the Lagrangian at which everything fits, by bisection: bits fall."""
        curve = self.curves[now][-1]
        # Beyond what is left, as if the model began anew.
        more = max(0.0, least_left - (sum(self.left.values()) + weights) / self.total)
        allowed = self.allowed - sum(self.begun.values()) + more * self.target_bits * self.total

        def bits(log: float) -> float:
            total = weights * curve(log)
            for matrix in self.left:
                left = self.left[matrix] + more * self.total / len(self.left)
                if len(self.curves[matrix]) < len(self.curves[now]):  # It is yet to come in this layer too.
                    total += weights * self._by_likeness(matrix, log)
                    left -= weights
                curves = self.curves[matrix]
                total += left * (float(np.mean([c(log) for c in curves])) if curves else self.target_bits)
            return total

        low, high = -110.0, 110.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if bits(middle) > allowed else (low, middle)
        return low

    def _by_likeness(self, matrix: str, log: float) -> float:
        """Bits of this layer's matrix of a name that is yet to come: of earlier ones, by how like their layers are."""
        earlier = self.curves[matrix]
        if not earlier:
            return self.target_bits
        known = [c for c in self.curves.values() if len(c) > len(earlier)]
        apart = [sum(abs(c[i](log) - c[-1](log)) for c in known) for i in range(len(earlier))]
        return float(np.average([c(log) for c in earlier], weights=1 / (LIKE + np.array(apart))))

    def spent(self, matrix: str, bits: float, weights: int) -> None:
        """Tells what all matrices of this name in the layer came to, in bits per weight."""
        expected = self.begun.pop(matrix)
        self.curves[matrix][-1].move(bits - expected / weights)
        self.allowed -= bits * weights

    def state(self) -> dict[str, Any]:
        """As JSON values, between two layers."""
        curves = {m: [[c.logs, c.bits] for c in curves] for m, curves in self.curves.items()}
        return {"allowed": self.allowed, "left": self.left, "curves": curves, "logs": self.logs, "total": self.total}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self.allowed, self.left, self.total = state["allowed"], dict(state["left"]), state["total"]
        self.logs = list(state["logs"])
        self.curves = {m: [Curve(*c) for c in curves] for m, curves in state["curves"].items()}


class Curve:
    """Bits per weight against log2 of the Lagrangian, falling; through the points that are known."""

    def __init__(self, logs: Sequence[float] = (), bits: Sequence[float] = ()):
        self.logs, self.bits = list(logs), list(bits)
        self._between: Callable[[float], Any] | None = None  # made when it is asked for

    def add(self, log: float, bits: float) -> None:
        if any(abs(log - known) < CLOSE / 2 for known in self.logs):
            return
        at = int(np.searchsorted(self.logs, log))
        self.logs.insert(at, log)
        self.bits.insert(at, bits)
        self._between = None

    def move(self, by: float) -> None:
        self.bits = [b + by for b in self.bits]
        self._between = None

    def knows(self, log: float) -> bool:
        """Whether points are so near that no other is needed."""
        at = int(np.searchsorted(self.logs, log))
        inside = 0 < at < len(self.logs) and self.logs[at] - self.logs[at - 1] <= BRACKET
        return inside or min(abs(log - known) for known in self.logs) < CLOSE

    def __call__(self, log: float) -> float:
        logs, bits = self.logs, np.minimum.accumulate(self.bits)
        if logs[0] < log < logs[-1]:
            if self._between is None:
                from scipy.interpolate import PchipInterpolator  # 45 MB that other methods don't need

                self._between = PchipInterpolator(logs, bits)  # monotone, as the points are
            return float(self._between(log))
        end = 0 if log <= logs[0] else -1
        # Where rates are low, a power of two takes about a third of them; where they are high, half a bit.
        slope = -min(0.35 * bits[end], 0.5)
        if len(logs) > 1:
            near = (0, 1) if end == 0 else (-2, -1)
            slope = (bits[near[1]] - bits[near[0]]) / max(logs[near[1]] - logs[near[0]], CLOSE)
        slope = min(max(slope, STEEPEST), FLATTEST)
        return float(np.clip(bits[end] + slope * (log - logs[end]), 0.0, MOST_BITS))
