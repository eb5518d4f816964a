"""A model in memory as a checkpoint, and written as one in Hugging Face's layout."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from qmoe_jax.checkpoints.checkpoint import Checkpoint
from qmoe_jax.checkpoints.checks import check_tree
from qmoe_jax.checkpoints.conversion import Options
from qmoe_jax.checkpoints.huggingface import HuggingFaceWriter
from qmoe_jax.checkpoints.store import Index


class InMemoryCheckpoint(Checkpoint):
    """Parameters that are there already, experts' matrices as arrays [experts, in, out].

    Args:
      config: the architecture, of any family.
      params: nested or by '/'-joined name.

    Raises:
      CheckpointError: parameters are missing, foreign or of wrong shape; it lists all of them.
    """

    path = "<memory>"

    def __init__(self, config: Any, params: Mapping[str, Any]):
        self.config = config
        self._params = {n: np.asarray(p) for n, p in traverse_util.flatten_dict(dict(params), sep="/").items()}
        self._specs = {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in self._params.items()}
        self.provenance = {"checkpoint": self.path, "layout": None, "step": None}
        check_tree(self)

    @property
    def specs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return self._specs

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self._params[name][index]


def write_huggingface(
    directory: str | os.PathLike, config: Any, params: Mapping[str, Any], dtype: str | None = None
) -> None:
    """Writes config.json and safetensors, as transformers loads them; each file whole or not at all, config.json last.

    Args:
      directory: is made; files of the same names are replaced.
      config: the architecture, of a family that Hugging Face's layout holds.
      params: nested or by '/'-joined name.
      dtype: 'bfloat16' or 'float32'; None: as they are.

    Raises:
      CheckpointError: parameters don't fit the architecture, or the layout doesn't hold it.
      ValueError: another dtype.
    """
    output = pathlib.Path(directory)
    writer = HuggingFaceWriter(InMemoryCheckpoint(config, params), output, Options(dtype))
    output.mkdir(parents=True, exist_ok=True)
    with writer:
        for part in writer.parts:
            writer.write(part.name)
        writer.finish()
