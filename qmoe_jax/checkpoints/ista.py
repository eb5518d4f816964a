"""The published QMoE models' layout: compressed experts in the paper's code, in files of torch.save.

    config.json   Hugging Face's, of the model before its compression
    noexp.pt      everything but experts, by Hugging Face's names
    exp00.pt ...  a sparse layer each, encoder first: w_comp, row_off, ter_minmax of each matrix, and an empty weight
    sizes.pt      number of codewords of every matrix

Everything is bfloat16; what of noexp.pt is stored as float32 is rounded when it is read, as the reference does. Which
layers are sparse is read off the names: the fully sparse model's config.json says otherwise by Hugging Face's rule.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from qmoe_jax.checkpoints.base import Checkpoint, StoredMatrix
from qmoe_jax.checkpoints.compressed_target import in_codec, lost_by_rounding, refuse_dense
from qmoe_jax.checkpoints.conversion import BFLOAT16, Options, Part, Plan
from qmoe_jax.checkpoints.huggingface import (
    CONFIG,
    EMBEDDINGS,
    check_described,
    check_model_type,
    expert_groups,
    hugging_face_config,
    read_json,
    t5x_parameters,
)
from qmoe_jax.checkpoints.torch_files import TorchFile, TorchWriter
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.files import write_json
from qmoe_jax.models.switch.config import ModelConfig
from qmoe_jax.models.switch.names import to_pytorch
from qmoe_jax.models.switch.parameters import infer_config, param_shapes

DENSE, SIZES = "noexp.pt", "sizes.pt"
CODEC = "dictionary"
ROUTER = "/mlp/router/router_weights/w/kernel"
# What the reference's GPU kernels were compiled for: d_model, d_ff.
KERNEL_SHAPES = ((768, 3072), (1024, 4096), (2080, 6144))


def is_ista(path: str | os.PathLike) -> bool:
    """Whether `path` is a directory with the published models' files in it."""
    path = pathlib.Path(path)
    return (path / CONFIG).is_file() and (path / DENSE).is_file()


def _file(layer: int) -> str:
    return f"exp{layer:02d}.pt"


def _prefixes(layer: str, matrix: str, num_experts: int) -> list[str]:
    """What the names of each expert's arrays begin with."""
    names = to_pytorch(f"{layer}/mlp/expert/{matrix}/kernel", num_experts).names
    return [name.removesuffix(".weight") for name in names]


class IstaCheckpoint(Checkpoint):
    """See `Checkpoint`. Experts' kernels are `CompressedExperts`; all else is bfloat16.

    When it is opened, the index of noexp.pt is read, and that all files are there is checked.

    Args:
      path: the directory.
      **overrides: fields of `ModelConfig` to change.

    Raises:
      CheckpointError: a file is missing or damaged, or asks for code to be run; tensors are missing, foreign, of wrong
        shape, or don't fit config.json.
    """

    codec = CODEC

    def __init__(self, path: str | os.PathLike, **overrides: Any):
        path = pathlib.Path(path)
        self.path = str(path)
        described = check_model_type(path / CONFIG, read_json(path / CONFIG))
        self._dense = TorchFile(path / DENSE)
        self._values = self._dense.tensors()
        tied = described.get("tie_word_embeddings", True)
        self._tensors, shapes = t5x_parameters(path, {n: t.shape for n, t in self._values.items()}, tied)
        self.specs = {name: jax.ShapeDtypeStruct(shape, BFLOAT16) for name, shape in shapes.items()}
        # No file tells the experts' shapes: a row's width isn't stored.
        d_ff: Any = described.get("d_ff")
        routers = {n.removesuffix(ROUTER): shape for n, shape in shapes.items() if n.endswith(ROUTER)}
        for layer, (d_model, experts) in routers.items():
            shapes[f"{layer}/mlp/expert/wi/kernel"] = (experts, d_model, d_ff)
            shapes[f"{layer}/mlp/expert/wo/kernel"] = (experts, d_ff, d_model)
        self.config = infer_config(shapes, **overrides)
        check_described(path / CONFIG, described, self.config)
        missing = [_file(i) for i, _ in enumerate(self.config.sparse_layers) if not (path / _file(i)).is_file()]
        if missing:
            raise CheckpointError(listed(f"{path}: files of sparse layers are missing:", missing))
        self.provenance = {"checkpoint": self.path, "layout": "ista", "step": None}

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        if name not in self.specs:
            raise CheckpointError(f"{self.path}: there is no parameter {name!r} outside the compressed experts.")
        tensors = self._tensors[name]
        value = self._dense.read(self._values[tensors.names[0]]).astype(BFLOAT16)
        return (value.T if tensors.transposed else value)[index]

    def experts(self, layer: str, group_size: int | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
        file = self._expert_file(layer)
        for start, stop in expert_groups(self.config.num_experts, group_size):
            yield start, stop, {m: self._matrix(file, layer, m, start, stop) for m in self.config.expert_matrices}

    def _matrix(self, file: TorchFile, layer: str, matrix: str, start: int, stop: int) -> CompressedExperts:
        _, out, width = self._shape(matrix)
        arrays: dict[str, list[np.ndarray]] = {"w_comp": [], "row_off": [], "ter_minmax": []}
        for prefix in _prefixes(layer, matrix, self.config.num_experts)[start:stop]:
            for name, values in arrays.items():
                if (key := f"{prefix}.{name}") not in file.content:
                    raise CheckpointError(f"{file.path}: {key} is missing; copy it again.")
                values.append(file.read(file.content[key]))
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
            where = f"{layer}/mlp/expert/{matrix}, experts {start} to {stop - 1}"
            raise CheckpointError(f"{file.path}: {where}, counted from {start}: {e}") from e

    def _expert_file(self, layer: str) -> TorchFile:
        """The file of a layer: the one that is expected, or another that has its names."""
        layers = self.config.sparse_layers
        first = _prefixes(layer, "wi", self.config.num_experts)[0] + ".w_comp"
        for i in sorted(range(len(layers)), key=lambda i: layers[i] != layer):
            file = TorchFile(pathlib.Path(self.path) / _file(i))
            if first in file.tensors():
                return file
        raise CheckpointError(f"{self.path}: no file has the experts of {layer} ({first}); copy the checkpoint again.")

    def _shape(self, matrix: str) -> tuple[int, int, int]:
        """Experts, out, in."""
        d, f = self.config.d_model, self.config.d_ff
        return (self.config.num_experts, d, f) if matrix == "wo" else (self.config.num_experts, f, d)

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """Codewords of each matrix; empty if there is no sizes.pt, which only the reference needs."""
        file = pathlib.Path(self.path) / SIZES
        return TorchFile(file).content if file.is_file() else {}

    @functools.cached_property
    def expert_sizes(self) -> Mapping[str, Mapping[str, StoredMatrix]]:
        sizes = self._sizes or {
            name.removesuffix(".w_comp"): math.prod(tensor.shape)
            for layer in self.config.sparse_layers
            for name, tensor in self._expert_file(layer).tensors().items()
            if name.endswith(".w_comp")
        }

        def stored(layer, matrix):
            experts, out, width = self._shape(matrix)
            codewords = sum(sizes.get(prefix, 0) for prefix in _prefixes(layer, matrix, experts))
            return StoredMatrix((experts, out, width), 2 * codewords + experts * (4 * (out + 1) + 2 * 2 * out))

        return {
            layer: {m: stored(layer, m) for m in self.config.expert_matrices} for layer in self.config.sparse_layers
        }


# --- Writing ---------------------------------------------------------------------------------------------------------


def ista_config(config: ModelConfig) -> dict[str, Any]:
    """config.json as the reference's loader takes it, under transformers 4.28.

    Raises CheckpointError, listing all reasons, for a model that it can't compute.
    """
    fields = hugging_face_config(config, "bfloat16")
    full = [
        getattr(config, f"{stack}_sparse_layers") == tuple(range(getattr(config, f"num_{stack}_layers")))
        for stack in ("encoder", "decoder")
    ]
    problems = []
    if any(full) and not all(full):
        problems.append(
            "every layer of one stack is sparse, but not of the other; the loader knows all or i % step == 1"
        )
    if config.relpos_per_layer:
        problems.append("every layer has its own position bias; the loader's model has one per stack")
    if problems:
        raise CheckpointError(listed("The published QMoE models' layout can't hold this model:", problems))
    fields |= {"expert_capacity": 1024, "router_jitter_noise": 0, "use_cache": False, "transformers_version": "4.28.0"}
    return fields | ({"is_full_sparse": True} if all(full) else {})


def plan(checkpoint: Checkpoint, output: pathlib.Path, options: Options) -> Plan:
    """How a compressed `checkpoint` becomes what the reference's loader reads; see `conversion`.

    The loader reads every file beside these but README.md: the report goes there.
    """
    refuse_dense(checkpoint, "ista")
    config = ista_config(checkpoint.config)
    layers, num_experts = checkpoint.config.sparse_layers, checkpoint.config.num_experts
    in_codec(checkpoint, layers[0], CODEC)  # Levels that it can't hold are refused before anything is written.

    def write_dense():
        with TorchWriter(output / DENSE, ordered=True) as writer:
            for name in param_shapes(checkpoint.config):
                if checkpoint.is_expert(name):
                    continue
                tensors = to_pytorch(name, num_experts)
                value = checkpoint.read(name).astype(BFLOAT16)
                writer.add(tensors.names[0], value.T if tensors.transposed else value)
                if name == "token_embedder/embedding":
                    # Tied models have the head too.
                    for other in (*EMBEDDINGS, *(["lm_head.weight"] if checkpoint.config.tied else [])):
                        writer.alias(other, tensors.names[0])
        return [output / DENSE]

    def write_layer(i):
        matrices = {m: e.stored() for m, e in in_codec(checkpoint, layers[i], CODEC).items()}
        prefixes = {m: _prefixes(layers[i], m, num_experts) for m in matrices}
        begin = {
            m: np.append(0, np.cumsum(stored["row_offsets"][:, -1], dtype=np.int64)) for m, stored in matrices.items()
        }
        with TorchWriter(output / _file(i)) as writer:
            for e in range(num_experts):
                for m, stored in matrices.items():
                    codewords = stored["codewords"][begin[m][e] : begin[m][e + 1]]
                    writer.add(f"{prefixes[m][e]}.w_comp", codewords.view(np.int16))
                    writer.add(f"{prefixes[m][e]}.row_off", stored["row_offsets"][e])
                    writer.add(f"{prefixes[m][e]}.ter_minmax", stored["levels"][e].reshape(-1))
                    writer.add(f"{prefixes[m][e]}.weight", np.zeros(0, BFLOAT16))
        return [output / _file(i)]

    def finish():
        with TorchWriter(output / SIZES) as writer:
            for i in range(len(layers)):
                for name, tensor in TorchFile(output / _file(i)).tensors().items():
                    if name.endswith(".w_comp"):
                        writer.add_integer(name.removesuffix(".w_comp"), tensor.shape[0])
        write_json(output / CONFIG, config)
        return [output / SIZES, output / CONFIG]

    dense_bytes = sum(2 * math.prod(spec.shape) for spec in checkpoint.specs.values())
    parts = [Part(DENSE, dense_bytes, write_dense)]
    for i, layer in enumerate(layers):
        size = sum(m.nbytes for m in checkpoint.expert_sizes[layer].values())
        parts.append(Part(_file(i), size if checkpoint.codec == CODEC else None, functools.partial(write_layer, i)))
    lost = [*lost_by_rounding(checkpoint), "how the experts were quantized, and where the model came from"]
    if (checkpoint.config.d_model, checkpoint.config.d_ff) not in KERNEL_SHAPES:
        known = ", ".join(f"{d} x {f}" for d, f in KERNEL_SHAPES)
        lost.append(f"use on a GPU: the reference's kernels know d_model x d_ff of {known}, and give zeros for others")
    return Plan(parts, finish, lost, closed=True)
