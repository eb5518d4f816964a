"""The codec `nibbles` in C++: csrc/nibbles.cc."""

import ctypes
from collections.abc import Mapping

import jax

# The library's functions, and the arrays of `data` that they take, in order.
FUNCTION = "QmoeNibblesDot"
TRANSPOSED = "QmoeNibblesDotTransposed"
ARRAYS = ("nibbles",)


def number_of_parts(data: Mapping[str, jax.Array]) -> int:
    """One: all of an expert's columns at once."""
    return 1


def prepare(library: ctypes.CDLL, num_levels: int) -> None:
    """Nothing: there is no code."""
