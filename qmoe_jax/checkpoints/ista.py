"""The published QMoE models' layout: compressed experts in the paper's code, in files of torch.save.

    config.json   Hugging Face's, of the model before its compression
    noexp.pt      everything but experts, by Hugging Face's names
    exp00.pt ...  a sparse layer each, in order: w_comp, row_off, ter_minmax of each matrix, and an empty weight
    sizes.pt      number of codewords of every matrix

Everything is bfloat16; what of noexp.pt is stored as float32 is rounded when it is read, as the reference does. Which
layers are sparse is read off the names: the fully sparse model's config.json says otherwise by Hugging Face's rule.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qmoe_jax.checkpoints.checkpoint import BFLOAT16, Checkpoint, Kernels, StoredCheckpoint, StoredMatrix
from qmoe_jax.checkpoints.compressed.target import in_codec, lost_by_rounding, refuse_dense
from qmoe_jax.checkpoints.conversion import Options, Part, Writer, names_of
from qmoe_jax.checkpoints.huggingface import CONFIG, read_config
from qmoe_jax.checkpoints.layout import Layout
from qmoe_jax.checkpoints.tensor_files import BinFile, TensorFiles
from qmoe_jax.checkpoints.torch_files import TorchFile, TorchWriter
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.files import write_json
from qmoe_jax.models.names import Shape

DENSE, SIZES = "noexp.pt", "sizes.pt"
CODEC = "dictionary"
_STORED = {"w_comp": np.dtype(np.int16), "row_off": np.dtype(np.int32), "ter_minmax": BFLOAT16}


def is_ista(path: str | os.PathLike) -> bool:
    """Whether `path` is a directory with the published models' files in it."""
    path = pathlib.Path(path)
    return (path / CONFIG).is_file() and (path / DENSE).is_file()


def _file(layer: int) -> str:
    return f"exp{layer:02d}.pt"


def _prefixes(checkpoint: Checkpoint, layer: str, matrix: str) -> list[str]:
    """What the names of each expert's arrays begin with."""
    tensors = names_of(checkpoint, "ista").tensors(checkpoint.matrices(layer)[matrix], checkpoint.config)
    return [name.removesuffix(".weight") for name in tensors.names]


class IstaCheckpoint(StoredCheckpoint):
    """See `StoredCheckpoint`. Experts' kernels are `CompressedExperts`; all else is bfloat16.

    When it is opened, the index of noexp.pt is read, and that all files are there is checked.

    Args:
      path: the directory.
      **overrides: fields of the config to change.

    Raises:
      CheckpointError: a file is missing or damaged, or asks for code to be run; tensors are missing, foreign, of wrong
        shape, or don't fit config.json.
    """

    codec = CODEC

    def __init__(self, path: str | os.PathLike, **overrides: Any):
        path = pathlib.Path(path)
        family, described = read_config(path, "ista")
        dense = BinFile(path / DENSE)
        super().__init__(
            TensorFiles(path, dict.fromkeys(dense.specs, dense), described), "ista", family, overrides, BFLOAT16
        )
        missing = [_file(i) for i, _ in enumerate(self.config.sparse_layers) if not (path / _file(i)).is_file()]
        if missing:
            raise CheckpointError(listed(f"{path}: files of sparse layers are missing:", missing))

    def read_experts(self, layer: str, start: int, stop: int) -> Kernels:
        file = self._expert_file(layer)
        return {m: self._matrix(file, layer, m, start, stop) for m in self.matrices(layer)}

    def _matrix(self, file: TorchFile, layer: str, matrix: str, start: int, stop: int) -> CompressedExperts:
        _, out, width = self._shape(layer, matrix)
        arrays: dict[str, list[np.ndarray]] = {name: [] for name in _STORED}
        tensors = file.tensors()
        for prefix in _prefixes(self, layer, matrix)[start:stop]:
            for name, values in arrays.items():
                if (key := f"{prefix}.{name}") not in tensors:
                    raise CheckpointError(f"{file.path}: {key} is missing; copy it again.")
                if tensors[key].dtype != _STORED[name] or len(tensors[key].shape) != 1:
                    raise CheckpointError(
                        f"{file.path}: {key} is {tensors[key].dtype} {list(tensors[key].shape)}, expected "
                        f"{_STORED[name]} [n]."
                    )
                values.append(file.read(tensors[key]))
            if self._sizes.get(prefix, len(arrays["w_comp"][-1])) != len(arrays["w_comp"][-1]):
                raise CheckpointError(
                    f"{file.path}: {prefix}.w_comp has {len(arrays['w_comp'][-1])} codewords, but {SIZES} says "
                    f"{self._sizes[prefix]}; copy both again."
                )
        try:
            stored = {
                "codewords": np.concatenate(arrays["w_comp"]).view(np.uint16),
                "row_offsets": np.stack(arrays["row_off"]),
                "levels": np.stack(arrays["ter_minmax"]).reshape(stop - start, out, 2),
            }
            return CompressedExperts.from_stored(stored, CODEC, (stop - start, out, width))
        except ValueError as e:
            where = f"{self.matrices(layer)[matrix]}, experts {start} to {stop - 1}"
            raise CheckpointError(f"{file.path}: {where}, counted from {start}: {e}") from e

    def _expert_file(self, layer: str) -> TorchFile:
        """The file of a layer: the one that is expected, or another that has its names."""
        layers = self.config.sparse_layers
        first = _prefixes(self, layer, self.config.expert.matrices[0])[0] + ".w_comp"
        for i in sorted(range(len(layers)), key=lambda i: layers[i] != layer):
            file = TorchFile(pathlib.Path(self.path) / _file(i))
            if first in file.tensors():
                return file
        raise CheckpointError(f"{self.path}: no file has the experts of {layer} ({first}); copy the checkpoint again.")

    def _shape(self, layer: str, matrix: str) -> tuple[int, int, int]:
        """Experts, out, in."""
        experts, width, out = self._shapes[self.matrices(layer)[matrix]]
        return experts, out, width

    @functools.cached_property
    def _shapes(self) -> dict[str, Shape]:
        return self.family.param_shapes(self.config)

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """Codewords of each matrix; empty if there is no sizes.pt, which only the reference needs."""
        file = pathlib.Path(self.path) / SIZES
        if not file.exists():
            return {}
        sizes = TorchFile(file).content
        if not isinstance(sizes, dict) or not all(isinstance(n, str) and type(v) is int for n, v in sizes.items()):
            raise CheckpointError(f"{file}: holds {reprlib.repr(sizes)}, expected numbers of codewords by name.")
        return sizes

    @property
    def expert_sizes(self) -> Mapping[str, Mapping[str, StoredMatrix]]:
        sizes = self._sizes or {
            name.removesuffix(".w_comp"): math.prod(tensor.shape)
            for layer in self.config.sparse_layers
            for name, tensor in self._expert_file(layer).tensors().items()
            if name.endswith(".w_comp")
        }

        def stored(layer, matrix):
            experts, out, width = self._shape(layer, matrix)
            codewords = sum(sizes.get(prefix, 0) for prefix in _prefixes(self, layer, matrix))
            return StoredMatrix((experts, out, width), 2 * codewords + experts * (4 * (out + 1) + 2 * 2 * out))

        return {layer: {m: stored(layer, m) for m in self.matrices(layer)} for layer in self.config.sparse_layers}


# --- Writing ---------------------------------------------------------------------------------------------------------


class IstaWriter(Writer):
    """A compressed `checkpoint` as what the reference's loader reads; see `conversion.Writer`.

    The loader reads every file beside these but README.md: the report goes there.
    """

    closed = True

    def __init__(self, checkpoint: Checkpoint, output: pathlib.Path, options: Options):
        super().__init__(checkpoint, output, options)
        refuse_dense(checkpoint, "ista")
        config, self.names = checkpoint.config, names_of(checkpoint, "ista")
        self.config = self.names.describe(config, dict.fromkeys(checkpoint.specs, BFLOAT16), None)
        self.layers_of = {_file(i): layer for i, layer in enumerate(config.sparse_layers)}
        in_codec(checkpoint, config.sparse_layers[0], CODEC)  # Levels that it can't hold: before anything is written.
        self.parts = [Part(DENSE, sum(2 * math.prod(spec.shape) for spec in checkpoint.specs.values()))]
        for file, layer in self.layers_of.items():
            size = sum(m.nbytes for m in checkpoint.expert_sizes[layer].values())
            self.parts.append(Part(file, size if checkpoint.codec == CODEC else None))
        self.lost = [*lost_by_rounding(checkpoint), "how the experts were quantized, and where the model came from"]
        self.lost += self.names.lost(config)

    def write(self, part: str) -> list[pathlib.Path]:
        if part == DENSE:
            self._write_dense()
        else:
            self._write_layer(part, self.layers_of[part])
        return [self.output / part]

    def _write_dense(self) -> None:
        checkpoint = self.checkpoint
        with TorchWriter(self.output / DENSE, ordered=True) as writer:
            for name in checkpoint.family.param_shapes(checkpoint.config):
                if checkpoint.is_expert(name):
                    continue
                tensors = self.names.tensors(name, checkpoint.config)
                value = checkpoint.read(name).astype(BFLOAT16)
                writer.add(tensors.names[0], value.T if tensors.transposed else value)
                for other in tensors.copies:
                    writer.alias(other, tensors.names[0])

    def _write_layer(self, file: str, layer: str) -> None:
        matrices = {m: e.stored() for m, e in in_codec(self.checkpoint, layer, CODEC).items()}
        prefixes = {m: _prefixes(self.checkpoint, layer, m) for m in matrices}
        begin = {
            m: np.append(0, np.cumsum(stored["row_offsets"][:, -1], dtype=np.int64)) for m, stored in matrices.items()
        }
        with TorchWriter(self.output / file) as writer:
            for e in range(self.checkpoint.config.num_experts):
                for m, stored in matrices.items():
                    codewords = stored["codewords"][begin[m][e] : begin[m][e + 1]]
                    writer.add(f"{prefixes[m][e]}.w_comp", codewords.view(np.int16))
                    writer.add(f"{prefixes[m][e]}.row_off", stored["row_offsets"][e])
                    writer.add(f"{prefixes[m][e]}.ter_minmax", stored["levels"][e].reshape(-1))
                    writer.add(f"{prefixes[m][e]}.weight", np.zeros(0, BFLOAT16))

    def finish(self) -> list[pathlib.Path]:
        with TorchWriter(self.output / SIZES) as writer:
            for file in self.layers_of:
                for name, tensor in TorchFile(self.output / file).tensors().items():
                    if name.endswith(".w_comp"):
                        writer.add_integer(name.removesuffix(".w_comp"), tensor.shape[0])
        write_json(self.output / CONFIG, self.config)
        return [self.output / SIZES, self.output / CONFIG]


LAYOUT = Layout("ista", is_ista, IstaCheckpoint, ("config.json", "noexp.pt", "exp*.pt", "sizes.pt"), IstaWriter)
