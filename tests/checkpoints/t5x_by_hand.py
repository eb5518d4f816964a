"""Native T5X checkpoints made without TensorStore: what tests of reading, damage and writing share."""

import gzip
import itertools
import json

import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
from flax import serialization, traverse_util

WI = "encoder/layers_1/mlp/expert/wi/kernel"
SCALE = "encoder/encoder_norm/scale"


def values(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def write_zarr(path, array, chunks, codec="gzip", **metadata):
    """A zarr array in plain Python: one file per chunk, C order, chunks at the edge padded."""
    path.mkdir(parents=True)
    for at in itertools.product(*(range(-(-n // c)) for n, c in zip(array.shape, chunks, strict=True))):
        part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, chunks, strict=True))]
        chunk = np.zeros(chunks, array.dtype)
        chunk[tuple(slice(n) for n in part.shape)] = part
        content = chunk.tobytes()
        name = ".".join(map(str, at)) or "0"
        (path / name).write_bytes(gzip.compress(content) if codec == "gzip" else content)
    zarray = {
        "zarr_format": 2,
        "shape": array.shape,
        "chunks": chunks,
        "dtype": "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.str,
        "compressor": {"id": "gzip", "level": 1} if codec == "gzip" else None,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
        **metadata,
    }
    (path / ".zarray").write_text(json.dumps(zarray))


def spec(name, array, **changes):
    """The placeholder of an array as T5X's Checkpointer writes it, but with wrong chunks and compressor."""
    return {
        "driver": "zarr",
        "dtype": array.dtype.name,
        "kvstore": {"driver": "file", "path": f"target.{name.replace('/', '.')}/"},
        "metadata": {"chunks": [1] * array.ndim, "compressor": {"id": "lz4"}, "shape": list(array.shape)},
        **changes,
    }


# Inlined, and an array that was never written: both must be left alone.
OPTIMIZER_STATE = {
    "param_states": {
        "lost": spec("nowhere", np.zeros((2, 2))),
        "pickled": msgpack.ExtType(42, b"not an array"),
    },
    "step": 7,
}


def write_index(path, leaves, **changes):
    """The msgpack file of a legacy checkpoint; `leaves` by '/'-joined name."""
    target = traverse_util.unflatten_dict(leaves, sep="/")
    index = {"version": 3, "optimizer": {"state": OPTIMIZER_STATE, "target": target}} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgpack.packb(index))


def write_legacy(step_directory, arrays, chunks=None, **zarray):
    for name, array in arrays.items():
        directory = step_directory / f"target.{name.replace('/', '.')}"
        write_zarr(directory, array, (chunks or {}).get(name, array.shape), **zarray)
    write_index(step_directory / "checkpoint", {name: spec(name, array) for name, array in arrays.items()})
    return step_directory


def encoded(array):
    """Flax's own encoding of an array."""
    return msgpack.unpackb(serialization.msgpack_serialize({"x": array}))["x"]


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def assert_holds(checkpoint, arrays):
    assert set(checkpoint.specs) == set(arrays)
    for name, array in arrays.items():
        assert checkpoint.specs[name].shape == array.shape
        assert checkpoint.specs[name].dtype == array.dtype
        assert_same(checkpoint.read(name), array)


CHUNKS = {WI: (2, 6, 4)}  # the last chunk of the last axis is cut


def write_orbax(directory, arrays, index, prefix="target"):
    for name, array in arrays.items():
        write_zarr(directory / f"{prefix}.{name.replace('/', '.')}", array, CHUNKS.get(name, array.shape))
    (directory / "checkpoint").write_bytes(msgpack.packb(index))


def placeholders(arrays, prefix="target"):
    leaves = {name: f"PLACEHOLDER://{prefix}.{name.replace('/', '.')}" for name in arrays}
    return traverse_util.unflatten_dict(leaves, sep="/")


LOST = {"param_states": {"lost": "PLACEHOLDER://state.param_states.lost"}, "step": "PLACEHOLDER://state.step"}
