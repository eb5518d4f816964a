"""A native T5X checkpoint as a `Checkpoint`: architecture inferred, experts read as a slice of one array."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from qmoe_jax.checkpoints.architecture import infer_config
from qmoe_jax.checkpoints.base import Checkpoint
from qmoe_jax.checkpoints.t5x import open_t5x


class NativeCheckpoint(Checkpoint):
    """See `Checkpoint`; experts' kernels are arrays [experts, in, out].

    Args:
      path: step directory, its parent (newest complete step), or a single msgpack file; local or gs://.
      **overrides: fields of `ModelConfig` that a parameter tree doesn't tell, such as top_k.

    Raises:
      CheckpointError: nothing readable there, or not a Switch Transformer.
    """

    def __init__(self, path: str | os.PathLike, **overrides: Any):
        self._t5x = open_t5x(path)
        self.path = self._t5x.path
        self.specs = self._t5x.specs
        self.config = infer_config({name: spec.shape for name, spec in self.specs.items()}, **overrides)
        self.provenance = {"checkpoint": self.path, "layout": "t5x", "step": self._t5x.step}

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        return self._t5x.read(name, index)

    def experts(self, layer: str, group_size: int | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
        size = self.config.num_experts if group_size is None else group_size
        if size < 1:
            raise ValueError(f"group_size: found {size}, expected at least 1 expert.")
        for start in range(0, self.config.num_experts, size):
            stop = min(start + size, self.config.num_experts)
            names = {m: f"{layer}/mlp/expert/{m}/kernel" for m in self.config.expert_matrices}
            yield start, stop, {m: self.read(name, (slice(start, stop),)) for m, name in names.items()}
