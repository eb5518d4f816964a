"""A T5X checkpoint as a `Checkpoint`: the architecture is inferred, experts are read along their chunks."""

from __future__ import annotations

import os
from typing import Any

from qmoe_jax.checkpoints.checkpoint import StoredCheckpoint
from qmoe_jax.checkpoints.layout import Layout
from qmoe_jax.checkpoints.t5x.store import is_t5x, open_t5x
from qmoe_jax.checkpoints.t5x.target import T5XWriter
from qmoe_jax.checkpoints.t5x.writing import t5x_chunks
from qmoe_jax.errors import CheckpointError
from qmoe_jax.models.families import family_of_parameters


class NativeCheckpoint(StoredCheckpoint):
    """See `StoredCheckpoint`.

    Args:
      path: step directory, its parent (newest complete step), or a single msgpack file; local or gs://.
      **overrides: fields of the config that a parameter tree doesn't tell, such as top_k.

    Raises:
      CheckpointError: nothing readable there, or no model of a family that T5X trains.
    """

    def __init__(self, path: str | os.PathLike, **overrides: Any):
        store = open_t5x(path)
        try:
            family = family_of_parameters({name: spec.shape for name, spec in store.specs.items()}, "t5x")
        except ValueError as e:  # A CheckpointError, or a config's own.
            raise CheckpointError(f"{store.path}: {e}") from e
        super().__init__(store, "t5x", family, overrides)
        self.provenance["step"] = store.step


LAYOUT = Layout(
    "t5x",
    is_t5x,
    NativeCheckpoint,
    ("checkpoint", "target.*", "state.*", "state", "train_ds*", "checkpoint_*", "[0-9]*"),
    T5XWriter,
    t5x_chunks,
)
