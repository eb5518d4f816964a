"""The codec `gap` in C++: csrc/gap.cc."""

import ctypes

import numpy as np

from qmoe_jax.codecs import gap
from qmoe_jax.codecs.gap_codes import numbers

# The library's functions, and the arrays of `data` that they take, in order.
FUNCTION = "QmoeGapDot"
TRANSPOSED = "QmoeGapDotTransposed"
ARRAYS = ("words", "word_counts", "starts", "skips", "parameters")

number_of_parts = gap.number_of_classes


def prepare(library: ctypes.CDLL, num_levels: int) -> None:
    """Hands over the codes of rows of so many levels."""
    own, windows = numbers(num_levels).astype(np.uint8), gap.window_table(num_levels)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (own, windows))
    library.QmoeSetGapCodes(ctypes.c_int64(num_levels), ctypes.c_int64(own.size), *pointers)
