"""The msgpack file of a T5X checkpoint: which parameters there are, and where the array of each is.

Everything here is about names; no array file is opened. Layouts, all of them nested dicts of parameters:

  legacy T5X      {'version': 3, 'optimizer': {'target': tree, 'state': ...}}
  Orbax           {'target': tree, 'state': ...}, or (older) {'_optimizer': {'target': tree, 'state': ...}}

A leaf is an array in flax's msgpack encoding, a TensorStore spec (a dict), or the string 'PLACEHOLDER://<array>'.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from qmoe_jax.errors import CheckpointError

VERSION = 3
_PLACEHOLDER = "PLACEHOLDER://"
_SPEC_KEYS = {"driver", "kvstore", "metadata"}
_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY, _SCALAR = 1, 3  # flax's msgpack extension types


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array in a directory of its own, beside the msgpack file.

    Attributes:
      array: name of that directory, such as 'target.token_embedder.embedding'.
      shape: its shape, None where only the directory tells.
      dtype: its dtype, None where only the directory tells.
    """

    array: str
    shape: tuple[int, ...] | None = None
    dtype: np.dtype | None = None


@dataclasses.dataclass(frozen=True)
class Index:
    """What a msgpack file says.

    Attributes:
      leaves: arrays of `target`, or where they are, by '/'-joined name as stored.
      step: training step, None if it isn't recorded in the file itself.
    """

    leaves: dict[str, np.ndarray | Stored]
    step: int | None


def parse(data: bytes, where: str) -> Index:
    """Reads the msgpack file of a checkpoint.

    Optimizer state is skipped as it streams by: its arrays are neither decoded nor looked up.

    Args:
      data: content of the file.
      where: its path, for messages.

    Raises:
      CheckpointError: the file is truncated or damaged, is of another version, or not of a T5X checkpoint.
    """
    unpacker = msgpack.Unpacker(io.BytesIO(data), max_buffer_size=0, strict_map_key=False)
    found: dict[str, Any] = {}

    def visit() -> None:
        for _ in range(unpacker.read_map_header()):
            key = unpacker.unpack()
            if key in ("optimizer", "_optimizer", "state"):
                found[key] = True
                visit()
            elif key in ("version", "target", "step"):
                found[key] = unpacker.unpack()
            else:
                unpacker.skip()

    try:
        visit()
    except msgpack.OutOfData as e:
        raise CheckpointError(f"{where}: truncated after {len(data)} bytes: copy it again.") from e
    except (ValueError, TypeError, msgpack.UnpackException) as e:
        raise CheckpointError(f"{where}: not the msgpack file of a T5X checkpoint, or damaged ({e}).") from e
    if unpacker.tell() != len(data):
        extra = len(data) - unpacker.tell()
        raise CheckpointError(f"{where}: {extra} bytes follow the end of the msgpack data: damaged.")

    # The version of the format is recorded in legacy T5X only.
    if ("version" in found or "optimizer" in found) and found.get("version") != VERSION:
        raise CheckpointError(
            f"{where}: T5X checkpoint of version {found.get('version')}, expected version {VERSION} "
            "(version 2 stores bfloat16 as uint16): restore and save it with a T5X of June 2021 or later."
        )
    if not isinstance(found.get("target"), dict):
        raise CheckpointError(f"{where}: no parameters ('target') in it: not a T5X checkpoint.")
    leaves = {}
    for name, leaf in _flatten(found["target"]):
        try:
            leaves[name] = _decode_leaf(leaf)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as e:
            what = f"{type(e).__name__}: {e}"
            raise CheckpointError(f"{where}: parameter {name!r} cannot be understood ({what}).") from e
    return Index(leaves, _decode_step(found.get("step")))


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict, with '/'-joined names; empty subtrees vanish."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if value is None:
            continue
        if not isinstance(value, dict) or _CHUNKED in value or _SPEC_KEYS <= value.keys():
            yield name, value
        else:
            yield from _flatten(value, f"{name}/")


def _decode_leaf(leaf: Any) -> np.ndarray | Stored:
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        return Stored(leaf.removeprefix(_PLACEHOLDER))
    if not isinstance(leaf, dict):
        return _decode_array(leaf)
    if _CHUNKED in leaf:
        chunks = [_decode_array(chunk) for chunk in _values(leaf["chunks"])]
        return np.concatenate(chunks).reshape(_values(leaf["shape"]))

    if leaf["driver"] != "zarr":
        raise ValueError(f"TensorStore driver {leaf['driver']!r}, expected 'zarr'")
    # The array lies beside this file, wherever the checkpoint was copied to. Early TensorStores had the path
    # at the top level. Chunks and compressor are left to the array's own metadata.
    path = leaf["kvstore"].get("path") or leaf["path"]
    shape = leaf["metadata"].get("shape")
    dtype = leaf.get("dtype")
    return Stored(
        path.rstrip("/").rpartition("/")[2],
        None if shape is None else tuple(shape),
        None if dtype is None else np_dtype(dtype),
    )


def _decode_array(leaf: Any) -> np.ndarray:
    """Flax's encoding of an array: an extension type around (shape, dtype name, bytes)."""
    if isinstance(leaf, int | float):
        return np.asarray(leaf)
    if not isinstance(leaf, msgpack.ExtType) or leaf.code not in (_NDARRAY, _SCALAR):
        raise ValueError(f"found {str(leaf)[:60]!r}, expected an array or a reference to one")
    shape, dtype, content = msgpack.unpackb(leaf.data)
    return np.frombuffer(content, np_dtype(dtype)).reshape(shape)


def _values(items: dict[str, Any] | list) -> list:
    """A tuple in flax's encoding: a dict of '0', '1', ..."""
    return [items[str(i)] for i in range(len(items))] if isinstance(items, dict) else list(items)


def _decode_step(leaf: Any) -> int | None:
    """The training step where it is inlined; it is not needed, so any other form counts as unknown."""
    try:
        return int(_decode_array(leaf))
    except (ValueError, TypeError, msgpack.UnpackException):
        return None


def np_dtype(name: str) -> np.dtype:
    """NumPy dtype of a stored name. Raises TypeError or ValueError for anything but plain numbers."""
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    if dtype.hasobject:
        raise ValueError(f"dtype {name!r}")
    return dtype


_SUBBLOCK = re.compile(r"(\w+)/\1/subblock_(\d+)/(.+)")


def unscanned(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, int | None]]:
    """Names layer by layer, where a scanned model keeps the layers of all its blocks in one array.

    Layer `block * s + j` is sub-block j of s in that block; blocks are array axis 1.

    Args:
      shapes: shapes by stored name.

    Returns:
      By unscanned name: stored name, and the index on axis 1 (None: the array is of that parameter alone).

    Raises:
      CheckpointError: scanned arrays that disagree about the number of blocks.
    """
    scanned = {name: match for name in shapes if (match := _SUBBLOCK.fullmatch(name))}
    subblocks: dict[str, int] = {}
    blocks: dict[str, int] = {}
    for name, match in scanned.items():
        stack, j, _ = match.groups()
        shape = shapes[name]
        if len(shape) < 2 or blocks.setdefault(stack, shape[1]) != shape[1]:
            raise CheckpointError(
                f"Parameter {name!r} of a scanned model has shape {shape}; expected "
                f"{blocks.get(stack, 'the')} blocks of the {stack} on axis 1."
            )
        subblocks[stack] = max(subblocks.get(stack, 0), int(j) + 1)

    names: dict[str, tuple[str, int | None]] = {}
    for name in shapes:
        if name not in scanned:
            names[name] = (name, None)
            continue
        stack, j, rest = scanned[name].groups()
        for block in range(blocks[stack]):
            names[f"{stack}/layers_{block * subblocks[stack] + int(j)}/{rest}"] = (name, block)
    return names
