"""Files with tensors in them, as PyTorch's world has them: one, or several with an index beside them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from qmoe_jax.checkpoints.reading import Source
from qmoe_jax.checkpoints.store import Index
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


def open_tensor_files(path: pathlib.Path, described: Mapping[str, Any]) -> TensorFiles:
    """The tensors of a folder. Raises CheckpointError if there are none, or files are missing or damaged."""
    source = next((path / name for name in TENSORS if (path / name).is_file()), None)
    if source is None:
        raise CheckpointError(f"{path}: no tensors: expected one of {', '.join(TENSORS)}.")
    if source.name.endswith(".json"):
        weight_map = read_json(source).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{source}: no 'weight_map' of names and files: damaged, copy it again.")
        files = sorted(set(weight_map.values()))
        if outside := [f for f in files if pathlib.PurePath(f).name != f]:
            raise CheckpointError(f"{source}: the file {outside[0]!r} doesn't lie beside it, as expected.")
        if missing := [f for f in files if not (path / f).is_file()]:
            raise CheckpointError(listed(f"{path}: files of {source.name} are missing:", missing))
    else:
        files, weight_map = [source.name], None
    opened: dict[str, TensorFile] = {
        f: SafetensorsFile(path / f) if f.endswith(".safetensors") else BinFile(path / f) for f in files
    }
    if weight_map is None:
        weight_map = {name: source.name for name in opened[source.name].specs}
    if missing := [f"{n} in {f}" for n, f in weight_map.items() if n not in opened[f].specs]:
        raise CheckpointError(listed(f"{path}: tensors of {source.name} are missing from their files:", missing))
    return TensorFiles(path, {name: opened[file] for name, file in weight_map.items()}, described)
