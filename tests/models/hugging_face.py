"""Directories in Hugging Face's layout, read whole by the families' tables of names; and parameters as a checkpoint."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from qmoe_jax.checkpoints.base import Checkpoint
from qmoe_jax.checkpoints.quantized_formats import dequantize_float8, dequantize_mxfp4
from qmoe_jax.models.families import FAMILIES

DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "U8": np.uint8,
    "I64": np.int64,
}


def read_file(file):
    """A safetensors file: the header's length, the header, the bytes of each tensor."""
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[begin:][slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def read_tensors(directory):
    """All tensors of all files of a directory, by name; float8 with its scales is dequantized."""
    tensors = {}
    for file in sorted(pathlib.Path(directory).glob("*.safetensors")):
        tensors |= read_file(file)
    for scales in [n for n in tensors if n.endswith("_scale_inv")]:
        name = scales.removesuffix("_scale_inv")
        tensors[name] = dequantize_float8(tensors[name], tensors.pop(scales))
    return tensors


def described(directory):
    return json.loads((pathlib.Path(directory) / "config.json").read_text())


def family_of_directory(directory):
    kind = described(directory)["model_type"]
    return next(f for f in FAMILIES.values() if kind in getattr(f, "model_types", ()))


def parameters_of(family, config, tensors):
    """The parameters that tensors make, nested, and the names of tensors that none is made of."""
    flat, used = {}, set()
    for name in family.param_shapes(config):
        stored = next(way for way in family.ways_stored(config, name) if way.names[0] in tensors)
        beside = [tensors[n] for n in stored.beside]
        arrays = [tensors[n] for n in stored.names]
        if stored.packed:
            arrays = [dequantize_mxfp4(*arrays, *beside)]
        array = np.stack(arrays) if stored.stacked else arrays[0]
        array = array.swapaxes(-1, -2) if stored.transposed else array
        if stored.part is not None:
            array = array[..., stored.part.of_outputs(array.shape[-1])]
        flat[name] = np.ascontiguousarray(array)
        used.update(stored.names, stored.beside)
    return traverse_util.unflatten_dict(flat, sep="/"), sorted(set(tensors) - used)


def load(directory, **overrides):
    """Family, config and parameters of a directory, whose tensors are all accounted for."""
    family = family_of_directory(directory)
    config = family.from_described(described(directory), **overrides)
    params, rest = parameters_of(family, config, read_tensors(directory))
    assert [n for n in rest if not family.why_left_out(config, n)] == []
    shapes = {n: p.shape for n, p in traverse_util.flatten_dict(params, sep="/").items()}
    assert family.infer(shapes, described(directory), **overrides) == config
    return family, config, params


class InMemory(Checkpoint):
    """Parameters in memory, read as those of a file are."""

    def __init__(self, config, params):
        self.path, self.config, self.provenance = "memory", config, {}
        self._flat = {n: np.asarray(p) for n, p in traverse_util.flatten_dict(params, sep="/").items()}
        self.specs = {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in self._flat.items()}

    def read(self, name, index=()):
        return self._flat[name][index]

    def experts(self, layer, group_size=None):
        for start in range(0, self.config.num_experts, group_size or self.config.num_experts):
            stop = min(start + (group_size or self.config.num_experts), self.config.num_experts)
            names = {m: self.family.expert_parameter(layer, m) for m in self.config.expert.matrices}
            yield start, stop, {m: self.read(n, (slice(start, stop),)) for m, n in names.items()}
