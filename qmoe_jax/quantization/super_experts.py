"""Super experts: the few whose outputs make a model's massive activations (Su et al. 2025, arXiv:2507.23279).

Silencing them ruins a model. Found by the paper's rule: an expert whose largest |output| is above the 99.5th percentile
of all experts' of all layers, and above a tenth of the largest of all. Some expert always is; how far it is above the
median tells whether that means anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

PERCENTILE, OF_LARGEST = 99.5, 0.1


def super_experts(peaks: Mapping[str, Mapping[int, float]]) -> list[dict[str, Any]]:
    """Those of a model, the largest first, as JSON values: layer, expert, peak, and how often it has the median.

    Args:
      peaks: by layer, of each expert (`statistics.output_peaks`); without any there are no super experts.
    """
    found = [(peak, layer, e) for layer, of in peaks.items() for e, peak in of.items()]
    if not found:
        return []
    of_all = np.array([peak for peak, _, _ in found])
    least = max(np.percentile(of_all, PERCENTILE), OF_LARGEST * of_all.max())
    median = float(np.median(of_all))
    return [
        {"layer": layer, "expert": e, "peak": peak, "times_median": peak / median if median > 0 else None}
        for peak, layer, e in sorted(found, key=lambda f: -f[0])
        if peak > least
    ]
