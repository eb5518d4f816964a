"""Parts of a compressed checkpoint: directories that Orbax writes, the same bytes for the same contents."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from qmoe_jax.checkpoints import zarr
from qmoe_jax.checkpoints.compressed.manifest import MANIFEST
from qmoe_jax.checkpoints.retry import reason
from qmoe_jax.errors import CheckpointError
from qmoe_jax.files import read_bytes, sync


def sha256(directory: pathlib.Path) -> str:
    """SHA-256 over names and contents of all files below a directory, in sorted order."""
    digest = hashlib.sha256()
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = file.relative_to(directory).as_posix()
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def directory_bytes(directory: pathlib.Path) -> int:
    """Of all files below a directory."""
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def save(directory: pathlib.Path, tree: dict[str, Any]) -> None:
    """Writes a nested dict of arrays. Raises CheckpointError if it can't, or there is no room."""
    # Found out now: Orbax, when it fails, has threads that go on.
    needed = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if needed > free:
        raise CheckpointError(
            f"{directory}: cannot be written: {os.strerror(errno.ENOSPC)}: {needed:,} bytes are needed, {free:,} free."
        )
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree))
        _settle(directory)
    except ValueError as e:  # TensorStore's error, for instance of a full disk.
        raise CheckpointError(f"{directory}: cannot be written: {reason(e)}.") from e


def _checkpointer() -> ocp.Checkpointer:
    """Without OCDBT every array is a plain zarr directory, which any reader of zarr can open.

    One of several processes reads and writes by itself: no part belongs to two.
    """
    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _OwnArrays()))
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, type_handler_registry=registry, multiprocessing_options=alone
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


class _OwnArrays(ocp.type_handlers.NumpyHandler):
    """Writes what Orbax's own handler would, which leaves NumPy's arrays to the first process, whoever has them."""

    async def serialize(self, values, infos, args=None):
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{info.parent_dir / info.name}/"},
                "metadata": {
                    "shape": value.shape,
                    "chunks": [max(1, n) for n in value.shape],
                    "compressor": {"id": "zstd", "level": 1},
                },
                "dtype": str(value.dtype),
                "store_data_equal_to_fill_value": True,
            }
            array = await ts.open(spec, create=True)
            await array.write(value)
        return []


def _settle(directory: pathlib.Path) -> None:
    """Takes out of Orbax's notes when and where they were written, and sees to it that all files are on disk."""
    notes = directory / "_CHECKPOINT_METADATA"
    if notes.is_file():
        found = json.loads(notes.read_text(encoding="utf-8"))
        found |= {name: 0 for name in found if name.endswith("_timestamp_nsecs")}
        notes.write_text(json.dumps(found), encoding="utf-8")
    done = directory / "commit_success.txt"
    if done.is_file():
        done.write_text("Checkpoint commit was successful.\n", encoding="utf-8")
    for path in (*directory.rglob("*"), directory):
        sync(path)


def declared(directory: pathlib.Path) -> dict[str, zarr.Declared]:
    """What there is in a part, by the names of the arrays' folders: a nested dict's keys, joined by '.'.

    Raises CheckpointError for an array that declares what its files can't hold.
    """
    found = {}
    for folder in sorted(p for p in directory.iterdir() if p.is_dir()):
        try:
            file = folder / zarr.METADATA
            found[folder.name] = array = zarr.parse(read_bytes(file) if os.path.lexists(file) else None)
            zarr.check_files(array, folder)
        except CheckpointError as e:
            raise CheckpointError(f"{folder}: cannot open the array ({zarr.METADATA}): {e}.") from e
    return found


def restore(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Its arrays, by the names of their folders (see `declared`). Raises CheckpointError."""
    names = declared(directory)
    folders = {name: {"driver": "file", "path": f"{directory.absolute() / name}/"} for name in names}
    opening = {n: ts.open({"driver": "zarr", "kvstore": folder}, read=True) for n, folder in folders.items()}
    arrays = {}
    try:
        for name, future in opening.items():
            arrays[name] = future.result().read()
        return {name: np.asarray(future.result()) for name, future in arrays.items()}
    except ValueError as e:
        raise CheckpointError(f"{directory}: cannot be read: {reason(e)}.") from e


def is_part(folder: pathlib.Path) -> bool:
    """Whether a folder is what `save` makes, whole or not: Orbax's notes, or nothing but arrays."""
    if not folder.is_dir():
        return False
    inside = list(folder.iterdir())
    notes = {"_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt"}
    return any(p.name in notes for p in inside) or all((p / ".zarray").is_file() for p in inside)


def is_layer(folder: pathlib.Path) -> bool:
    """Whether a folder holds shards of a layer, and nothing else."""
    return folder.is_dir() and all(re.match(r"\d+-of-\d+(\.|$)", p.name) for p in folder.iterdir())


def check_part(path: pathlib.Path, part: Mapping[str, Any]) -> pathlib.Path:
    """Where a part of the manifest is; raises CheckpointError unless it is as it was written."""
    directory = path / part["directory"]
    if not directory.is_dir() or sha256(directory) != part["sha256"]:
        raise CheckpointError(
            f"{directory} is missing or has changed since it was written (its SHA-256 is not that of {MANIFEST}); "
            "copy the checkpoint again, or make it again with --overwrite."
        )
    return directory
