"""Checkpoints of every layout, opened by one function.

A layout is one file (or folder) with a `Layout`, and one line in `LAYOUTS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from qmoe_jax.checkpoints import compressed, huggingface, ista, maxtext, t5x
from qmoe_jax.checkpoints.checkpoint import Checkpoint
from qmoe_jax.checkpoints.compressed import CompressedCheckpoint, CompressedWriter
from qmoe_jax.checkpoints.conversion import Writer
from qmoe_jax.checkpoints.huggingface import HuggingFaceCheckpoint
from qmoe_jax.checkpoints.ista import IstaCheckpoint
from qmoe_jax.checkpoints.layout import Layout
from qmoe_jax.checkpoints.maxtext import MaxTextCheckpoint
from qmoe_jax.checkpoints.t5x import NativeCheckpoint, open_t5x, write_t5x
from qmoe_jax.errors import CheckpointError
from qmoe_jax.models.families import check_preset, infer_config, param_shapes

# The first that fits a path is taken.
LAYOUTS: list[Layout] = [compressed.LAYOUT, huggingface.LAYOUT, ista.LAYOUT, t5x.LAYOUT, maxtext.LAYOUT]

# How another layout's checkpoint is written as one of these; see `conversion.Writer`.
TARGETS: dict[str, type[Writer]] = {layout.name: layout.writer for layout in LAYOUTS if layout.writer}


def published_chunks(layout: str) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """How a layout cuts a matrix of all experts [experts, in, out] into what is read at once."""
    return next(known.chunks for known in LAYOUTS if known.name == layout)


def open_checkpoint(path: str | os.PathLike, *, preset: str | None = None, **overrides: Any) -> Checkpoint:
    """Opens a checkpoint of any layout; only its index is read.

    Args:
      path: a compressed checkpoint; a directory of Hugging Face's (gs:// too), or of a published QMoE model; or a
        checkpoint of MaxText or T5X (step directory, its parent, or T5X's single file; gs:// too).
      preset: name of the published architecture, for layouts that may not tell it: MaxText's without config.json.
      **overrides: fields of the config that the checkpoint can't tell, such as top_k=2.

    Raises:
      CheckpointError: there is none, or it is broken; says what was found.
      TypeError: `path` is no path.
    """
    if not isinstance(path, str) and not isinstance(path, os.PathLike):
        raise TypeError(f"path: found {path!r}, expected the path of a checkpoint.")
    for layout in LAYOUTS:
        if layout.fits(path):
            given = {"preset": preset} if layout.takes_preset else {}
            return layout.open(path, **given, **overrides)
    if huggingface.has_tensors(path):
        raise CheckpointError(
            f"{os.fspath(path)}: config.json is missing, which tells the architecture: copy it from where the tensors "
            "come from."
        )
    return NativeCheckpoint(path, **overrides)  # Says best what is wrong with the path.


__all__ = [
    "LAYOUTS",
    "TARGETS",
    "Checkpoint",
    "CheckpointError",
    "CompressedCheckpoint",
    "CompressedWriter",
    "HuggingFaceCheckpoint",
    "IstaCheckpoint",
    "MaxTextCheckpoint",
    "NativeCheckpoint",
    "check_preset",
    "infer_config",
    "open_checkpoint",
    "open_t5x",
    "param_shapes",
    "published_chunks",
    "write_t5x",
]
