"""One run at a time on an output: a second one is refused at once, by name.

A lock is a file that its process holds by `flock`, which the system gives back when the process ends, however it ends.
That holds on local disks and, on Linux, on NFS; a network file system that doesn't pass locks on between its clients
(some mounts with `nolock`, some object stores as folders) can't tell of a run on another host.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import IO

from qmoe_jax.processes import Processes

LOCK = ".lock"
_held: dict[pathlib.Path, int] = {}  # by this process: how often


class InUseError(FileExistsError):
    """Another process is writing there."""


@contextlib.contextmanager
def locked(output: str | os.PathLike, create: bool = True) -> Iterator[None]:
    """Holds the lock of a directory, which is made for that; held already by this process, it stays.

    Args:
      output: the directory.
      create: False: a directory that isn't there needs no lock.

    Raises:
      InUseError: another process has it; says which, and on which host.
    """
    folder = pathlib.Path(output).absolute()
    if not create and not folder.is_dir():
        yield
        return
    if folder in _held:
        _held[folder] += 1
        try:
            yield
        finally:
            _held[folder] -= 1
        return
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _take(folder / LOCK)
    _held[folder] = 1
    try:
        yield
    finally:
        del _held[folder]
        with contextlib.suppress(OSError):  # A disk that is read-only by now has told of it already.
            (folder / LOCK).unlink(missing_ok=True)  # While it is held, so that nobody waits for a file that is gone.
        file.close()
        for empty in made:  # What was made for the lock alone.
            with contextlib.suppress(OSError):
                empty.rmdir()


@contextlib.contextmanager
def locked_by_first(output: str | os.PathLike, processes: Processes) -> Iterator[None]:
    """The same for several processes of one run: the first one holds it, and all are told if it can't."""
    with contextlib.ExitStack() as stack:
        problem = None
        if processes.first:
            try:
                stack.enter_context(locked(output))
            except InUseError as e:
                problem = str(e)
        problem = processes.from_first(problem)
        if problem:
            raise InUseError(problem)
        yield


def _take(path: pathlib.Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InUseError(_whose(path, file)) from e
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # Otherwise it was removed meanwhile.
                break
        file.close()
    file.truncate(0)
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "began": began}))
    file.flush()
    return file


def _whose(path: pathlib.Path, file: IO[str]) -> str:
    file.seek(0)
    try:
        found = json.loads(file.read())
        whose = f"process {found['process']} on {found['host']}, which began {found['began']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        whose = "another process"
    file.close()
    return f"{path.parent} is being written by {whose}. Wait for it, stop it, or choose another output."
