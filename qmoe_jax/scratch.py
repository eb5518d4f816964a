"""Folders for what needn't outlive a run; those of runs that were killed are removed by the next one."""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import TextIO

import numpy as np
from jax.typing import DTypeLike

PREFIX = "qmoe-scratch-"
_LOCK = "lock"


@contextlib.contextmanager
def folder(parent: str | os.PathLike | None) -> Iterator[pathlib.Path]:
    """A new folder below `parent` (None: the system's for temporary files), removed at the end.

    A run holds a lock on its folder; whichever below `parent` nobody holds is of a run that was killed, and is removed.

    Raises:
      OSError: `parent` can't be made or written to.
    """
    parent = pathlib.Path(tempfile.gettempdir() if parent is None else parent)
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent)
    path, lock = _locked(parent)
    with lock:
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _locked(parent: pathlib.Path) -> tuple[pathlib.Path, TextIO]:
    while True:
        path = pathlib.Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = (path / _LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (path / _LOCK).exists():  # Otherwise another run took it for abandoned before it was locked.
            return path, lock
        lock.close()


def remove_abandoned(parent: pathlib.Path) -> None:
    """Removes the folders below `parent` whose run has ended without doing so."""
    for path in parent.glob(f"{PREFIX}*"):
        try:
            lock = (path / _LOCK).open()
        except OSError:
            continue  # Just being made, or removed.
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            shutil.rmtree(path, ignore_errors=True)


class MappedArray:
    """Zeros in a file without a name, which vanishes with the process, however it ends.

    Args:
      parent: folder of the file, made if need be.
      shape: of the array.
      dtype: of the array.

    Attributes:
      array: what is in the file.

    Raises:
      OSError: there isn't room for it, or the folder can't be written to.
    """

    def __init__(self, parent: str | os.PathLike, shape: tuple[int, ...], dtype: DTypeLike):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        pathlib.Path(parent).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=str(parent)) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, size))  # Later, a full disk would be a signal.
            except OSError as e:
                raise OSError(
                    e.errno, f"{os.strerror(e.errno or 0)}: {size:,} bytes are wanted for activations", str(parent)
                ) from e
            self._map = mmap.mmap(file.fileno(), max(1, size))
        self.array = np.frombuffer(self._map, dtype, math.prod(shape)).reshape(shape)

    def release(self) -> None:
        """Gives the memory back that holds a copy of the file; what is used again is read again."""
        self._map.madvise(mmap.MADV_DONTNEED)
