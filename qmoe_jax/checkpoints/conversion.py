"""From one layout to another, part by part: bounded memory, continued where it was stopped, checksums at the end.

A layout that can be written has a `Writer`. A part's files are written whole or not at all; what makes them a
checkpoint comes last.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from qmoe_jax.checkpoints.checkpoint import BFLOAT16, Checkpoint
from qmoe_jax.checkpoints.samples import Samples, changed, samples
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.errors import CheckpointError
from qmoe_jax.files import parse_json, read_bytes, read_json, write_json
from qmoe_jax.models.family import Names

PROGRESS = "convert.partial.json"
CHECKSUMS = "SHA256SUMS"
REPORT = "convert.json"
README = "Written by experiments/convert.py of qmoe_jax. Check it with `sha256sum --check README.md`."


@dataclasses.dataclass(frozen=True)
class Options:
    """How a checkpoint is written.

    Attributes:
      dtype: 'float32' or 'bfloat16', to which all uncompressed parameters are cast; None: as they are.
      codec: of compressed experts, where the layout leaves a choice.
      shard_bytes: files with several tensors are about this large, and so is what is in memory.
      num_shards: of each layer's compressed experts; None: as many as `default_shards` says.
    """

    dtype: str | None = None
    codec: str = "gap"
    shard_bytes: int = 2 * 1024**3
    num_shards: int | None = None

    def __post_init__(self):
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype: found {self.dtype!r}, expected 'float32' or 'bfloat16'.")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes: found {self.shard_bytes}, expected at least 1.")

    def dtype_of(self, stored: np.dtype) -> np.dtype:
        """What a parameter of a stored dtype is written as."""
        return {None: np.dtype(stored), "float32": np.dtype(np.float32), "bfloat16": BFLOAT16}[self.dtype]


class Part(NamedTuple):
    """What is written, and kept, together.

    Attributes:
      name: of the file or layer.
      nbytes: of its arrays; None if only writing it tells.
    """

    name: str
    nbytes: int | None


class Writer(abc.ABC):
    """Writes a checkpoint in another layout, part by part. A context manager around all of it.

    Making one writes nothing: what the layout can't hold is refused then.

    Args:
      checkpoint: what is written.
      output: directory.
      options: how.

    Attributes:
      parts: in order.
      lost: what the layout can't hold of this checkpoint, in words.
      closed: the layout's readers take no files but its own and README.md.

    Raises:
      CheckpointError: the layout can't hold the model.
    """

    parts: list[Part]
    lost: list[str]
    closed: bool = False

    def __init__(self, checkpoint: Checkpoint, output: pathlib.Path, options: Options):
        self.checkpoint, self.output, self.options = checkpoint, output, options

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:  # noqa: B027, what most need
        """What isn't kept of a block that raised is removed."""

    @abc.abstractmethod
    def write(self, part: str) -> list[pathlib.Path]:
        """Writes a part, which stays from then on; returns its files."""

    @abc.abstractmethod
    def finish(self) -> list[pathlib.Path]:
        """Writes what makes the parts a checkpoint; returns those files."""

    def layers(self) -> Any:
        """What is to be known of the parts so far to go on after them, as JSON values; where files don't tell."""
        return None

    def keep(self, parts: list[str], layers: Any) -> None:  # noqa: B027, likewise
        """These parts, of a writer that was stopped, stay; `layers` is what it knew of them. Called first."""

    def final(self, file: str) -> str:
        """Where a part's file is after `finish`; paths are relative to `output`."""
        return file


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes `path` when the block ends; nothing is left if it raises."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # Some libraries make files for the user alone.
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def names_of(checkpoint: Checkpoint, layout: str) -> Names:
    """The names of a checkpoint's family in a layout. Raises CheckpointError if it has none there."""
    family = checkpoint.family
    if layout not in family.names:
        raise CheckpointError(f"{checkpoint.path} is {family.title}, which the layout {layout!r} doesn't hold.")
    return family.names[layout]


# --- Reading experts -------------------------------------------------------------------------------------------------


def expert_dtype(checkpoint: Checkpoint, name: str) -> np.dtype:
    """dtype of an experts' kernel; compressed ones are bfloat16, which holds their levels."""
    return checkpoint.specs[name].dtype if name in checkpoint.specs else BFLOAT16


class ExpertReader:
    """Ranges of a layer's experts, dense, while the checkpoint is read once from front to back."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._layer: str | None = None
        self._groups: Iterator[tuple[int, int, dict[str, Any]]] | None = None
        self._held: list[tuple[int, int, dict[str, Any]]] = []
        self._first = 0

    def read(self, layer: str, start: int, stop: int) -> dict[str, np.ndarray]:
        """Matrices of experts start:stop by name, [experts, in, out]; compressed ones as bfloat16."""
        if layer != self._layer or start < self._first:
            self._layer, self._groups, self._held, self._first = layer, None, [], 0
        if self._groups is None:
            self._groups = self._checkpoint.experts(layer, stop - start)
        self._held = [group for group in self._held if group[1] > start]
        self._first = start
        while not self._held or self._held[-1][1] < stop:
            group = next(self._groups)
            if group[1] > start:
                self._held.append(group)
        parts = [
            {m: _dense(k, max(start, a) - a, min(stop, b) - a) for m, k in kernels.items()}
            for a, b, kernels in self._held
            if a < stop
        ]
        return {m: np.concatenate([p[m] for p in parts]) if len(parts) > 1 else parts[0][m] for m in parts[0]}


def _dense(kernel: np.ndarray | CompressedExperts, start: int, stop: int) -> np.ndarray:
    if not isinstance(kernel, CompressedExperts):
        return kernel[start:stop]
    return np.stack([np.asarray(kernel.expert(e)).T.astype(BFLOAT16) for e in range(start, stop)])


# --- Converting -----------------------------------------------------------------------------------------------------


def sha256(file: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(checkpoint: Checkpoint, target: str, options: Options) -> str:
    """What two runs have in common that give the same files: the source, its norms' values, and how it is written."""
    digest = hashlib.sha256()
    for name, spec in sorted(checkpoint.specs.items()):
        digest.update(f"{name} {spec.shape} {spec.dtype}\n".encode())
        if checkpoint.family.is_small(name):
            digest.update(checkpoint.read(name).tobytes())
    how = [checkpoint.config.to_dict(), checkpoint.provenance, target, dataclasses.asdict(options)]
    digest.update(json.dumps(how, sort_keys=True).encode())
    return digest.hexdigest()


def replaced(progress: dict[str, Any], weights: Samples) -> list[str]:
    """Parameters that an unfinished conversion began with and are others now; what was unreadable may be mended.

    Args:
      progress: see `read_progress`.
      weights: samples of the checkpoint as it is now; see `samples`.
    """
    before = progress.get("weights", {})
    return changed({name: sample for name, sample in before.items() if sample is not None}, weights)


def run(
    writer: Writer,
    output: pathlib.Path,
    identity: str,
    step: Callable[[], object] = lambda: None,
    keep_progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Writes all parts but those that an earlier run with the same `identity` finished, and then the rest.

    Args:
      writer: of the new checkpoint.
      output: its directory.
      identity: `fingerprint`.
      step: called after each part.
      keep_progress: what is known of the parts stays in `output`, until `write_report`.

    Returns:
      Bytes and SHA-256 of every file, by path below `output`.

    Raises:
      CheckpointError: a parameter can't be read; weights were replaced since those of finished parts were read.
    """
    progress, weights = read_progress(output), samples(writer.checkpoint)
    if progress and progress["identity"] != identity:
        progress = None
    if progress:
        if names := replaced(progress, weights):
            raise CheckpointError(
                f"{output} holds an unfinished conversion of other weights, which were replaced since: {names[0]}"
                f"{f' and {len(names) - 1} more parameters' if names[1:] else ''}. Put the old ones back to go on, or "
                "give another output, or --overwrite to start anew."
            )
        if progress.get("finished") and _intact(output, progress["finished"]):  # It lacked its report only.
            return progress["finished"]
    done = progress["parts"] if progress else {}
    done = {name: files for name, files in done.items() if _intact(output, files)}
    if progress and done:
        writer.keep(list(done), progress.get("state"))
    output.mkdir(parents=True, exist_ok=True)
    finished: dict[str, dict[str, Any]] = {}
    with writer:
        for part in writer.parts:
            written = done.get(part.name)
            if written is None:
                written = _described(output, writer.write(part.name))
            finished[part.name] = written
            known = {"identity": identity, "weights": weights, "parts": done | finished, "state": writer.layers()}
            write_json(output / PROGRESS, known)
            step()
        if names := replaced(known, samples(writer.checkpoint)):
            raise CheckpointError(
                f"{writer.checkpoint.path}: weights were replaced while they were read: {names[0]} isn't what it was. "
                "Put the old ones back and give the same command again, or start anew."
            )
        last = writer.finish()
    files = {writer.final(name): d for part in finished.values() for name, d in part.items()}
    files |= _described(output, last)
    if keep_progress:
        write_json(output / PROGRESS, known | {"finished": files})
    else:
        (output / PROGRESS).unlink(missing_ok=True)
    return files


def read_progress(output: pathlib.Path) -> dict[str, Any] | None:
    """What an unfinished conversion left in `output`; None if there is none."""
    try:
        progress = read_json(output / PROGRESS)
    except CheckpointError:
        return None
    return progress if _is_progress(progress) else None


def _is_progress(progress: dict[str, Any]) -> bool:
    """Whether this is what `run` writes."""
    parts = progress.get("parts")
    if not isinstance(parts, dict) or "identity" not in progress:
        return False
    files = [d for part in parts.values() for d in (part.values() if isinstance(part, dict) else [None])]
    return all(isinstance(d, dict) and isinstance(d.get("sha256"), str) for d in files)


def write_report(writer: Writer, output: pathlib.Path, report: dict[str, Any], files: dict[str, Any]) -> list[str]:
    """Writes what a conversion did, and the SHA-256 of its files in the form of `sha256sum`; returns the names.

    Then it is finished: nothing is left of its progress.
    """
    sums = "".join(f"{d['sha256']}  {name}\n" for name, d in sorted(files.items()))
    if writer.closed:
        text = f"{README}\n\n```\n{json.dumps(report, indent=1)}\n```\n\n```\n{sums}```\n"
        written = {"README.md": text}
    else:
        written = {CHECKSUMS: sums} if sums else {}
        write_json(output / REPORT, report)
    for name, text in written.items():
        with replacing(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    (output / PROGRESS).unlink(missing_ok=True)
    return list(written) if writer.closed else [REPORT, *written]


def read_report(output: pathlib.Path) -> dict[str, Any] | None:
    """The report of a conversion that is finished, from where `write_report` has put it; None if there is none."""
    try:
        if (output / REPORT).exists():
            return read_json(output / REPORT)
        page = read_bytes(output / "README.md").decode("utf-8")
        return parse_json(page.split("```")[1], f"{output / 'README.md'}") if page.startswith(README) else None
    except (ValueError, IndexError):
        return None


def written_before(output: pathlib.Path) -> list[str]:
    """Files below `output` that a conversion, finished or not, wrote there.

    Whatever else lies there is somebody's: a list of checksums says something only beside what this module writes.

    Raises FileExistsError for a file that has changed since.
    """
    markers: list[str] = []
    sums: dict[str, str] = {}
    progress = read_progress(output)
    if progress:
        markers.append(PROGRESS)
        parts = [*progress["parts"].values(), progress.get("finished", {})]
        sums |= {name: d["sha256"] for part in parts for name, d in part.items()}
    if _is_report(output / REPORT):
        markers += [name for name in (REPORT, CHECKSUMS) if (output / name).is_file()]
        sums |= read_sums(output / CHECKSUMS)
    page = output / "README.md"
    if page.is_file() and page.read_text(encoding="utf-8", errors="replace").startswith(README):
        markers.append(page.name)
        sums |= read_sums(page)
    # A file that was tampered with names nothing outside.
    root = output.resolve()
    there = [n for n in sums if root in (output / n).resolve().parents and (output / n).is_file()]
    if changed := [n for n in there if sha256(output / n) != sums[n]]:
        raise FileExistsError(
            f"{output / changed[0]} has changed since a conversion wrote it, so it isn't removed"
            f"{f' (nor are {len(changed) - 1} others)' if changed[1:] else ''}. Remove it, or choose another directory."
        )
    return [*markers, *there]


def read_sums(file: pathlib.Path) -> dict[str, str]:
    """SHA-256 by name, of the lines that sha256sum would read."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return {m[2]: m[1] for line in lines if (m := re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line))}


def _is_report(file: pathlib.Path) -> bool:
    """Whether this is what `write_report` writes."""
    try:
        found = read_json(file)
    except CheckpointError:
        return False
    return {"format", "before", "after", "provenance"} <= found.keys()


def _described(output: pathlib.Path, files: list[pathlib.Path]) -> dict[str, dict[str, Any]]:
    return {f.relative_to(output).as_posix(): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}


def _intact(output: pathlib.Path, files: dict[str, dict[str, Any]]) -> bool:
    return all((output / name).is_file() and sha256(output / name) == d["sha256"] for name, d in files.items())
