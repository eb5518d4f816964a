"""Folders for what needn't outlive a run; those of runs that were killed are removed by the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

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
    path = pathlib.Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    with (path / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


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
