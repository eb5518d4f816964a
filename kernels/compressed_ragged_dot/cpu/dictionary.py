"""The codec `dictionary` in C++: csrc/dictionary.cc."""

import ctypes
from collections.abc import Mapping

import jax
import numpy as np

from qmoe_jax.codecs import dictionary

# The library's functions, and the arrays of `data` that they take, in order.
FUNCTION = "QmoeDictionaryDot"
TRANSPOSED = "QmoeDictionaryDotTransposed"
ARRAYS = ("codewords", "row_offsets")


def number_of_parts(data: Mapping[str, jax.Array]) -> int:
    """One: all of an expert's columns at once."""
    return 1


def prepare(library: ctypes.CDLL, num_levels: int) -> None:
    """Hands over the dictionary."""
    entries = _entries()
    library.QmoeSetDictionary(entries.ctypes.data_as(ctypes.c_void_p))


def _entries() -> np.ndarray:
    """The dictionary as the library wants it, uint64 [65536]: 14 pairs of four bits, number of pairs in bits 56-63."""
    words = dictionary.decode_table().astype(np.uint64)  # [65536, 2], seven pairs above four bits of their number
    low, high, pairs = words[:, 0] >> np.uint64(4), words[:, 1] >> np.uint64(4), words[:, 0] & np.uint64(15)
    return low | high << np.uint64(28) | pairs << np.uint64(56)
