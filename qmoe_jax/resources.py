"""Seconds and bytes that a run takes, and memory given back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import resource
import sys
import time
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


class Stages:
    """Adds up the seconds spent in named stages."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def report(self) -> dict[str, float]:
        """Seconds by stage, rounded, with the total since this object was made."""
        total = time.perf_counter() - self._started
        return {name: round(s, 3) for name, s in (*self.seconds.items(), ("total", total))}


def peak_rss_bytes() -> int:
    """The most memory this process has had resident so far."""
    with contextlib.suppress(OSError):  # Linux, where getrusage counts what the parent had when it forked.
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """The memory this process has resident now; its peak where the system doesn't tell."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_rss_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def keep_one_heap() -> None:
    """Makes all threads of this process share one heap of glibc's, which keeps what is freed for the next array.

    Left alone each thread has a heap of its own with holes in it, and XLA's temporary arrays, which live for one call,
    are mapped and unmapped anew each time: a third of a small model's compression was page faults. To be called before
    the first array; `give_freed_memory_back` returns what the heap has kept. No effect elsewhere.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # Larger arrays are mapped, and unmapped when they are freed.
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def give_freed_memory_back() -> None:
    """Returns what was freed to the system, as between two layers: a run that streams terabytes keeps no holes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def gigabytes(number: float) -> str:
    """In units of 1e9 bytes, with three digits."""
    return f"{number / 1e9:.3g} GB" if number < 1e12 else f"{number / 1e12:.3g} TB"


def duration(seconds: float) -> str:
    """In seconds, minutes or hours."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
