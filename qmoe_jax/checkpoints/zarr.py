"""What a zarr array (version 2) says of itself, held against its files before TensorStore believes it.

TensorStore makes room for a chunk as it is declared; where there is none the process ends, without an error to catch.
So what is declared is compared with what the files can hold.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterator
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
_LARGE = 1 << 28  # bytes of a chunk; T5X's have up to 1 << 26


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


def check(declared: Declared, number: int | None, nbytes: int | None) -> None:
    """Raises CheckpointError, in words for the name of the file before it, for what can't be.

    Args:
      declared: what the metadata say.
      number: how many files may be chunks; None: it isn't known.
      nbytes: of all of them; None: it isn't known.
    """
    if declared.chunk_bytes > host_memory_bytes():
        raise CheckpointError(
            f"chunks {list(declared.chunks)} of {declared.dtype} take {declared.chunk_bytes:,} bytes each, more than "
            "this machine's memory"
        )
    wanted = declared.number_of_chunks * declared.chunk_bytes
    shaped = f"shape {list(declared.shape)} in chunks {list(declared.chunks)} of {declared.dtype} takes"
    if number is not None and declared.number_of_chunks > _LOST * number + _SLACK:
        raise CheckpointError(f"{shaped} {declared.number_of_chunks:,} chunks, but there are {number:,} files")
    if nbytes is not None and wanted > _LOST * nbytes * _MOST_RATIO[declared.codec] + _SLACK:
        raise CheckpointError(f"{shaped} {wanted:,} bytes, which {nbytes:,} bytes of files can't hold")


def check_opened(array: ts.TensorStore, nbytes: int | None) -> None:
    """The same of an array that is open, of any version, whose chunks are somewhere in files of so many bytes."""
    layout: Any = array.chunk_layout.read_chunk
    declared = Declared(tuple(array.shape), tuple(map(int, layout.shape)), array.dtype.numpy_dtype, "zstd")
    check(declared, None, nbytes)


def check_files(declared: Declared, folder: str | os.PathLike) -> None:
    """`check` with what is in the array's folder. How large files are is looked up where a chunk is large."""
    number = nbytes = 0
    for entry in regular_files(folder):
        if entry.name != METADATA:
            number += 1
            nbytes += entry.stat().st_size if declared.chunk_bytes > _LARGE else 0
    check(declared, number, nbytes if declared.chunk_bytes > _LARGE else None)


def bytes_below(folder: str | os.PathLike) -> int:
    """Of all files. Raises CheckpointError as `regular_files` does."""
    return sum(entry.stat().st_size for entry in regular_files(folder))


def regular_files(folder: str | os.PathLike) -> Iterator[os.DirEntry[str]]:
    """All files below a folder.

    Raises CheckpointError for what is neither file nor folder: a pipe would be waited for.
    """
    if not os.path.isdir(folder):
        return
    with os.scandir(str(folder)) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from regular_files(entry.path)
                continue
            if entry.is_symlink() or not entry.is_file():
                check_regular(entry.path)
            yield entry
