"""Files with tensors in them, as PyTorch's world has them: one, or several with an index beside them."""

from __future__ import annotations

import functools
import math
import os
import pathlib
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts

from qmoe_jax.checkpoints import retry
from qmoe_jax.checkpoints.reading import Source
from qmoe_jax.checkpoints.store import Index, box_of
from qmoe_jax.checkpoints.t5x.files import child, located
from qmoe_jax.checkpoints.torch_files import TorchFile
from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.files import MOST_BYTES, parse_json, read_json

INDEX = "model.safetensors.index.json"
# Where tensors may be, the first that is there: an index of several files, or one file.
TENSORS = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    # No weights, but formats that aren't read have them, and are refused by their names.
    "F64": np.dtype(np.float64),
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (16, 32, 64)},
}
FLOATS = tuple(_DTYPES[kind] for kind in ("BF16", "F16", "F32"))  # weights that aren't packed


class TensorFile(Protocol):
    """A file with tensors, of which nothing but names and shapes is read before `read`.

    Attributes:
      specs: shape and dtype by name.
    """

    @property
    def specs(self) -> Mapping[str, jax.ShapeDtypeStruct]: ...

    def read(self, name: str, index: Index = ()) -> np.ndarray: ...


class SafetensorsFile:
    """See `TensorFile`."""

    def __init__(self, path: pathlib.Path):
        import safetensors  # Here, so that everything else runs without it.

        self.path = path
        try:
            with safetensors.safe_open(path, "numpy") as file:  # Looks whether the header fits the file.
                slices = {name: file.get_slice(name) for name in file.keys()}
                kinds = {name: s.get_dtype() for name, s in slices.items()}
                shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        except (OSError, safetensors.SafetensorError) as e:
            raise CheckpointError(f"{path}: not a safetensors file, or damaged ({e}): copy it again.") from e
        if odd := [f"{name}: {kind}" for name, kind in kinds.items() if kind not in _DTYPES]:
            raise CheckpointError(listed(f"{path}: tensors must be {', '.join(_DTYPES)}.", odd))
        self.specs = {name: jax.ShapeDtypeStruct(shape, _DTYPES[kinds[name]]) for name, shape in shapes.items()}
        # Some of these dtypes the package can't slice: the header, a JSON object after its size, tells where bytes are.
        with path.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = parse_json(f.read(min(size, MOST_BYTES)), f"{path}: the header")
        self._begin = {name: 8 + size + header[name]["data_offsets"][0] for name in self.specs}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        spec = self.specs[name]
        if spec.size == 0:
            return np.zeros(spec.shape, spec.dtype)[index]
        try:
            values = np.memmap(self.path, np.uint8, "r", self._begin[name], (spec.size * spec.dtype.itemsize,))
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{self.path}: cannot read tensor {name!r} ({e}): copy it again.") from e
        return np.array(values.view(spec.dtype).reshape(spec.shape)[index])


class RemoteSafetensorsFile:
    """See `TensorFile`; at a URL, of which the bytes are fetched that a slice of the first axis takes.

    Args:
      url: for messages.
      piece: piece(start, stop), bytes of the file.
    """

    def __init__(self, url: str, piece: Callable[[int, int], bytes]):
        self._url, self._piece = url, piece
        size = int.from_bytes(piece(0, 8), "little")
        if not 0 < size <= MOST_BYTES:
            raise CheckpointError(f"{url}: not a safetensors file: a header of {size:,} bytes.")
        header = parse_json(piece(8, 8 + size), f"{url}: the header")
        header.pop("__metadata__", None)
        self.specs, self._begin, end = {}, {}, 0
        odd, begins = [], {}
        for name, told in header.items():
            match told:
                case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(begin), int(stop)]} if (
                    kind in _DTYPES
                    and all(type(n) is int and 0 <= n < 2**48 for n in shape)
                    and stop - begin == math.prod(shape) * _DTYPES[kind].itemsize
                ):
                    self.specs[name] = jax.ShapeDtypeStruct(tuple(shape), _DTYPES[kind])
                    begins[begin, stop] = name
                    self._begin[name] = 8 + size + begin
                case _:
                    odd.append(f"{name}: {reprlib.repr(told)}")
        for begin, stop in sorted(begins):  # One after the other, as the format has it.
            if begin != end:
                odd.append(f"{begins[begin, stop]}: begins at {begin}, expected {end}")
            end = stop
        if odd:
            raise CheckpointError(listed(f"{url}: the header is damaged, or tensors are of unknown kinds:", odd))

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        spec = self.specs[name]
        if spec.size == 0:
            return np.zeros(spec.shape, spec.dtype)[index]
        box, rest = box_of(index, spec.shape)
        rows, others = (box[0], spec.shape[1:]) if spec.shape else (range(1), ())
        row = math.prod(others) * spec.dtype.itemsize
        begin = self._begin[name] + rows.start * row
        content = self._piece(begin, begin + len(rows) * row)
        if len(content) != len(rows) * row:
            raise CheckpointError(f"{self._url}: tensor {name!r} is cut off: copy it again.")
        values = np.frombuffer(content, spec.dtype).reshape(len(rows), *others)
        if not spec.shape:
            return np.array(values[0])
        inner = tuple(slice(r.start, r.stop) for r in box[1:])
        return np.array(values[(slice(None), *inner)][rest])


class RemoteFolder:
    """See `LocalFolder`; TensorStore fetches pieces of its files."""

    def __init__(self, url: str):
        self.path = url.rstrip("/")
        self._store = ts.KvStore.open(child(located(self.path), "/")).result()

    def has(self, name: str) -> bool:
        return self._read(name, 0, 1).state != "missing"

    def json(self, name: str) -> dict[str, Any]:
        return parse_json(self._piece(name, 0, None), f"{self.path}/{name}")

    def tensors(self, name: str) -> TensorFile:
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{self.path}/{name}: of files at a URL only safetensors are read: copy it here.")
        return RemoteSafetensorsFile(f"{self.path}/{name}", functools.partial(self._piece, name))

    def _piece(self, name: str, start: int, stop: int | None) -> bytes:
        found = self._read(name, start, stop)
        if found.state == "missing":
            raise CheckpointError(f"{self.path}/{name} is missing; copy it again.")
        return found.value

    def _read(self, name: str, start: int, stop: int | None) -> Any:
        return retry.result(lambda: self._store.read(name, byte_range=slice(start, stop)), f"{self.path}/{name}")


class BinFile:
    """See `TensorFile`; a file of torch.save."""

    def __init__(self, path: pathlib.Path):
        self._file = TorchFile(path)
        self._tensors = self._file.tensors()
        self.specs = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self._file.read(self._tensors[name])[index]


class TensorFiles:
    """The tensors of several files as a `Store`.

    Args:
      path: for messages.
      files: each tensor's.
      described: what is told of the model beside them.
    """

    def __init__(self, path: str | os.PathLike, files: Mapping[str, TensorFile], described: Mapping[str, Any]):
        self.path, self.described = str(path), described
        self._files = dict(files)
        self.specs = {name: file.specs[name] for name, file in self._files.items()}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self._files[name].read(name, index)

    def source(self, name: str) -> Source | None:
        return None


class LocalFolder:
    """Files of a folder, by name. Paths are told by errors."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def json(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name)

    def tensors(self, name: str) -> TensorFile:
        path = self.path / name
        return SafetensorsFile(path) if name.endswith(".safetensors") else BinFile(path)


def folder(path: str | os.PathLike) -> LocalFolder | RemoteFolder:
    """A folder of this machine, or one at a URL that TensorStore understands (gs://bucket/..., file:///...)."""
    return RemoteFolder(os.fspath(path)) if "://" in os.fspath(path) else LocalFolder(path)


def open_tensor_files(path: str | os.PathLike, described: Mapping[str, Any]) -> TensorFiles:
    """The tensors of a folder. Raises CheckpointError if there are none, or files are missing or damaged."""
    path, at = os.fspath(path), folder(path)
    source = next((name for name in TENSORS if at.has(name)), None)
    if source is None:
        raise CheckpointError(f"{path}: no tensors: expected one of {', '.join(TENSORS)}.")
    if source.endswith(".json"):
        weight_map = at.json(source).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{path}/{source}: no 'weight_map' of names and files: damaged, copy it again.")
        files = sorted(set(weight_map.values()))
        if outside := [f for f in files if pathlib.PurePath(f).name != f]:
            raise CheckpointError(f"{path}/{source}: the file {outside[0]!r} doesn't lie beside it, as expected.")
        if missing := [f for f in files if not at.has(f)]:
            raise CheckpointError(listed(f"{path}: files of {source} are missing:", missing))
    else:
        files, weight_map = [source], None
    opened = {f: at.tensors(f) for f in files}
    if weight_map is None:
        weight_map = {name: source for name in opened[source].specs}
    if missing := [f"{n} in {f}" for n, f in weight_map.items() if n not in opened[f].specs]:
        raise CheckpointError(listed(f"{path}: tensors of {source} are missing from their files:", missing))
    return TensorFiles(path, {name: opened[file] for name, file in weight_map.items()}, described)
