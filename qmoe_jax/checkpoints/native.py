"""A native T5X checkpoint as a `Checkpoint`: architecture inferred, experts read along their chunks."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from qmoe_jax.checkpoints import reading
from qmoe_jax.checkpoints.base import Checkpoint, check_group_size
from qmoe_jax.checkpoints.reading import Reading, Source
from qmoe_jax.checkpoints.t5x import open_t5x
from qmoe_jax.models.switch.parameters import infer_config


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
        if group_size is None:
            yield 0, self.config.num_experts, {m: self.read(s.name) for m, s in self.sources(layer).items()}
            return
        with contextlib.closing(self.stream([layer], group_size)) as groups:
            for _, start, stop, kernels in groups:
                yield start, stop, kernels

    def stream(
        self, layers: Sequence[str], group_size: int, how: Reading = reading.DEFAULT, experts: range | None = None
    ) -> Generator[tuple[str, int, int, dict[str, Any]]]:
        check_group_size(group_size)
        opened = [(layer, functools.partial(self.sources, layer)) for layer in layers]
        return reading.stream(opened, group_size, how, experts or range(self.config.num_experts))

    def sources(self, layer: str) -> dict[str, Source]:
        """The matrices of a sparse layer as they are stored, by name."""
        return {m: self._t5x.experts(self.family.expert_parameter(layer, m)) for m in self.config.expert.matrices}

    def grids(self, layer: str) -> dict[str, reading.Grid]:
        return {m: source.grid for m, source in self.sources(layer).items()}
