"""How a streamed pass uses memory and devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
from jax.sharding import Mesh

from qmoe_jax.checkpoints.reading import Reading


class Settings(NamedTuple):
    """How a streamed pass uses memory and devices.

    Attributes:
      dtype: of activations, float32 or bfloat16.
      round_weights: round weights to bfloat16 first, as a compressed checkpoint stores those it doesn't quantize.
      tokens_per_batch: most tokens, padding included, that go through a layer's attention at once.
      tokens_per_expert_call: most tokens that go through a group of experts at once.
      experts_per_group: experts that are quantized together, or computed.
      mesh: over whose devices a batch and a group of experts are, as far as they divide them; None: one device.
      weights_bytes: most memory for experts that are read; None: half of the host's.
      scratch: folder for what of them doesn't fit; None: the system's for temporary files.
      activations: folder for the list buffers; None: they are in memory.
      commit_share: a compression commits a layer where that takes at most this share of the time since the last commit;
        1: each layer.
    """

    dtype: Any = jnp.float32
    round_weights: bool = False
    tokens_per_batch: int = 8_192
    tokens_per_expert_call: int = 16_384
    experts_per_group: int = 16
    mesh: Mesh | None = None
    weights_bytes: int | None = None
    scratch: str | None = None
    activations: str | None = None
    commit_share: float = 0.03

    @property
    def reading(self) -> Reading:
        return Reading(ml_dtypes.bfloat16 if self.round_weights else None, self.weights_bytes, self.scratch)

    def check(self) -> None:
        """Raises ValueError for sizes below one."""
        for name in ("tokens_per_batch", "tokens_per_expert_call", "experts_per_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1.")
