"""What a layer keeps of the tokens before: its attention's memory, in as many slots as a text, or its window, needs.

Rows have texts of different lengths, so each slot knows the position of its token. The token at position p is in slot
p modulo the slots: in a sliding window it takes the place of the one that no one sees any more.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Memory = tuple[jax.Array, ...]


class LayerCache(NamedTuple):
    """Of one layer.

    Attributes:
      memory: arrays [batch, slots, ...].
      positions: int32 [batch, slots], of the tokens in the slots; -1: it is empty.
    """

    memory: Memory
    positions: jax.Array

    @classmethod
    def of(cls, memory: Memory, lengths: jax.Array, slots: int) -> LayerCache:
        """The cache after prompts.

        Args:
          memory: arrays [batch, length, ...] of the prompts' tokens, padding after them.
          lengths: int32 [batch], how many are real.
          slots: of these the last so many are kept.
        """
        batch, length = memory[0].shape[:2]
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        kept = (positions < lengths[:, None]) & (positions >= lengths[:, None] - slots)
        empty = cls(
            tuple(jnp.zeros((batch, slots, *m.shape[2:]), m.dtype) for m in memory),
            jnp.full((batch, slots), -1, jnp.int32),
        )
        return empty.put(memory, positions, kept)

    def put(self, memory: Memory, positions: jax.Array, kept: jax.Array | None = None) -> LayerCache:
        """With the tokens of `memory`, arrays [batch, n, ...], at positions [batch, n]; of these those `kept`."""
        batch, slots = self.positions.shape
        slot = positions % slots
        if kept is not None:
            slot = jnp.where(kept, slot, slots)  # One past the last: nowhere.
        rows = jnp.arange(batch)[:, None]
        return LayerCache(
            tuple(old.at[rows, slot].set(new, mode="drop") for old, new in zip(self.memory, memory, strict=True)),
            self.positions.at[rows, slot].set(positions, mode="drop"),
        )
