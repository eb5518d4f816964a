"""What codecs check alike: symbols to encode, and stored arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np


def checked_symbols(symbols: jax.Array | np.ndarray, num_levels: int, held: Sequence[int]) -> np.ndarray:
    """Symbols uint8 [experts, out, in] as NumPy's.

    Raises ValueError for another dtype, an empty axis, symbols above `num_levels`, or a number of levels not `held`.
    """
    symbols = np.asarray(symbols)
    if num_levels not in held:
        raise ValueError(f"levels: {num_levels} in a row, expected {held[0]} to {held[-1]}.")
    if symbols.dtype != np.uint8:
        raise ValueError(f"symbols: dtype {symbols.dtype}, expected uint8.")
    if symbols.ndim != 3 or 0 in symbols.shape:
        raise ValueError(f"symbols: shape {list(symbols.shape)}, expected [experts, out, in], none of them zero.")
    if (largest := int(symbols.max())) > num_levels:
        raise ValueError(f"symbols: found the value {largest}, expected 0 (zero) to {num_levels} (the last level).")
    return symbols


def checked_arrays(
    codec: str, stored: Mapping[str, np.ndarray], shape: tuple[int, int, int], expected: Mapping[str, tuple[Any, tuple]]
) -> dict[str, np.ndarray]:
    """Stored arrays of experts of `shape` as NumPy's: by name the dtypes and shapes `expected`; (None,) is any length.

    Raises ValueError that names what is missing or other.
    """
    if set(stored) != set(expected):
        raise ValueError(f"{codec} codec: found arrays {sorted(stored)}, expected {', '.join(expected)}.")
    if min(shape) < 1:
        raise ValueError(f"shape {list(shape)}, expected [experts, out, in], none of them zero.")
    arrays = {name: np.asarray(array) for name, array in stored.items()}
    for name, (dtype, sizes) in expected.items():
        a = arrays[name]
        if a.dtype != dtype or a.shape != tuple(a.size if n is None else n for n in sizes):
            text = "[n]" if None in sizes else str(list(sizes))
            raise ValueError(f"{name}: {a.dtype} {list(a.shape)}, expected {np.dtype(dtype)} {text}.")
    return arrays
