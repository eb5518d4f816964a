"""What a zarr array (version 2) says of itself, held against its files before TensorStore believes it.

TensorStore makes room for a chunk as it is declared; where there is none the process ends, without an error to catch.
So what is declared is compared with what the files can hold.
"""

from __future__ import annotations

import math
import os
import pathlib
import reprlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts

from qmoe_jax.checkpoints.reading import host_memory_bytes
from qmoe_jax.errors import CheckpointError
from qmoe_jax.files import check_regular, parse_json

METADATA = ".zarray"
# What TensorStore's zarr driver decodes, and how many bytes one byte can become. zlib: 1032, as a match of 258 bytes
# takes two bits. zstd: a block of 2^17 equal bytes takes four; blosc and bzip2 are taken for no better.
_MOST_RATIO = {None: 1, "gzip": 1_032, "zlib": 1_032, "zstd": 2**17, "blosc": 2**17, "bz2": 2**17}
# What is lost of an array that was whole is left to reading, which names the chunk.
_LOST, _SLACK = 2, 1_024


class Declared(NamedTuple):
    """An array as its metadata have it."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    codec: str | None

    @property
    def chunk_bytes(self) -> int:
        """Of a decoded chunk."""
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def number_of_chunks(self) -> int:
        return math.prod(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))


def parse(content: bytes | None) -> Declared:
    """Reads the metadata; None: there are none. Raises CheckpointError, in words for the name of the file before it."""
    if content is None:
        raise CheckpointError("the file is missing")
    try:
        found = parse_json(content, "it")
    except CheckpointError as e:
        raise CheckpointError(f"not zarr metadata, so truncated or corrupt ({e})") from e
    if missing := {"shape", "chunks", "dtype", "compressor"} - found.keys():
        raise CheckpointError(f"not zarr metadata, so truncated or corrupt (no {', '.join(sorted(missing))})")
    compressor = found["compressor"]
    codec = compressor.get("id") if isinstance(compressor, dict) else compressor
    if not isinstance(codec, str | None) or codec not in _MOST_RATIO:
        known = ", ".join(c for c in sorted(c for c in _MOST_RATIO if c))
        raise CheckpointError(f"unknown codec {reprlib.repr(codec)}, expected one of {known}")
    shape, chunks = (_sizes(name, found[name], least) for name, least in (("shape", 0), ("chunks", 1)))
    if len(shape) != len(chunks):
        raise CheckpointError(f"shape {list(shape)} and chunks {list(chunks)} differ in length")
    return Declared(shape, chunks, _dtype(found["dtype"]), codec)


def _sizes(name: str, value: Any, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 32 or not all(type(n) is int and least <= n < 2**62 for n in value):
        raise CheckpointError(f"{name} {reprlib.repr(value)}, expected whole numbers from {least} on")
    return tuple(value)


def _dtype(name: Any) -> np.dtype:
    try:
        if not isinstance(name, str) or len(name) > 16:
            raise TypeError
        dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    except (TypeError, ValueError, SyntaxError) as e:
        raise CheckpointError(f"dtype {reprlib.repr(name)}, expected that of plain numbers") from e
    if dtype.hasobject or dtype.shape or dtype.names or dtype.itemsize > 16:
        raise CheckpointError(f"dtype {name!r}, expected that of plain numbers")
    return dtype


def check(declared: Declared, files: tuple[int, int] | None) -> None:
    """Raises CheckpointError, in words for the name of the file before it, for what can't be.

    Args:
      declared: what the metadata say.
      files: how many files may be chunks, and bytes of all of them; None: nothing is known of them.
    """
    if declared.chunk_bytes > host_memory_bytes():
        raise CheckpointError(
            f"chunks {list(declared.chunks)} of {declared.dtype} take {declared.chunk_bytes:,} bytes each, more than "
            "this machine's memory"
        )
    if files is None:
        return
    number, nbytes = files
    wanted = declared.number_of_chunks * declared.chunk_bytes
    if (
        declared.number_of_chunks > _LOST * number + _SLACK
        or wanted > _LOST * nbytes * _MOST_RATIO[declared.codec] + _SLACK
    ):
        raise CheckpointError(
            f"shape {list(declared.shape)} in chunks {list(declared.chunks)} of {declared.dtype} takes "
            f"{declared.number_of_chunks:,} chunks, {wanted:,} bytes; there are {number:,} files of {nbytes:,} bytes"
        )


def check_opened(array: ts.TensorStore, nbytes: int | None) -> None:
    """The same of an array that is open, of any version, whose chunks are somewhere in files of so many bytes."""
    layout: Any = array.chunk_layout.read_chunk
    declared = Declared(tuple(array.shape), tuple(map(int, layout.shape)), array.dtype.numpy_dtype, "zstd")
    check(declared, None if nbytes is None else (declared.number_of_chunks, nbytes))


def chunk_files(folder: str | os.PathLike) -> tuple[int, int]:
    """How many files an array's folder has beside its metadata, and their bytes.

    Raises CheckpointError for what is neither file nor folder: a pipe would be waited for.
    """
    number = nbytes = 0
    for parent, _, names in os.walk(os.fspath(folder)):
        for name in names:
            if name != METADATA:
                number += 1
                nbytes += check_regular(pathlib.Path(parent) / name)
    return number, nbytes
