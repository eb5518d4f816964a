"""Native T5X checkpoints: any slice of any parameter is read on demand, without T5X.

TensorStore does all reading, so a path may be local or a URL such as gs://. The layouts: legacy T5X (an index
file in msgpack and one zarr directory per parameter), the same as a single msgpack file, and Orbax-based T5X
(zarr directories or one OCDBT store); `index` describes the index file. Written is the legacy layout (`writing`).
"""

from __future__ import annotations

import os
import pathlib
import re
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from qmoe_jax.checkpoints import reading, retry, zarr
from qmoe_jax.checkpoints.store import Index, explicit
from qmoe_jax.checkpoints.t5x import files
from qmoe_jax.checkpoints.t5x.index import Stored, parse, unscanned
from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.files import check_regular


class T5XStore:
    """A T5X checkpoint as a `Store`, opened by `open_t5x`; nothing but names and shapes is in memory.

    Attributes:
      path: where its index file is.
      step: training step, None if the checkpoint doesn't tell.
      specs: shape and stored dtype of each parameter, by '/'-joined name without 'target'. Scanned layers appear one
        by one, under the unscanned names.
      described: nothing.
    """

    path: str
    step: int | None
    specs: Mapping[str, jax.ShapeDtypeStruct]
    described: Mapping[str, Any] = types.MappingProxyType({})

    def __init__(
        self,
        path: str,
        step: int | None,
        directory: files.Location,
        leaves: dict[str, Any],
        stored_bytes: int | None = None,
    ):
        self.path = path
        self._stored_bytes = stored_bytes  # of a local OCDBT store
        self.step = step
        self._directory = directory
        self._leaves = leaves
        self._arrays: dict[str, ts.TensorStore] = {}

        # Orbax's placeholders carry no shape: those arrays are opened now, all at once.
        shapeless = [
            name
            for name, leaf in leaves.items()
            if isinstance(leaf, Stored) and (leaf.shape is None or leaf.dtype is None)
        ]
        told = {name: self._start_reading_metadata(name) for name in shapeless}
        problems, futures = [], {}
        for name, metadata in told.items():
            try:
                futures[name] = self._start_opening(name, metadata)
            except CheckpointError as e:
                problems.append(str(e))
        for name, future in futures.items():
            try:
                self._arrays[name] = self._opened(name, future)
            except CheckpointError as e:
                problems.append(str(e))
        if problems:
            raise CheckpointError(listed(f"{path}: {len(problems)} parameters cannot be opened.", problems))

        stored = {name: self._arrays.get(name, leaf) for name, leaf in leaves.items()}
        shapes = {name: tuple(leaf.shape) for name, leaf in stored.items()}
        dtypes = {name: _dtype(leaf) for name, leaf in stored.items()}
        odd = [f"{n}: {d}" for n, d in dtypes.items() if not jnp.issubdtype(d, jnp.floating)]
        if odd:
            raise CheckpointError(
                listed(f"{path}: parameters must be floating-point (bfloat16 as uint16 is version 2).", odd)
            )
        self._names = unscanned(shapes)
        self.specs = {}
        for name, (source, block) in self._names.items():
            shape = shapes[source] if block is None else shapes[source][:1] + shapes[source][2:]
            self.specs[name] = jax.ShapeDtypeStruct(shape, dtypes[source])

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """Reads a parameter, or a slice of it: just the chunk files that the slice touches.

        Chunks usually span many experts: reading a matrix expert by expert decodes each chunk many times.

        Args:
          name: a key of `specs`.
          index: NumPy's basic indexing (integers, slices, Ellipsis). () is all.

        Returns:
          The values, in the stored dtype.

        Raises:
          CheckpointError: no such parameter; a chunk that is missing, truncated or corrupt; an unknown codec.
          IndexError: the index is out of bounds.
        """
        array = self._array(name)
        part = array[explicit(index, array.shape)]
        if (wanted := part.size * array.dtype.numpy_dtype.itemsize) > (memory := reading.host_memory_bytes()):
            raise CheckpointError(
                f"{self.path}: parameter {name!r} takes {wanted:,} bytes, more than this machine's memory ({memory:,})."
            )
        return np.asarray(retry.result(part.read, f"{self.path}: cannot read parameter {name!r}"))

    def source(self, name: str) -> reading.Source:
        """A matrix of all experts of a layer, opened, with the grid of its chunks."""
        array = self._array(name)
        source, block = self._names[name]
        stored = self._arrays[source]
        # An array within the index file is in memory already.
        inlined = isinstance(self._leaves[source], np.ndarray)
        layout: Any = stored.chunk_layout.read_chunk
        chunks = (1, *stored.shape[1:]) if inlined else tuple(layout.shape)
        layers = 1
        if block is not None:
            layers, chunks = chunks[1], (chunks[0], *chunks[2:])
        itemsize = array.dtype.numpy_dtype.itemsize
        return reading.Source(name, array, reading.Grid(tuple(array.shape), chunks, itemsize, layers), self.path)

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._names:
            raise CheckpointError(f"{self.path}: no parameter {name!r}; it has {len(self.specs)} others.")
        source, block = self._names[name]
        if source not in self._arrays:
            leaf = self._leaves[source]
            if isinstance(leaf, np.ndarray):
                self._arrays[source] = ts.array(leaf)
            else:
                opening = self._start_opening(source, self._start_reading_metadata(source))
                self._arrays[source] = self._opened(source, opening)
        array = self._arrays[source]
        return array if block is None else array[ts.d[1][block]]

    def _start_reading_metadata(self, name: str) -> ts.Future:
        if self._directory["driver"] == "file":  # A pipe would be waited for.
            file = pathlib.Path(self._directory["path"], self._leaves[name].array, zarr.METADATA)
            if file.exists() or file.is_symlink():
                check_regular(file)
        return files.start_reading(self._child(name, zarr.METADATA))

    def _child(self, name: str, file: str) -> files.Location:
        return files.child(self._directory, f"{self._leaves[name].array}/{file}")

    def _start_opening(self, name: str, metadata: ts.Future) -> ts.Future:
        """Once what the array's metadata declare can be."""
        try:
            declared = zarr.parse(files.content(metadata, self._child(name, zarr.METADATA)))
            self._check_files(name, declared)
        except CheckpointError as e:
            raise CheckpointError(f"{self._cannot_open(name)}: {e}.") from e
        # T5X writes every chunk (fill_value null), so that a missing one is a loss, not zeros.
        spec = {"driver": "zarr", "kvstore": self._child(name, ""), "fill_missing_data_reads": False}
        return ts.open(spec, read=True)

    def _check_files(self, name: str, declared: zarr.Declared) -> None:
        """Holds what an array's metadata declare against its files, where they are local."""
        if self._directory["driver"] == "file":
            zarr.check_files(declared, self._child(name, "")["path"])
        elif (
            self._stored_bytes is not None
        ):  # All arrays share the files of an OCDBT store, which may hold many chunks.
            number = len(ts.KvStore.open(self._child(name, "")).result().list().result())
            zarr.check(declared, number, self._stored_bytes)
        else:
            zarr.check(declared, None, None)

    def _cannot_open(self, name: str) -> str:
        return f"{self.path}: cannot open parameter {name!r} ({self._leaves[name].array}/{zarr.METADATA})"

    def _opened(self, name: str, future: ts.Future) -> ts.TensorStore:
        leaf = self._leaves[name]
        try:
            array = future.result()
        except ValueError as e:
            raise CheckpointError(f"{self._cannot_open(name)}: {retry.reason(e)}.") from e
        for what, found, expected in (
            ("shape", tuple(array.shape), leaf.shape),
            ("dtype", array.dtype.numpy_dtype, leaf.dtype),
        ):
            if expected is not None and found != expected:
                raise CheckpointError(
                    f"{self.path}: parameter {name!r}: {leaf.array}/.zarray has {what} {found}, "
                    f"but the checkpoint's index file says {expected}."
                )
        return array


def open_t5x(path: str | os.PathLike) -> T5XStore:
    """Opens a T5X checkpoint. Cheap: no parameter is read.

    Args:
      path: a step directory (checkpoint_1000), its parent (the newest complete step is taken), or a single
        msgpack file with all arrays. Local, or a URL that TensorStore understands (gs://bucket/...). A parent
        on gs:// is searched by listing all its objects: better name the step directory of a large model.

    Raises:
      CheckpointError: there is no checkpoint, or it is incomplete, damaged, or of an unsupported version.
    """
    found = files.find(path)
    if found is None:
        raise CheckpointError(files.nothing_at(path))
    file, data = found
    where = files.show(file)
    index = parse(data, where)
    directory = {**file, "path": file["path"].rpartition("/")[0] + "/"}
    stored_bytes = None
    if files.read_file(files.child(directory, "manifest.ocdbt")) is not None:
        if directory["driver"] == "file":
            stored_bytes = zarr.bytes_below(directory["path"])
        directory = {"driver": "ocdbt", "base": directory, "path": ""}
    step = files.step_of(file)
    return T5XStore(where, index.step if step is None else step, directory, index.leaves, stored_bytes)


def is_t5x(path: str | os.PathLike) -> bool:
    """Whether `open_t5x` would find a T5X checkpoint at the path (not whether it is intact)."""
    found = files.find(path)
    # It begins with a msgpack map whose first key is one of T5X's.
    keys = rb"[\x80-\x8f\xde\xdf].{1,6}?(version|_?optimizer|target|state|flax_mutables|params_axes)"
    return found is not None and re.match(keys, found[1], re.DOTALL) is not None


def _dtype(array: np.ndarray | Stored | ts.TensorStore) -> np.dtype:
    return array.dtype.numpy_dtype if isinstance(array, ts.TensorStore) else array.dtype
