"""The codec `nibbles` in C++: csrc/nibbles.cc."""

import ctypes

# The library's functions, and the arrays of `data` that they take, in order.
FUNCTION = "QmoeNibblesDot"
TRANSPOSED = "QmoeNibblesDotTransposed"
ARRAYS = ("nibbles",)


def prepare(library: ctypes.CDLL, num_levels: int) -> None:
    """Nothing: there is no code."""
