"""What a compression has committed, so that the same command goes on after a kill, a full disk or a lost host.

    OUT/progress/progress.json   fingerprint of the run and, once a layer is committed, where it is: layers done, rate
                                 control, accounts, the layers' part of the manifest, which files hold activations
    OUT/progress/x-3             activations [tokens, width] after the layers so far, raw, in the list buffers' order
    OUT/progress/STREAM          those of a stream that has ended, by its name

A commit writes new files, and then replaces progress.json, which is the moment at which it counts; the files that it
supersedes are removed after that. Layers since the last commit are done again, and give the same shards. A row of
tokens lies at a known place: each process writes and reads its own, so the number of processes may change in between.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qmoe_jax.checkpoints.checkpoint import Checkpoint
from qmoe_jax.checkpoints.compressed import PROGRESS, VERSION
from qmoe_jax.errors import CheckpointError
from qmoe_jax.files import read_json, sync, write_json
from qmoe_jax.lock import LOCK
from qmoe_jax.models.family import Example
from qmoe_jax.processes import Processes
from qmoe_jax.streaming import OwnRows
from qmoe_jax.streaming.forward import X
from qmoe_jax.version import __version__

BLOCK = 1 << 26  # bytes that are copied at once
EXPECTED = 1e9  # bytes a second that are committed, as long as none were
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits well mixed
SMALL_FILE = 1 << 26  # an index file of T5X; one that holds the parameters themselves is larger


class OtherRunError(ValueError):
    """Progress of another checkpoint, other data or another config is there."""


def is_unfinished(output: str | os.PathLike) -> bool:
    """Whether a compression into this directory was interrupted, be it before it committed anything."""
    folder = pathlib.Path(output) / PROGRESS
    if (folder / f"{PROGRESS}.json").is_file():
        return True
    alone = folder.is_dir() and {p.name for p in folder.parent.iterdir()} - {LOCK} == {PROGRESS}
    return alone and all(p.name == f".{PROGRESS}.json.tmp" for p in folder.iterdir())


class Progress:
    """The progress in OUT, which goes on where it was, or begins.

    Args:
      output: OUT.
      fingerprint: JSON values that have to be the same for the run to give the same bytes.
      resume: go on from what is there; otherwise it is removed.
      processes: all of which make one and call its methods; None: `jax.distributed`'s.
      share: of the time, at most, for commits (see `due`).

    Attributes:
      committed: what `commit` was last told, None if nothing is committed.

    Raises:
      OtherRunError: what is there is of a run with another fingerprint; names what differs.
    """

    def __init__(
        self,
        output: str | os.PathLike,
        fingerprint: Mapping[str, Any],
        resume: bool = True,
        processes: Processes | None = None,
        share: float = 1.0,
    ):
        self.output, self.folder = pathlib.Path(output), pathlib.Path(output) / PROGRESS
        self._file = self.folder / f"{PROGRESS}.json"
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.committed: dict[str, Any] | None = None
        self._processes = processes or Processes()
        self._share, self._last, self._seconds_per_byte = share, time.monotonic(), 1 / EXPECTED
        if self._processes.first:
            self._begin(resume)
        self.committed = self._processes.from_first(self.committed)

    def _begin(self, resume: bool) -> None:
        if not resume:
            self.remove()
        found = self._read()
        if found is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(None)
        else:
            self._check(found["fingerprint"])
            self.committed = found["committed"]
            self._remove_others()

    def _read(self) -> dict[str, Any] | None:
        if not self._file.is_file():
            return None
        try:
            found = read_json(self._file)
        except CheckpointError as e:
            raise OtherRunError(f"{e} Give --overwrite to start anew.") from e
        if found.pop("sha256", None) != _sha256(found):
            raise OtherRunError(f"{self._file} isn't what a run wrote: damaged. Give --overwrite to start anew.")
        return found

    def stored(self) -> dict[str, Any] | None:
        """What is committed on disk, which counts, however the last `commit` ended."""
        found = self._read()
        return None if found is None else found["committed"]

    def _check(self, found: Mapping[str, Any]) -> None:
        names = sorted(self.fingerprint.keys() | found.keys())
        differ = [n for n in names if self.fingerprint.get(n) != found.get(n)]
        if differ:
            said = ", ".join(
                f"{n} (contents differ)"
                if len(str(found.get(n))) == 64
                else f"{n} (it began with {found.get(n)}, and this is {self.fingerprint.get(n)})"
                for n in differ
            )
            raise OtherRunError(
                f"{self.output} holds an unfinished compression of something else: {said}. Give what it began with to "
                "go on, another output, or --overwrite to start anew."
            )

    def _write(self, committed: dict[str, Any] | None) -> None:
        value = {"fingerprint": self.fingerprint, "committed": committed}
        write_json(self._file, value | {"sha256": _sha256(value)})
        sync(self.folder)

    def due(self, arrays: Mapping[str, OwnRows]) -> bool:
        """Whether to commit these now takes at most `share` of the time since the last commit, as that one went."""
        expected = _nbytes(arrays) * self._seconds_per_byte
        found = self._share >= 1 or expected <= self._share * (time.monotonic() - self._last)
        return self._processes.from_first(found)

    def commit(self, state: Mapping[str, Any], arrays: Mapping[str, OwnRows]) -> None:
        """Replaces what is committed, once every process has written its rows.

        Args:
          state: JSON values.
          arrays: this process's rows of arrays [tokens, width], by name. All but 'x' never change: written once.

        Raises:
          OSError: no space, for instance; then the last commit still stands.
        """
        began = time.monotonic()
        before = self.committed["arrays"] if self.committed else {}
        number = self.committed["number"] + 1 if self.committed else 1
        files: dict[str, dict[str, Any]] = {}
        try:
            for name, array in arrays.items():
                constant = name != X
                files[name] = {
                    "file": name if constant else f"{name}-{number}",
                    "shape": [array.tokens, array.values.shape[1]],
                    "dtype": str(array.values.dtype),
                    "checksum": self._checksum(array),
                }
                if files[name] != before.get(name):
                    write_rows(self.folder / files[name]["file"], array)
            sync(self.folder)
            self._processes.wait()
            committed = {**json.loads(json.dumps(state)), "number": number, "arrays": files}
            if self._processes.first:
                self._write(committed)
        except BaseException:
            if self._processes.first:
                self.committed = self.stored()  # It may count already.
                self._remove_others()
            raise
        self.committed = committed
        if self._processes.first:
            self._remove_others()
        self._processes.wait()  # What others write next isn't to be among what is removed.
        self._last = time.monotonic()
        self._seconds_per_byte = (self._last - began) / max(1, _nbytes(arrays))

    def fill(self, name: str, array: OwnRows) -> None:
        """Reads rows of a committed array into `array`. Raises OtherRunError if it isn't whole, or of another shape."""
        assert self.committed is not None
        described = self.committed["arrays"][name]
        file = self.folder / described["file"]
        shape, dtype = [array.tokens, array.values.shape[1]], array.values.dtype
        if described["shape"] != shape or described["dtype"] != str(dtype):
            raise OtherRunError(
                f"{file} holds {described['dtype']} {described['shape']}, expected {dtype} {shape}. "
                "Give --overwrite to start anew."
            )
        if not file.is_file() or file.stat().st_size != math.prod(shape) * dtype.itemsize:
            raise OtherRunError(f"{file} is missing or not whole. Give --overwrite to start anew.")
        read_rows(file, array)
        if self._checksum(array) != described["checksum"]:
            raise OtherRunError(f"{file} has changed since it was committed. Give --overwrite to start anew.")

    def _checksum(self, array: OwnRows) -> int:
        """Of all processes' rows together: the same however many there are."""
        return sum(self._processes.gather(checksum(array))) % 2**64

    def _remove_others(self) -> None:
        keep = {f["file"] for f in self.committed["arrays"].values()} if self.committed else set()
        for path in self.folder.iterdir():
            if path.name not in keep | {self._file.name}:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """See `remove_progress`."""
        remove_progress(self.output)


def remove_progress(output: str | os.PathLike) -> None:
    """Removes what was committed in a directory."""
    folder = pathlib.Path(output) / PROGRESS
    (folder / f"{PROGRESS}.json").unlink(missing_ok=True)  # First: from here on it isn't there.
    shutil.rmtree(folder, ignore_errors=True)


def _nbytes(arrays: Mapping[str, OwnRows]) -> int:
    return sum(a.values.nbytes for a in arrays.values())


def checksum(array: OwnRows) -> int:
    """Sum of all values' bits, each times an odd number that its place in the whole array gives, modulo 2^64.

    Sums of parts add up, in whichever order; a value that is changed, or in another's place, changes it.
    """
    values = np.ascontiguousarray(array.values)
    bits, width = values.view(f"u{values.dtype.itemsize}"), values.shape[1]
    total, columns = np.uint64(0), np.arange(width, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for start, stop, first in _runs(array, width * 16):
            rows = np.arange(first, first + stop - start, dtype=np.uint64)[:, None]
            factors = (np.uint64(2) * (rows * np.uint64(width) + columns) + np.uint64(1)) * _FACTOR
            total += np.sum(bits[start:stop].astype(np.uint64) * factors, dtype=np.uint64)
    return int(total)


def write_rows(path: str | os.PathLike, array: OwnRows) -> None:
    """Writes rows of an array into its file, made with room for all rows if it isn't there, and has them on disk."""
    width = array.values.shape[1] * array.values.dtype.itemsize
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if os.fstat(descriptor).st_size < width * array.tokens:
            os.posix_fallocate(descriptor, 0, width * array.tokens)  # A full disk is found out here.
        for start, stop, first in _runs(array, width):
            data = memoryview(np.ascontiguousarray(array.values[start:stop]).view(np.uint8).reshape(-1))
            at = width * first
            while data:
                written = os.pwrite(descriptor, data, at)
                data, at = data[written:], at + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_rows(path: str | os.PathLike, array: OwnRows) -> None:
    """Fills rows of an array from its file."""
    width = array.values.shape[1] * array.values.dtype.itemsize
    with open(path, "rb") as f:
        for start, stop, first in _runs(array, width):
            f.seek(width * first)
            data = memoryview(array.values[start:stop].view(np.uint8).reshape(-1))
            if f.readinto(data) != len(data):
                raise OSError(f"{path} ends within row {first} and the next {stop - start}.")


def _runs(array: OwnRows, width: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first): values[start:stop] are rows from `first` on, of at most BLOCK bytes."""
    count, step = len(array.values), max(1, BLOCK // max(1, width))
    ends = [count] if array.rows is None else [*(np.flatnonzero(np.diff(array.rows) != 1) + 1), count]
    start = 0
    for end in ends:
        for begin in range(start, end, step):
            yield begin, min(begin + step, end), begin if array.rows is None else int(array.rows[begin])
        start = end


# --- What has to be the same ------------------------------------------------------------------------------------------


def _sha256(value: Any) -> str:
    """Of JSON values."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def fingerprint(
    checkpoint: Checkpoint,
    calibration: Sequence[Example],
    validation: Sequence[Example],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """All that influences a compression's bytes, by name, as JSON values; large things by their SHA-256.

    Args:
      checkpoint: its index, names, shapes, dtypes, and the contents of norms and routers.
      calibration, validation: token arrays.
      settings: any, flat or nested.
    """
    return {
        "checkpoint": _checkpoint_sha256(checkpoint),
        "calibration documents": _examples_sha256(calibration),
        "validation documents": _examples_sha256(validation),
        **_flat({"model": checkpoint.config.to_dict(), **settings}),
        "version of the format": VERSION,
        "version of qmoe_jax": __version__,
        "version of jax": jax.__version__,
        "kind of device": jax.local_devices()[0].device_kind,
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _examples_sha256(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for tokens in (t for example in examples for t in example):
        digest.update(len(tokens).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(tokens, np.int64).tobytes())
    return digest.hexdigest()


def _checkpoint_sha256(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    index = pathlib.Path(checkpoint.path)
    if index.is_file() and index.stat().st_size <= SMALL_FILE:
        digest.update(index.read_bytes())
    for name, spec in sorted(checkpoint.specs.items()):
        digest.update(f"{name} {spec.shape} {spec.dtype}\n".encode())
        if checkpoint.family.is_small(name) and not checkpoint.is_expert(name):
            digest.update(np.ascontiguousarray(checkpoint.read(name)).tobytes())
    return digest.hexdigest()
