"""Directories in Hugging Face's layout, opened and read whole; and parameters in memory as a checkpoint."""

import json
import pathlib

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import qmoe_jax
from qmoe_jax.checkpoints.checkpoint import Checkpoint


def described(directory):
    return json.loads((pathlib.Path(directory) / "config.json").read_text())


def load(directory, **overrides):
    """Family, config and parameters of a directory."""
    checkpoint = qmoe_jax.open_checkpoint(directory, **overrides)
    return checkpoint.family, checkpoint.config, checkpoint.load()


def with_multi_token_head(source, folder):
    """Writes a DeepSeek-V3 as it is published: with one more layer than the model has; the folder, and its number."""
    tensors, config = load_file(source / "model.safetensors"), described(source)
    layer = config["num_hidden_layers"]
    last = {n: t for n, t in tensors.items() if n.startswith(f"model.layers.{layer - 1}.")}
    head = {n.replace(f"layers.{layer - 1}.", f"layers.{layer}."): t for n, t in last.items()}
    head |= {f"model.layers.{layer}.{n}.weight": tensors["model.norm.weight"] for n in ("enorm", "hnorm")}
    folder.mkdir()
    save_file(tensors | head, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return folder, layer


class InMemory(Checkpoint):
    """Parameters in memory, read as those of a file are."""

    def __init__(self, config, params):
        self.path, self.config, self.provenance = "memory", config, {}
        self._flat = {n: np.asarray(p) for n, p in traverse_util.flatten_dict(params, sep="/").items()}

    @property
    def specs(self):
        return {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in self._flat.items()}

    def read(self, name, index=()):
        return self._flat[name][index]
