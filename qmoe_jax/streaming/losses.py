"""What a streamed pass comes to."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class DocumentLosses(NamedTuple):
    """Cross-entropy in nats, per document."""

    total: np.ndarray  # float64 [documents], summed over predicted tokens
    tokens: np.ndarray  # int64 [documents], predicted tokens

    def summary(self) -> dict[str, Any]:
        """`loss`, the mean per predicted token, and `loss_paper`.

        The paper weights each document's mean over its L - 1 predicted tokens by its length L.
        """
        weight = self.tokens + 1
        return {
            "loss": float(self.total.sum() / self.tokens.sum()),
            "loss_paper": float(np.sum(weight * self.total / self.tokens) / weight.sum()),
            "num_documents": len(self.tokens),
            "num_tokens": int(self.tokens.sum()),
        }
