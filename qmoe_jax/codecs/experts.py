"""Ternary experts as the bytes they are stored in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax import codecs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CompressedExperts:
    """One matrix [out, in] of all experts of a layer: a pytree of its compressed bytes.

    Rows are outputs (T5X stores the transpose, [in, out]). An element is 0, its row's minimum or its row's
    maximum.

    Attributes:
      data: what the codec stores (see `qmoe_jax.codecs`); without padding.
      levels: bfloat16 [experts, out, 2], minimum and maximum of each row.
      codec: name of the codec.
      shape: (experts, out, in).
      bound: the codec's `static_bound` of `data`.
    """

    data: dict[str, jax.Array]
    levels: jax.Array
    codec: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})
    bound: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_trits(cls, trits, levels, codec: str = "dictionary") -> CompressedExperts:
        """Compresses a matrix of all experts. Not for use inside `jit`, as sizes depend on the values.

        Args:
          trits: uint8 [experts, out, in]; 0 is zero, 1 the row's minimum, 2 its maximum.
          levels: float [experts, out, 2], minimum and maximum of each row; rounded to bfloat16.
          codec: name of the codec.

        Raises:
          ValueError: an unknown codec, other shapes or dtypes, trits above 2, or levels as in `validate`.
        """
        return cls.from_data(codecs.get(codec).encode_experts(trits), levels, codec, trits.shape)

    @classmethod
    def from_data(cls, data: Mapping[str, np.ndarray], levels, codec: str, shape: Sequence[int]) -> CompressedExperts:
        """Puts stored arrays together, for matrices of `shape` (experts, out, in).

        Raises ValueError for an unknown codec and for malformed arrays, as `validate`.
        """
        shape = tuple(map(int, shape))
        levels = jnp.asarray(levels, jnp.bfloat16)
        _check(data, levels, codec, shape)
        bound = codecs.get(codec).static_bound(data)
        return cls({name: jnp.asarray(array) for name, array in data.items()}, levels, codec, shape, bound)

    def expert(self, index) -> jax.Array:
        """One expert's weights, float32 [out, in]; the index may be traced."""
        return _expert(self, index)

    def trits(self) -> jax.Array:
        """uint8 [experts, out, in]."""
        return _trits(self)

    def to_dense(self) -> jax.Array:
        """All weights, float32 [experts, out, in]. Works inside `jit` and outside."""
        return _to_dense(self)

    @property
    def nbytes(self) -> int:
        """All bytes stored, metadata and levels included."""
        return sum(a.size * a.dtype.itemsize for a in (*self.data.values(), self.levels))

    def validate(self) -> None:
        """Raises ValueError, naming expert and row, unless all streams are well formed.

        Every row has to decode to exactly `in` trits, and levels have to be finite, minimum at most maximum.
        Decoding relies on that. The constructors check it; call it for arrays that came another way.
        """
        _check(self.data, self.levels, self.codec, self.shape)


def concatenate(parts: Sequence[CompressedExperts]) -> CompressedExperts:
    """Joins groups of experts of one layer, in order. Raises ValueError where codec, out or in differ."""
    if not parts:
        raise ValueError("No experts to concatenate.")
    kinds = {(part.codec, *part.shape[1:]) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"Experts differ in (codec, out, in): {sorted(kinds)}.")
    return CompressedExperts(
        data={name: jnp.concatenate([part.data[name] for part in parts]) for name in parts[0].data},
        levels=jnp.concatenate([part.levels for part in parts]),
        codec=parts[0].codec,
        shape=(sum(part.shape[0] for part in parts), *parts[0].shape[1:]),
        bound=max(part.bound for part in parts),
    )


def _check(data, levels, codec, shape) -> None:
    codecs.get(codec).check({name: np.asarray(array) for name, array in data.items()}, shape)
    levels = np.asarray(levels).astype(np.float32)
    if levels.shape != (*shape[:2], 2):
        raise ValueError(f"levels: shape {list(levels.shape)}, expected {[*shape[:2], 2]} (experts, out, min and max).")
    # A row of one value throughout has it as both levels, so the minimum may be positive.
    for expert, row in np.argwhere(~(np.isfinite(levels).all(-1) & (levels[..., 0] <= levels[..., 1]))):
        low, high = levels[expert, row]
        raise ValueError(f"levels: expert {expert}, row {row} has ({low}, {high}), expected finite min <= max.")


def _decode(experts, index):
    return codecs.get(experts.codec).decode_expert(experts.data, experts.shape, experts.bound, index)


@jax.jit
def _expert(experts, index):
    trits = _decode(experts, index)
    low, high = jnp.split(experts.levels[index].astype(jnp.float32), 2, axis=-1)  # [out, 1]
    return jnp.where(trits == 0, 0.0, jnp.where(trits == 1, low, high))


@jax.jit
def _trits(experts):
    return jax.lax.map(lambda e: _decode(experts, e), jnp.arange(experts.shape[0]))


@jax.jit
def _to_dense(experts):
    return jax.lax.map(lambda e: _expert(experts, e), jnp.arange(experts.shape[0]))
