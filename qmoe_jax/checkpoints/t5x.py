"""Native T5X checkpoints: any slice of any parameter is read on demand, without T5X.

TensorStore does all reading, so a path may be local or a URL such as gs://. The layouts: legacy T5X (an index
file in msgpack and one zarr directory per parameter), the same as a single msgpack file, and Orbax-based T5X
(zarr directories or one OCDBT store); `t5x_index` describes the index file. Written is the legacy layout.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import time
import types
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore as ts
from flax import traverse_util

from qmoe_jax.checkpoints import reading, retry, t5x_files, t5x_index
from qmoe_jax.errors import CheckpointError, listed

Entry = int | slice | types.EllipsisType
Index = Entry | tuple[Entry, ...]

_CODECS = (None, "blosc", "bz2", "gzip", "zlib", "zstd")  # what TensorStore's zarr driver decodes


class T5XCheckpoint:
    """A T5X checkpoint, opened by `open_t5x`; nothing but names and shapes is in memory.

    Attributes:
      path: where its index file is.
      step: training step, None if the checkpoint doesn't tell.
      specs: shape and stored dtype of each parameter, by '/'-joined name without 'target', e.g.
        'encoder/layers_1/mlp/expert/wi/kernel'. Scanned layers appear one by one, under the unscanned names.
    """

    path: str
    step: int | None
    specs: Mapping[str, jax.ShapeDtypeStruct]

    def __init__(self, path: str, step: int | None, directory: t5x_files.Location, leaves: dict[str, Any]):
        self.path = path
        self.step = step
        self._directory = directory
        self._leaves = leaves
        self._arrays: dict[str, ts.TensorStore] = {}

        # Orbax's placeholders carry no shape: those arrays are opened now, all at once.
        shapeless = [
            name
            for name, leaf in leaves.items()
            if isinstance(leaf, t5x_index.Stored) and (leaf.shape is None or leaf.dtype is None)
        ]
        futures = {name: self._start_opening(name) for name in shapeless}
        problems = []
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
        self._names = t5x_index.unscanned(shapes)
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
        part = array[_explicit(index, array.shape)]
        return np.asarray(retry.result(part.read, f"{self.path}: cannot read parameter {name!r}"))

    def experts(self, name: str) -> reading.Source:
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
                self._arrays[source] = self._opened(source, self._start_opening(source))
        array = self._arrays[source]
        return array if block is None else array[ts.d[1][block]]

    def _start_opening(self, name: str) -> ts.Future:
        kvstore = t5x_files.child(self._directory, self._leaves[name].array + "/")
        # T5X writes every chunk (fill_value null), so that a missing one is a loss, not zeros.
        return ts.open({"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}, read=True)

    def _opened(self, name: str, future: ts.Future) -> ts.TensorStore:
        leaf = self._leaves[name]
        try:
            array = future.result()
        except ValueError as e:
            metadata = t5x_files.child(self._directory, f"{leaf.array}/.zarray")
            what = _explain_metadata(t5x_files.read_file(metadata)) or t5x_files.reason(e)
            raise CheckpointError(f"{self.path}: cannot open parameter {name!r} ({leaf.array}/.zarray): {what}.") from e
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


def open_t5x(path: str | os.PathLike) -> T5XCheckpoint:
    """Opens a T5X checkpoint. Cheap: no parameter is read.

    Args:
      path: a step directory (checkpoint_1000), its parent (the newest complete step is taken), or a single
        msgpack file with all arrays. Local, or a URL that TensorStore understands (gs://bucket/...). A parent
        on gs:// is searched by listing all its objects: better name the step directory of a large model.

    Raises:
      CheckpointError: there is no checkpoint, or it is incomplete, damaged, or of an unsupported version.
    """
    found = t5x_files.find(path)
    if found is None:
        raise CheckpointError(t5x_files.nothing_at(path))
    file, data = found
    where = t5x_files.show(file)
    index = t5x_index.parse(data, where)
    directory = {**file, "path": file["path"].rpartition("/")[0] + "/"}
    if t5x_files.read_file(t5x_files.child(directory, "manifest.ocdbt")) is not None:
        directory = {"driver": "ocdbt", "base": directory, "path": ""}
    step = t5x_files.step_of(file)
    return T5XCheckpoint(where, index.step if step is None else step, directory, index.leaves)


def is_t5x(path: str | os.PathLike) -> bool:
    """Whether `open_t5x` would find a T5X checkpoint at the path (not whether it is intact)."""
    found = t5x_files.find(path)
    # It begins with a msgpack map whose first key is one of T5X's.
    keys = rb"[\x80-\x8f\xde\xdf].{1,6}?(version|_?optimizer|target|state|flax_mutables|params_axes)"
    return found is not None and re.match(keys, found[1], re.DOTALL) is not None


def write_t5x(
    directory: str | os.PathLike,
    params: Mapping[str, Any],
    *,
    step: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    codec: Literal["gzip", "zstd"] = "gzip",
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes parameters as T5X's own `Checkpointer` does (legacy layout, version 3), but no optimizer state.

    They are written one after the other, into a temporary directory that is renamed when all is there.

    Args:
      directory: parent of the checkpoint, made if need be. Local.
      params: nested dict, or flat with '/'-joined names; each leaf an array, or a function without arguments
        that returns one (called once, so that only one parameter has to be in memory).
      step: training step.
      dtype: to which all parameters are cast.
      codec: compressor of the chunks, at level 1.
      overwrite: replace a checkpoint of that step.

    Returns:
      The step directory, `directory/checkpoint_{step}`.

    Raises:
      CheckpointError: the step is there already; a parameter isn't floating-point; writing fails (and nothing
        is left behind).
      OSError: the directory or the index file cannot be written.
    """
    if "://" in os.fspath(directory):
        raise CheckpointError(f"{os.fspath(directory)}: T5X checkpoints are written to local directories only.")
    directory = pathlib.Path(directory).absolute()
    final = directory / f"checkpoint_{step}"
    if final.exists() and not overwrite:
        raise CheckpointError(f"{final} exists: choose another directory or step, or overwrite it.")
    if dtype not in ("float32", "bfloat16"):
        raise CheckpointError(f"{final}: dtype {dtype!r} asked for, expected 'float32' or 'bfloat16'.")
    flat = traverse_util.flatten_dict(params, sep="/")
    if not flat:
        raise CheckpointError(f"{final}: no parameters to write.")
    stamp = f"{os.getpid()}-{time.time_ns()}"
    unfinished = directory / f"{final.name}.tmp-{stamp}"
    unfinished.mkdir(parents=True)
    try:
        placeholders = {
            name: _write_array(unfinished, name, value() if callable(value) else value, dtype, codec)
            for name, value in flat.items()
        }
        (unfinished / "checkpoint").write_bytes(index_file(placeholders, step))
        if final.exists():
            replaced = directory / f"{final.name}.tmp-replaced-{stamp}"
            final.rename(replaced)
            unfinished.rename(final)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return final


def t5x_chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """T5X's chunk shape of an array that one host holds.

    While a chunk exceeds 64 MiB in float32, its largest dimension becomes the next smaller divisor of the
    array's dimension.
    """
    chunks = list(shape)
    while 4 * np.prod(chunks, dtype=np.int64) > 64 * 2**20:
        axis = int(np.argmax(chunks))
        chunks[axis] = next(n for n in range(chunks[axis] - 1, 0, -1) if shape[axis] % n == 0)
    return tuple(chunks)


def _write_array(
    directory: pathlib.Path, name: str, value: jax.Array | np.ndarray, dtype: str, codec: str
) -> dict[str, Any]:
    """Writes one parameter as a zarr directory; returns its placeholder for the index file."""
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise CheckpointError(f"{directory}: parameter {name!r} is {array.dtype}, expected floating-point.")
    entry = placeholder(name, array.shape, t5x_chunks(array.shape), dtype, codec)
    ArrayWriter(directory, name, entry).write((), array)
    return entry


def placeholder(name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, codec: str) -> dict[str, Any]:
    """What the index file says of a parameter that lies in a zarr directory."""
    return {
        "driver": "zarr",
        "dtype": dtype,
        "kvstore": {"driver": "file", "path": f"target.{name.replace('/', '.')}/"},
        "metadata": {"chunks": list(chunks), "compressor": {"id": codec, "level": 1}, "shape": list(shape)},
    }


class ArrayWriter:
    """A parameter's zarr directory, written slice by slice; one that is there is replaced.

    Args:
      directory: of the checkpoint.
      name: '/'-joined.
      entry: its `placeholder`.

    Raises CheckpointError, as `write` does, if it cannot be written.
    """

    def __init__(self, directory: pathlib.Path, name: str, entry: dict[str, Any]):
        self._directory, self._name = directory, name
        self._dtype = t5x_index.np_dtype(entry["dtype"])
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{directory}/{entry['kvstore']['path']}"},
            "metadata": {
                **entry["metadata"],
                "dtype": "bfloat16" if entry["dtype"] == "bfloat16" else "<f4",
                "dimension_separator": ".",
            },
        }
        try:
            self._store = ts.open(spec, create=True, delete_existing=True).result()
        except ValueError as e:
            raise self._error(e) from e

    def write(self, index: Index, values: np.ndarray) -> None:
        """Writes a slice, cast to the dtype of the array."""
        try:
            self._store[index].write(values.astype(self._dtype, copy=False)).result()
        except ValueError as e:
            raise self._error(e) from e

    def _error(self, error: ValueError) -> CheckpointError:
        return CheckpointError(f"{self._directory}: cannot write parameter {self._name!r}: {t5x_files.reason(error)}.")


def index_file(entries: Mapping[str, Any], step: int) -> bytes:
    """The index file of a checkpoint (legacy layout, version 3) whose parameters are all in zarr directories.

    Args:
      entries: their placeholders by '/'-joined name.
      step: training step.
    """
    target = traverse_util.unflatten_dict(entries, sep="/")
    state = {"step": step, "param_states": {}}
    return msgpack.packb({"version": t5x_index.VERSION, "optimizer": {"target": target, "state": state}})


def _explicit(index: Index, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """NumPy's basic indexing, one entry per axis, in TensorStore's terms (-1 is just another coordinate)."""
    entries: list[Any] = list(index) if isinstance(index, tuple) else [index]
    at = next((i for i, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    rest = entries[at + 1 :]
    entries = entries[:at] + [slice(None)] * (len(shape) - at - len(rest)) + rest
    if len(entries) != len(shape):
        raise IndexError(f"Index {index} has too many entries for shape {shape}.")
    explicit: list[int | slice] = []
    for entry, size in zip(entries, shape, strict=True):
        if isinstance(entry, slice):
            bounds = entry.indices(size)
            explicit.append(slice(*bounds) if len(range(*bounds)) else slice(0, 0))
        else:
            explicit.append(range(size)[entry])
    return tuple(explicit)


def _dtype(array: np.ndarray | t5x_index.Stored | ts.TensorStore) -> np.dtype:
    return array.dtype.numpy_dtype if isinstance(array, ts.TensorStore) else array.dtype


def _explain_metadata(content: bytes | None) -> str | None:
    """What is wrong with a `.zarray`; None if only TensorStore knows."""
    if content is None:
        return "the file is missing"
    try:
        compressor = json.loads(content)["compressor"]
        codec = compressor and compressor["id"]
    except (ValueError, TypeError, KeyError) as e:
        return f"not zarr metadata, so truncated or corrupt ({type(e).__name__}: {e})"
    if codec not in _CODECS:
        return f"unknown codec {codec!r}, expected one of {', '.join(c for c in _CODECS if c)}"
    return None
