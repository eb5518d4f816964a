"""Hugging Face's layout: config.json and safetensors files, or files of torch.save (.bin).

What model it is, config.json's model_type says; what tensors are called, that family's names. An expert's matrix may be
a tensor of its own: they are stacked when they are read.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qmoe_jax.checkpoints.checkpoint import Checkpoint, StoredCheckpoint
from qmoe_jax.checkpoints.conversion import ExpertReader, Options, Part, Writer, expert_dtype, names_of, replacing
from qmoe_jax.checkpoints.layout import Layout
from qmoe_jax.checkpoints.tensor_files import FLOATS, INDEX, TENSORS, SafetensorsFile, folder, open_tensor_files
from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.files import write_json
from qmoe_jax.models.families import family_of_type
from qmoe_jax.models.family import Family

CONFIG = "config.json"


def is_huggingface(path: str | os.PathLike) -> bool:
    """Whether `path` is a directory with Hugging Face's files in it."""
    return folder(path).has(CONFIG) and has_tensors(path)


def has_tensors(path: str | os.PathLike) -> bool:
    """Whether there are files of tensors, with config.json or without."""
    return any(map(folder(path).has, TENSORS))


def read_config(path: str | os.PathLike, layout: str) -> tuple[Family, dict[str, Any]]:
    """The family that config.json names, and what it says. Raises CheckpointError for one that isn't known."""
    described = folder(path).json(CONFIG)
    try:
        return family_of_type(described.get("model_type"), layout), described
    except CheckpointError as e:
        raise CheckpointError(f"{os.fspath(path)}/{CONFIG}: {e}") from e


class HuggingFaceCheckpoint(StoredCheckpoint):
    """See `StoredCheckpoint`.

    Args:
      path: the directory, local or gs://.
      **overrides: fields of the config to change.

    Raises:
      CheckpointError: a file is missing or damaged, or asks for code to be run; tensors are missing, foreign, of wrong
        shape, or don't fit config.json.
    """

    def __init__(self, path: str | os.PathLike, **overrides: Any):
        path = os.fspath(path).rstrip("/") if "://" in os.fspath(path) else pathlib.Path(path)
        family, described = read_config(path, "huggingface")
        store = open_tensor_files(path, described)
        super().__init__(store, "huggingface", family, overrides)
        weights = [name for tensors in self._tensors.values() if not tensors.packed for name in tensors.names]
        if odd := [f"{n}: {store.specs[n].dtype}" for n in weights if store.specs[n].dtype not in FLOATS]:
            raise CheckpointError(listed(f"{path}: tensors must be {', '.join(map(str, FLOATS))}.", odd))
        self.provenance["step"] = described.get("t5x_step")


# --- Writing ---------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """What is read at once: parameters that share a tensor, most often one; or some experts of a layer.

    Attributes:
      nbytes: of what is written.
      names: of the parameters; or the layer's.
      experts: which; None: these aren't experts.
    """

    nbytes: int
    names: tuple[str, ...]
    experts: range | None = None


class HuggingFaceWriter(Writer):
    """`checkpoint` as safetensors files, an index and config.json; see `conversion.Writer`.

    A part is a file. As the family's names say, experts' matrices are tensors of their own, or a layer's are in one.
    """

    def __init__(self, checkpoint: Checkpoint, output: pathlib.Path, options: Options):
        super().__init__(checkpoint, output, options)
        self.names = names_of(checkpoint, "huggingface")
        dtypes = {n: options.dtype_of(spec.dtype) for n, spec in checkpoint.specs.items()}
        self.config = self.names.describe(checkpoint.config, dtypes, checkpoint.provenance.get("step"))
        self.lost = self.names.lost(checkpoint.config)
        files = self._files(self._units(dtypes))
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        names = ["model.safetensors"] if len(files) == 1 else names
        self.files = dict(zip(names, files, strict=True))
        self.parts = [Part(name, sum(unit.nbytes for unit in units)) for name, units in self.files.items()]
        self._reader = ExpertReader(checkpoint)

    def _units(self, dtypes: Mapping[str, np.dtype]) -> list[Unit]:
        checkpoint, config = self.checkpoint, self.checkpoint.config
        sharing: dict[str, list[str]] = {}  # by tensor
        for name in checkpoint.specs:
            if not checkpoint.is_expert(name):
                sharing.setdefault(self.names.tensors(name, config).names[0], []).append(name)
        units = [
            Unit(sum(math.prod(checkpoint.specs[n].shape) * dtypes[n].itemsize for n in names), tuple(names))
            for names in sharing.values()
        ]
        shapes = checkpoint.family.param_shapes(config)
        for layer in config.sparse_layers:
            expert, whole = 0, False
            for name in checkpoint.matrices(layer).values():
                dtype = self.options.dtype_of(expert_dtype(checkpoint, name))
                expert += math.prod(shapes[name][1:]) * dtype.itemsize
                whole = whole or not self.names.tensors(name, config).stacked
            size = config.num_experts if whole else max(1, self.options.shard_bytes // expert)
            for start in range(0, config.num_experts, size):
                group = range(start, min(start + size, config.num_experts))
                units.append(Unit(len(group) * expert, (layer,), group))
        return units

    def _files(self, units: list[Unit]) -> list[list[Unit]]:
        """Units by file, which is about as large as was asked for."""
        files: list[list[Unit]] = [[]]
        for unit in units:
            if files[-1] and sum(u.nbytes for u in files[-1]) + unit.nbytes > self.options.shard_bytes:
                files.append([])
            files[-1].append(unit)
        return files

    def write(self, part: str) -> list[pathlib.Path]:
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {}
        for unit in self.files[part]:
            tensors |= self._read(unit)
        tensors = {n: np.ascontiguousarray(v) for n, v in tensors.items()}
        with replacing(self.output / part) as temporary:
            save_file(tensors, temporary, {"format": "pt"})
        return [self.output / part]

    def _read(self, unit: Unit) -> dict[str, np.ndarray]:
        """A unit's tensors."""
        if unit.experts is None:
            return self._tensors({name: self.checkpoint.read(name) for name in unit.names}, range(1))
        (layer,) = unit.names
        kernels = self._reader.read(layer, unit.experts.start, unit.experts.stop)
        return self._tensors({self.checkpoint.matrices(layer)[m]: k for m, k in kernels.items()}, unit.experts)

    def _tensors(self, parameters: dict[str, np.ndarray], experts: range) -> dict[str, np.ndarray]:
        """The tensors that parameters are written to, or some experts of them."""
        written: dict[str, np.ndarray] = {}
        for name, value in parameters.items():
            tensors = self.names.tensors(name, self.checkpoint.config)
            dtype, size = self.options.dtype_of(value.dtype), value.shape[-1] if value.ndim else 1
            for number, array in zip(experts, value, strict=True) if tensors.stacked else [(0, value)]:
                if (part := tensors.part) is not None:
                    shape = (*array.shape[:-1], part.of * size)
                    shape = (*shape[:-2], *shape[:-3:-1]) if tensors.transposed else shape
                    tensor = written.setdefault(tensors.names[number], np.empty(shape, dtype))
                    tensor = tensor.swapaxes(-1, -2) if tensors.transposed else tensor
                    tensor[..., part.outputs(0, size, size)] = array
                    continue
                array = (array.swapaxes(-1, -2) if tensors.transposed else array).astype(dtype)
                written |= dict.fromkeys((tensors.names[number], *tensors.copies), array)
        return written

    def finish(self) -> list[pathlib.Path]:
        written = []
        if len(self.files) > 1:
            specs = {name: SafetensorsFile(self.output / name).specs for name in self.files}
            total = sum(math.prod(s.shape) * s.dtype.itemsize for file in specs.values() for s in file.values())
            weight_map = {tensor: name for name, file in specs.items() for tensor in file}
            write_json(self.output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            written.append(self.output / INDEX)
        write_json(self.output / CONFIG, self.config)
        return [*written, self.output / CONFIG]


LAYOUT = Layout(
    "huggingface",
    is_huggingface,
    HuggingFaceCheckpoint,
    ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"),
    HuggingFaceWriter,
)
