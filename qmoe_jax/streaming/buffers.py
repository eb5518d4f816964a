"""List buffers (paper, section 3.2): vectors of all tokens of all documents, end to end on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike, DTypeLike

from qmoe_jax import scratch


class ListBuffer:
    """Vectors of all tokens of all documents, end to end: `data` [tokens, width]; one document's are consecutive.

    In memory, or in a file below `folder`.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: DTypeLike, folder: str | None = None):
        self.lengths = np.asarray(lengths)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        # One more row, always zero: padding is read from there.
        shape = (int(self.offsets[-1]) + 1, width)
        self._mapped = None if folder is None else scratch.MappedArray(folder, shape, dtype)
        self._rows = np.zeros(shape, dtype) if self._mapped is None else self._mapped.array
        self.data = self._rows[:-1]

    def positions(self, documents: np.ndarray, length: int) -> np.ndarray:
        """Row of each token of padded documents: [batch, length]; padding is the last row (documents -1: only that)."""
        steps = np.arange(length)
        lengths = np.where(documents >= 0, self.lengths[documents], 0)
        rows = self.offsets[documents][:, None] + steps
        return np.where(steps < lengths[:, None], rows, len(self.data))

    def get(self, positions: np.ndarray) -> np.ndarray:
        return self._rows[positions]

    def put(self, positions: np.ndarray, values: ArrayLike) -> None:
        real = positions < len(self.data)
        self._rows[positions[real]] = np.asarray(values)[real]

    def release(self) -> None:
        """Gives back the memory of what is in a file as well."""
        if self._mapped is not None:
            self._mapped.release()

    def check_finite(self, layer: str, positions: np.ndarray, values: np.ndarray) -> None:
        """Raises ValueError, naming layer and document, unless values [..., width] of rows `positions` are finite."""
        if np.isfinite(values.sum(dtype=np.float64)):
            return
        bad = np.unique(positions[~np.isfinite(values).all(-1)])
        bad = bad[bad < len(self.data)]
        if len(bad):
            document = int(np.searchsorted(self.offsets, bad[0], side="right")) - 1
            raise ValueError(
                f"{layer}: activations of document {document}, token {bad[0] - self.offsets[document]}, are NaN or Inf "
                f"({len(bad)} tokens here). Nothing is computed from them: take float32 for activations, or look at "
                "the document and the checkpoint."
            )


class OwnRows(NamedTuple):
    """This process's rows of an array [tokens, width]: values [n, width] are its rows `rows`, rising; None: all."""

    values: np.ndarray
    rows: np.ndarray | None
    tokens: int


class Rows:
    """Some rows of an array [tokens, width], by their index in it; the others read as zeros.

    Args:
      index: of the rows, rising.
      values: [rows, width].
      tokens: how many rows the array has.
    """

    def __init__(self, index: np.ndarray, values: np.ndarray, tokens: int):
        self.index, self.shape = index, (tokens, values.shape[1])
        self._values = np.concatenate([values, np.zeros_like(values, shape=(1, values.shape[1]))])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        at = np.searchsorted(self.index, rows)
        there = np.append(self.index, -1)[at] == rows
        return self._values[np.where(there, at, len(self.index))]
