"""The codec `gap` in C++: csrc/gap.cc."""

import ctypes

# The library's function, and the arrays of `data` that it takes, in order.
FUNCTION = "QmoeGapDot"
ARRAYS = ("words", "word_counts", "starts", "skips", "parameters")


def prepare(library: ctypes.CDLL) -> None:
    """Nothing: the library makes its tables itself."""
