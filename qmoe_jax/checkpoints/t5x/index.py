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
import reprlib
import textwrap
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
_DEEPEST = 64  # trees within trees
# Entries of a list or tree: shapes are the only lists, and trees have a branch for each module.
_MOST_ITEMS = 1 << 16
MOST_BLOCKS = 1_000  # of a scanned model


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
    # An announced size costs memory before its items come.
    unpacker = msgpack.Unpacker(
        io.BytesIO(data),
        max_buffer_size=0,
        strict_map_key=False,
        max_array_len=_MOST_ITEMS,
        max_map_len=_MOST_ITEMS,
    )
    found: dict[str, Any] = {}

    def visit(depth: int = 0) -> None:
        if depth > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
        for _ in range(unpacker.read_map_header()):
            key = unpacker.unpack()
            if not isinstance(key, str | bytes | int):
                raise ValueError(f"a name is {reprlib.repr(key)}")
            if key in ("optimizer", "_optimizer", "state"):
                found[key] = True
                visit(depth + 1)
            elif key in ("version", "target", "step"):
                found[key] = unpacker.unpack()
            else:
                unpacker.skip()

    try:
        visit()
    except msgpack.OutOfData as e:
        raise CheckpointError(f"{where}: truncated after {len(data)} bytes: copy it again.") from e
    except (ValueError, TypeError, MemoryError, msgpack.UnpackException) as e:
        raise CheckpointError(f"{where}: not the msgpack file of a T5X checkpoint, or damaged ({reason(e)}).") from e
    if unpacker.tell() != len(data):
        extra = len(data) - unpacker.tell()
        raise CheckpointError(f"{where}: {extra} bytes follow the end of the msgpack data: damaged.")

    # The version of the format is recorded in legacy T5X only.
    if ("version" in found or "optimizer" in found) and found.get("version") != VERSION:
        raise CheckpointError(
            f"{where}: T5X checkpoint of version {reprlib.repr(found.get('version'))}, expected version {VERSION} "
            "(version 2 stores bfloat16 as uint16): restore and save it with a T5X of June 2021 or later."
        )
    if not isinstance(found.get("target"), dict):
        raise CheckpointError(f"{where}: no parameters ('target') in it: not a T5X checkpoint.")
    leaves = {}
    try:
        flat = list(_flatten(found["target"]))
    except ValueError as e:
        raise CheckpointError(f"{where}: 'target' is no tree of parameters ({e}): damaged.") from e
    for name, leaf in flat:
        try:
            leaves[name] = _decode_leaf(leaf)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as e:
            what = f"{type(e).__name__}: {reason(e)}"
            raise CheckpointError(f"{where}: parameter {name!r} cannot be understood ({what}).") from e
    return Index(leaves, _decode_step(found.get("step")))


def reason(error: Exception) -> str:
    """What an error says, but not all of a long value."""
    return textwrap.shorten(str(error), 200)


def _flatten(tree: dict, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict, with '/'-joined names; empty subtrees vanish. Raises ValueError where it is too deep."""
    if depth > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} deep")
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if value is None:
            continue
        if not isinstance(value, dict) or _CHUNKED in value or _SPEC_KEYS <= value.keys():
            yield name, value
        else:
            yield from _flatten(value, f"{name}/", depth + 1)


def _decode_leaf(leaf: Any) -> np.ndarray | Stored:
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        return Stored(_folder(leaf.removeprefix(_PLACEHOLDER)))
    if not isinstance(leaf, dict):
        return _decode_array(leaf)
    if _CHUNKED in leaf:
        chunks = [_decode_array(chunk).reshape(-1) for chunk in _values(leaf["chunks"])]
        return np.concatenate(chunks).reshape(_shape(_values(leaf["shape"])))

    if leaf["driver"] != "zarr":
        raise ValueError(f"TensorStore driver {reprlib.repr(leaf['driver'])}, expected 'zarr'")
    # The array lies beside this file, wherever the checkpoint was copied to. Early TensorStores had the path
    # at the top level. Chunks and compressor are left to the array's own metadata.
    kvstore, metadata, dtype = leaf["kvstore"], leaf["metadata"], leaf.get("dtype")
    if not isinstance(kvstore, dict) or not isinstance(metadata, dict):
        raise ValueError(f"kvstore {reprlib.repr(kvstore)}, metadata {reprlib.repr(metadata)}, expected trees")
    path, shape = kvstore.get("path") or leaf["path"], metadata.get("shape")
    if not isinstance(path, str):
        raise ValueError(f"path {reprlib.repr(path)}, expected text")
    return Stored(
        _folder(path.rstrip("/").rpartition("/")[2]),
        None if shape is None else _shape(shape),
        None if dtype is None else np_dtype(dtype),
    )


def _folder(name: str) -> str:
    """Name of a folder beside the index file. Raises ValueError for one elsewhere."""
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"an array in {reprlib.repr(name)}, expected the name of a folder beside this file")
    return name


def _shape(value: Any) -> tuple[int, ...]:
    """Raises ValueError for anything but sizes."""
    if not isinstance(value, list | tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in value):
        raise ValueError(f"shape {reprlib.repr(value)}, expected whole numbers from 0 on")
    return tuple(value)


def _decode_array(leaf: Any) -> np.ndarray:
    """Flax's encoding of an array: an extension type around (shape, dtype name, bytes)."""
    if isinstance(leaf, int | float):
        return np.asarray(leaf)
    if not isinstance(leaf, msgpack.ExtType) or leaf.code not in (_NDARRAY, _SCALAR):
        raise ValueError(f"found {reprlib.repr(leaf)}, expected an array or a reference to one")
    shape, dtype, content = msgpack.unpackb(leaf.data)
    return np.frombuffer(content, np_dtype(dtype)).reshape(_shape(shape))


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
    if not isinstance(name, str) or len(name) > 16:
        raise ValueError(f"dtype {reprlib.repr(name)}")
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    if dtype.hasobject or dtype.names or dtype.shape:
        raise ValueError(f"dtype {name!r}")
    return dtype


_SUBBLOCK = re.compile(r"(\w+)/\1/subblock_(\d{1,6})/(.+)")


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
        if max(shape[1], subblocks[stack]) > MOST_BLOCKS:
            raise CheckpointError(
                f"Parameter {name!r} of a scanned model has shape {shape}, so {shape[1]} blocks of {subblocks[stack]} "
                f"layers; expected at most {MOST_BLOCKS} of each."
            )

    names: dict[str, tuple[str, int | None]] = {}
    for name in shapes:
        if name not in scanned:
            names[name] = (name, None)
            continue
        stack, j, rest = scanned[name].groups()
        for block in range(blocks[stack]):
            names[f"{stack}/layers_{block * subblocks[stack] + int(j)}/{rest}"] = (name, block)
    return names
