"""Directories in Hugging Face's layout, opened and read whole; and parameters in memory as a checkpoint."""

import json
import pathlib

import jax
import numpy as np
from flax import traverse_util

import qmoe_jax
from qmoe_jax.checkpoints.checkpoint import Checkpoint


def described(directory):
    return json.loads((pathlib.Path(directory) / "config.json").read_text())


def load(directory, **overrides):
    """Family, config and parameters of a directory."""
    checkpoint = qmoe_jax.open_checkpoint(directory, **overrides)
    return checkpoint.family, checkpoint.config, checkpoint.load()


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
