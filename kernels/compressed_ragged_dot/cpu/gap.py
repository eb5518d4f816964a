"""The codec `gap` in C++: csrc/gap.cc."""

import ctypes

# The library's functions, and the arrays of `data` that they take, in order.
FUNCTION = "QmoeGapDot"
TRANSPOSED = "QmoeGapDotTransposed"
ARRAYS = ("words", "word_counts", "starts", "skips", "parameters")


def prepare(library: ctypes.CDLL) -> None:
    """Nothing: the library makes its tables itself."""
