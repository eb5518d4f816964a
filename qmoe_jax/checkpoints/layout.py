"""What there is to know of a layout of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from qmoe_jax.checkpoints.checkpoint import Checkpoint
from qmoe_jax.checkpoints.conversion import Writer
from qmoe_jax.models.names import Shape


class Layout(NamedTuple):
    """A layout of checkpoints; listed in `LAYOUTS`.

    Attributes:
      name: such as 't5x'.
      fits: fits(path), whether a path has it.
      open: open(path, **overrides); with `preset`, the name of a published architecture, where `takes_preset`.
      files: globs of what belongs to it in its folder.
      writer: writes another layout's checkpoint as this one; None: nothing does.
      chunks: chunks(shape), how a matrix of all experts [experts, in, out] is cut into what is read at once.
      takes_preset: its files may not tell the architecture.
    """

    name: str
    fits: Callable[[str | os.PathLike], bool]
    open: Callable[..., Checkpoint]
    files: tuple[str, ...]
    writer: type[Writer] | None = None
    chunks: Callable[[Shape], Shape] = lambda shape: (1, *shape[1:])
    takes_preset: bool = False
