"""Quantized experts as the bytes they are kept in."""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qmoe_jax import codecs
from qmoe_jax.codecs import gap

MOST_LEVEL = 1e4  # of stored levels; no trained weight comes near


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CompressedExperts:
    """One matrix [out, in] of all experts of a layer: a pytree of its compressed bytes.

    Rows are outputs (T5X stores the transpose, [in, out]). An element is 0 or one of its row's L levels: minimum and
    maximum of a ternary row (L = 2), the three values beside zero of a 2-bit one (L = 3), or up to 14 (codec gap).

    Attributes:
      data: what the codec keeps in memory (see `qmoe_jax.codecs`); without padding.
      levels: bfloat16 [experts, out, L], rising.
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
    def from_symbols(
        cls, symbols: np.ndarray | jax.Array, levels: ArrayLike, codec: str = "gap", classes: int = 1
    ) -> CompressedExperts:
        """Compresses a matrix of all experts. Not for use inside `jit`, as sizes depend on the values.

        Args:
          symbols: uint8 [experts, out, in]; 0 is zero, k the row's level k - 1.
          levels: float [experts, out, L], L = 2, or 3 to 14 (codec gap), rising; rounded to bfloat16.
          codec: name of the codec.
          classes: (codec gap) of columns, equally many in each, neighbours together; each gets a code of its own.

        Raises:
          ValueError: an unknown codec, no experts, other shapes or dtypes, symbols above L, columns that can't be in so
            many classes, or levels as in `validate`.
          TypeError: symbols or levels are no arrays.
        """
        if not isinstance(symbols, np.ndarray | jax.Array):
            raise TypeError(f"symbols: found {type(symbols).__name__}, expected an array, uint8 [experts, out, in].")
        if symbols.ndim != 3 or symbols.shape[0] == 0:
            raise ValueError(
                f"symbols: shape {list(symbols.shape)}, expected [experts, out, in] with an expert at least."
            )
        levels = _real("levels", levels).astype(jnp.bfloat16)
        _check_levels(levels, symbols.shape)
        options = {"classes": classes} if codec == "gap" else {}
        if classes != 1 and not options:
            raise ValueError(f"classes: found {classes}, expected 1, as the codec {codec!r} has none.")
        data = codecs.get(codec).encode_experts(symbols, levels.shape[-1], **options)
        return _resident(data, levels, codec, symbols.shape)

    @classmethod
    def from_trits(
        cls, trits: np.ndarray | jax.Array, levels: ArrayLike, codec: str = "dictionary"
    ) -> CompressedExperts:
        """The old name of `from_symbols`, which goes in the next release."""
        warnings.warn("from_trits is now from_symbols; the old name goes in the next release.", DeprecationWarning, 2)
        return cls.from_symbols(trits, levels, codec)

    @classmethod
    def from_stored(cls, stored: Mapping[str, np.ndarray], codec: str, shape: Sequence[int]) -> CompressedExperts:
        """Puts stored arrays together, for matrices of `shape` (experts, out, in).

        Raises ValueError for an unknown codec, for malformed arrays, as `validate`, and for levels that no trained
        model has: above `MOST_LEVEL`, products overflow without a word.
        """
        if not isinstance(stored, Mapping):
            raise TypeError(f"stored: found {type(stored).__name__}, expected arrays by name.")
        shape = _sizes(shape)
        data, levels = codecs.get(codec).unpack(stored, shape)
        _check_levels(levels, shape)
        for expert, row in np.argwhere((np.abs(np.asarray(levels, np.float32)) > MOST_LEVEL).any(-1)):
            found = ", ".join(map(str, np.asarray(levels)[expert, row]))
            raise ValueError(f"levels: expert {expert}, row {row} has ({found}), expected at most {MOST_LEVEL:g}.")
        return _resident(data, jnp.asarray(levels), codec, shape)

    def with_levels(self, levels: jax.Array) -> CompressedExperts:
        """The same symbols with other levels [experts, out, L]; rounded to bfloat16. Works inside `jit`.

        They are what can be trained: `jax.grad` of lambda levels: loss(experts.with_levels(levels)), with levels in
        float32. They are not checked: `validate` does that.

        Raises ValueError for another shape.
        """
        if levels.shape != self.levels.shape:
            raise ValueError(f"levels: shape {list(levels.shape)}, expected {list(self.levels.shape)}.")
        return dataclasses.replace(self, levels=levels.astype(self.levels.dtype))

    def stored(self) -> dict[str, np.ndarray]:
        """What a checkpoint stores, levels included: the inverse of `from_stored`."""
        return codecs.get(self.codec).pack(self.data, self.levels, self.shape)

    def expert(self, index: ArrayLike) -> jax.Array:
        """One expert's weights, float32 [out, in].

        Args:
          index: from 0; negative ones count from the last. It may be traced, and is then clamped to the experts there
            are.

        Raises IndexError for another expert, TypeError for what is no whole number.
        """
        if not isinstance(index, jax.core.Tracer):
            index = _concrete(index, self.shape[0])
        return _expert(self, jnp.clip(jnp.asarray(index), 0, self.shape[0] - 1))

    def take(self, start: int, stop: int) -> CompressedExperts:
        """Experts start:stop alone. Not for use inside `jit`.

        Raises IndexError unless 0 <= start < stop <= experts, TypeError for what are no whole numbers.
        """
        start, stop = operator.index(start), operator.index(stop)
        if not 0 <= start < stop <= self.shape[0]:
            raise IndexError(f"experts {start}:{stop}: expected a range within the {self.shape[0]} experts there are.")
        data = codecs.get(self.codec).take(self.data, start, stop)
        return _resident(data, self.levels[start:stop], self.codec, (stop - start, *self.shape[1:]))

    def symbols(self) -> jax.Array:
        """uint8 [experts, out, in]."""
        return _symbols(self, jnp.arange(self.shape[0]))

    def to_dense(self) -> jax.Array:
        """All weights, float32 [experts, out, in]. Works inside `jit` and outside."""
        return _to_dense(self)

    @property
    def nbytes(self) -> int:
        """All bytes as stored, metadata and levels included."""
        return codecs.get(self.codec).stored_nbytes(self.data, self.levels, self.shape)

    @property
    def resident_nbytes(self) -> int:
        """All bytes in memory, levels included: at least `nbytes`, as decoding may want more offsets."""
        return sum(a.size * a.dtype.itemsize for a in (*self.data.values(), self.levels))

    def validate(self) -> None:
        """Raises ValueError, naming expert and row (or block), unless all streams are well formed.

        Every row has to decode to exactly `in` symbols, and levels have to be finite and to rise. Decoding relies on
        that. The constructors see to it; call this for arrays that came another way.
        """
        # What isn't stored follows from what is.
        rebuilt = CompressedExperts.from_stored(self.stored(), self.codec, self.shape)
        for name in self.data:
            found, expected = np.asarray(self.data[name]), np.asarray(rebuilt.data[name])
            if (found.dtype, found.shape) != (expected.dtype, expected.shape):
                raise ValueError(
                    f"{name}: {found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}."
                )
            for expert, row, *rest in np.argwhere(found != expected):
                where = (expert, row, *rest)
                raise ValueError(f"{name}: expert {expert}, row {row} has {found[where]}, expected {expected[where]}.")


def split(experts: CompressedExperts, parts: int) -> list[CompressedExperts]:
    """Consecutive groups of equally many experts: the inverse of `concatenate`. Not for use inside `jit`.

    Raises ValueError where `parts` doesn't divide the experts.
    """
    number, parts = _experts("experts", experts).shape[0], _whole("parts", parts)
    if parts < 1 or number % parts:
        raise ValueError(f"{number} experts can't be split into {parts} equal parts.")
    each = number // parts
    return [experts.take(start, start + each) for start in range(0, number, each)]


def concatenate(parts: Sequence[CompressedExperts]) -> CompressedExperts:
    """Joins groups of experts of one layer, in order. Raises ValueError where codec, levels, out or in differ."""
    if isinstance(parts, CompressedExperts) or not isinstance(parts, Sequence):
        raise TypeError(f"parts: found {type(parts).__name__}, expected a list of CompressedExperts.")
    if not parts:
        raise ValueError("No experts to concatenate.")
    for i, part in enumerate(parts):
        _experts(f"parts[{i}]", part)
    kinds = {(part.codec, part.levels.shape[-1], *part.shape[1:], _classes(part)) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"Experts differ in (codec, levels, out, in, classes): {sorted(kinds)}.")
    return CompressedExperts(
        data={name: jnp.concatenate([part.data[name] for part in parts]) for name in parts[0].data},
        levels=jnp.concatenate([part.levels for part in parts]),
        codec=parts[0].codec,
        shape=(sum(part.shape[0] for part in parts), *parts[0].shape[1:]),
        bound=max(part.bound for part in parts),
    )


def convert(experts: CompressedExperts, codec: str, experts_per_group: int = 16) -> CompressedExperts:
    """The same symbols and levels in another codec; as many experts at a time are uncompressed as a group has.

    Raises ValueError for an unknown codec, and for levels that it can't hold.
    """
    _experts("experts", experts)
    if _whole("experts_per_group", experts_per_group) < 1:
        raise ValueError(f"experts_per_group: found {experts_per_group}, expected at least 1.")
    groups = np.array_split(np.arange(experts.shape[0]), -(-experts.shape[0] // experts_per_group))
    encode = functools.partial(
        CompressedExperts.from_symbols, codec=codec, classes=_classes(experts) if codec == "gap" else 1
    )
    return concatenate([encode(_symbols(experts, g), experts.levels[g]) for g in groups])


def in_codec(value: object, codec: str | None) -> object:
    """Experts in that codec, as `convert` makes them; anything else, and with None everything, as it is."""
    if codec is None or not isinstance(value, CompressedExperts) or value.codec == codec:
        return value
    return convert(value, codec)


def _experts(name: str, value: object) -> CompressedExperts:
    if not isinstance(value, CompressedExperts):
        raise TypeError(f"{name}: found {type(value).__name__}, expected CompressedExperts.")
    return value


def _classes(experts: CompressedExperts) -> int:
    return gap.number_of_classes(experts.data) if experts.codec == "gap" else 1


def _whole(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as e:
        raise TypeError(f"{name}: found {value!r}, expected a whole number.") from e


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, str) or not isinstance(shape, Sequence | np.ndarray) or len(shape) != 3:
        raise TypeError(f"shape: found {shape!r}, expected (experts, out, in).")
    return tuple(_whole("shape", n) for n in shape)


def _real(name: str, values: ArrayLike) -> jax.Array:
    """Numbers as an array. Raises TypeError for anything else."""
    dtype = getattr(values, "dtype", None) or np.asarray(values).dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name}: found {dtype}, expected real numbers.")
    return jnp.asarray(values)


def _concrete(index: ArrayLike, experts: int) -> int:
    """The number of an expert, from 0."""
    number = operator.index(np.asarray(index).item() if np.ndim(index) == 0 else index)  # type: ignore[arg-type]
    if not -experts <= number < experts:
        raise IndexError(f"expert {number}: there are {experts}, 0 to {experts - 1}.")
    return number % experts


def _resident(data, levels, codec, shape) -> CompressedExperts:
    bound = codecs.get(codec).static_bound(data)
    return CompressedExperts({name: jax.device_put(a) for name, a in data.items()}, levels, codec, tuple(shape), bound)


def _check_levels(levels, shape) -> None:
    levels = np.asarray(levels).astype(np.float32)
    if levels.ndim != 3 or levels.shape[:2] != tuple(shape[:2]):
        raise ValueError(f"levels: shape {list(levels.shape)}, expected {[*shape[:2], 2]} (experts, out, min and max).")
    # A row of one value throughout has it as every level, so the minimum may be positive.
    good = np.isfinite(levels).all(-1) & (np.diff(levels, axis=-1) >= 0).all(-1)
    for expert, row in np.argwhere(~good):
        found = ", ".join(map(str, levels[expert, row]))
        raise ValueError(f"levels: expert {expert}, row {row} has ({found}), expected finite and rising (min <= max).")


def _decode(experts, index):
    codec, num_levels = codecs.get(experts.codec), experts.levels.shape[-1]
    return codec.decode_expert(experts.data, experts.shape, num_levels, experts.bound, index)


@jax.jit
def _expert(experts, index):
    symbols = _decode(experts, index)
    weights = jnp.zeros(symbols.shape, jnp.float32)
    for k, level in enumerate(jnp.unstack(experts.levels[index].astype(jnp.float32), axis=-1), start=1):  # [out]
        weights = jnp.where(symbols == k, level[:, None], weights)
    return weights


@jax.jit
def _symbols(experts, indices):
    return jax.lax.map(lambda e: _decode(experts, e), indices)


@jax.jit
def _to_dense(experts):
    return jax.lax.map(lambda e: _expert(experts, e), jnp.arange(experts.shape[0]))
