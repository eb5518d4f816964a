"""Stored arrays by name, of which only an index is read when they are opened; nothing here knows a model."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from qmoe_jax.checkpoints.reading import Source

Entry = int | slice | types.EllipsisType
Index = Entry | tuple[Entry, ...]


class Store(Protocol):
    """Stored arrays.

    Attributes:
      path: where they are.
      specs: shape and dtype of each, by name.
      described: what the files tell of the model, as JSON values.
    """

    @property
    def path(self) -> str: ...
    @property
    def specs(self) -> Mapping[str, jax.ShapeDtypeStruct]: ...
    @property
    def described(self) -> Mapping[str, Any]: ...

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A slice (NumPy's basic indexing), as stored; no more is read. Raises CheckpointError."""
        ...

    def source(self, name: str) -> Source | None:
        """An array of all experts of a layer, opened, with the grid of its chunks; None: it isn't in chunks."""
        ...


def explicit(index: Index, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """NumPy's basic indexing with one entry per axis: integers from 0 on, and slices with all their bounds.

    Raises IndexError for what is out of bounds.
    """
    entries: list[Any] = list(index) if isinstance(index, tuple) else [index]
    at = next((i for i, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    rest = entries[at + 1 :]
    entries = entries[:at] + [slice(None)] * (len(shape) - at - len(rest)) + rest
    if len(entries) != len(shape):
        raise IndexError(f"Index {index} has too many entries for shape {shape}.")
    found: list[int | slice] = []
    for entry, size in zip(entries, shape, strict=True):
        if isinstance(entry, slice):
            bounds = entry.indices(size)
            found.append(slice(*bounds) if len(range(*bounds)) else slice(0, 0))
        else:
            found.append(range(size)[entry])
    return tuple(found)


def box_of(index: Index, shape: tuple[int, ...]) -> tuple[tuple[range, ...], tuple[int | slice, ...]]:
    """The smallest box that holds all that `index` selects, and what is to be selected of it."""
    box: list[range] = []
    rest: list[int | slice] = []
    for entry in explicit(index, shape):
        if isinstance(entry, int):
            box.append(range(entry, entry + 1))
            rest.append(0)
        else:
            wanted = range(entry.start, entry.stop, 1 if entry.step is None else entry.step)
            box.append(range(min(wanted), max(wanted) + 1) if wanted else range(0))
            rest.append(slice(None, None, wanted.step))
    return tuple(box), tuple(rest)


def slices(box: tuple[range, ...]) -> tuple[slice, ...]:
    return tuple(slice(r.start, r.stop) for r in box)
