"""Checkpoints of every layout, opened by one function.

A layout is one file with a subclass of `Checkpoint`, and one line in `LAYOUTS`; if it can be written, one in `TARGETS`.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

from qmoe_jax.checkpoints import compressed_target, huggingface, ista, t5x_target
from qmoe_jax.checkpoints.base import Checkpoint
from qmoe_jax.checkpoints.compressed import CompressedCheckpoint, CompressedWriter, is_compressed
from qmoe_jax.checkpoints.conversion import Options, Plan
from qmoe_jax.checkpoints.huggingface import HuggingFaceCheckpoint, is_huggingface
from qmoe_jax.checkpoints.ista import IstaCheckpoint, is_ista
from qmoe_jax.checkpoints.native import NativeCheckpoint
from qmoe_jax.checkpoints.t5x import is_t5x, open_t5x, t5x_chunks, write_t5x
from qmoe_jax.errors import CheckpointError
from qmoe_jax.models.families import check_preset
from qmoe_jax.models.switch.parameters import infer_config, param_shapes

# Name, whether a path has it, and how it is opened; the first that fits is taken.
LAYOUTS: list[tuple[str, Callable[..., bool], Callable[..., Checkpoint]]] = [
    ("compressed", is_compressed, CompressedCheckpoint),
    ("huggingface", is_huggingface, HuggingFaceCheckpoint),
    ("ista", is_ista, IstaCheckpoint),
    ("t5x", is_t5x, NativeCheckpoint),
]


# Name, and how another layout's checkpoint is written as this one; see `conversion`.
TARGETS: dict[str, Callable[[Checkpoint, pathlib.Path, Options], Plan]] = {
    "t5x": t5x_target.plan,
    "huggingface": huggingface.plan,
    "compressed": compressed_target.plan,
    "ista": ista.plan,
}


def published_chunks(layout: str) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """How a layout cuts a matrix of all experts [experts, in, out] into what is read at once."""
    return t5x_chunks if layout == "t5x" else lambda shape: (1, *shape[1:])


def open_checkpoint(path: str | os.PathLike, **overrides: Any) -> Checkpoint:
    """Opens a checkpoint of any layout; only its index is read.

    Args:
      path: a compressed checkpoint; a directory of Hugging Face's SwitchTransformers, or of a
        published QMoE model; or a T5X checkpoint (step
        directory, its parent, or a single file; gs:// too).
      **overrides: fields of `ModelConfig` that the checkpoint can't tell, such as top_k=2.

    Raises:
      CheckpointError: there is none, or it is broken; says what was found.
    """
    for _, fits, open_layout in LAYOUTS:
        if fits(path):
            return open_layout(path, **overrides)
    return NativeCheckpoint(path, **overrides)  # Says best what is wrong with the path.


__all__ = [
    "TARGETS",
    "Checkpoint",
    "CheckpointError",
    "CompressedCheckpoint",
    "CompressedWriter",
    "HuggingFaceCheckpoint",
    "IstaCheckpoint",
    "NativeCheckpoint",
    "check_preset",
    "infer_config",
    "open_checkpoint",
    "open_t5x",
    "param_shapes",
    "published_chunks",
    "write_t5x",
]
