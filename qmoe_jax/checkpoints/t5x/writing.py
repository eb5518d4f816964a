"""T5X checkpoints, written as T5X's own `Checkpointer` does: legacy layout, version 3."""

from __future__ import annotations

import os
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore as ts
from flax import traverse_util

from qmoe_jax.checkpoints.retry import reason
from qmoe_jax.checkpoints.store import Index
from qmoe_jax.checkpoints.t5x.index import VERSION, np_dtype
from qmoe_jax.errors import CheckpointError


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
      TypeError: params or step are of another kind.
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
    if not isinstance(params, Mapping) or not all(isinstance(name, str) for name in params):
        raise TypeError(f"params: found {type(params).__name__}, expected a dict of parameters by name.")
    if type(step) is not int or step < 0:
        raise TypeError(f"step: found {step!r}, expected a whole number from 0 on.")
    flat = traverse_util.flatten_dict(dict(params), sep="/")
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
        self._dtype = np_dtype(entry["dtype"])
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
        return CheckpointError(f"{self._directory}: cannot write parameter {self._name!r}: {reason(error)}.")


def index_file(entries: Mapping[str, Any], step: int) -> bytes:
    """The index file of a checkpoint (legacy layout, version 3) whose parameters are all in zarr directories.

    Args:
      entries: their placeholders by '/'-joined name.
      step: training step.
    """
    target = traverse_util.unflatten_dict(entries, sep="/")
    state = {"step": step, "param_states": {}}
    return msgpack.packb({"version": VERSION, "optimizer": {"target": target, "state": state}})
