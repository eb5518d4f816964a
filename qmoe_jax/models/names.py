"""What parameters are called in a checkpoint: a table of a family, read both ways.

A row is a parameter's name and a tensor's, as templates: {fields} are filled with what their patterns match, and
{expert} counts the tensors of which each is one expert's.

    Row("layers_{layer}/moe/{matrix}/kernel", "model.layers.{layer}.experts.{expert}.{matrix}.weight", TRANSPOSED)

Checkpoints read and write by it; no file is opened here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from qmoe_jax.errors import CheckpointError, listed

SAME, TRANSPOSED = False, True
NUMBER = r"\d{1,9}"  # of a layer or an expert
Shape = tuple[int, ...]
COPY = "a copy"  # why a tensor is left out that holds once more what another one does


class Part(NamedTuple):
    """Which outputs of a tensor are a parameter's, where several share one, such as gate and up.

    Attributes:
      number: the parameter's, among them.
      of: how many they are.
      interleaved: output j is of parameter number j % of; otherwise they lie side by side.
    """

    number: int
    of: int
    interleaved: bool = False

    def outputs(self, begin: int, end: int, size: int) -> slice:
        """Outputs begin:end of the parameter, of `size` in all, as outputs of the tensor."""
        if begin == end:
            return slice(0, 0)
        if self.interleaved:
            return slice(self.number + begin * self.of, self.number + (end - 1) * self.of + 1, self.of)
        return slice(self.number * size + begin, self.number * size + end)


class Packed(NamedTuple):
    """A tensor that other tensors are needed to make sense of: float8 or 4 bits, and scales.

    Attributes:
      beside: names of these; templates in a `Row`.
      shape: of the weights [..., out, in], from the tensor's.
      unpack: unpack(tensor, *beside) -> weights; of the whole, or of slices as `slices` gives them.
      grains: of the tensor, and of each of those beside it: how many rows and columns of weights an entry stands for.
      dtype: of the weights: one that holds them without rounding.
    """

    beside: tuple[str, ...]
    shape: Callable[[Shape], Shape]
    unpack: Callable[..., np.ndarray]
    grains: tuple[tuple[int, int], ...]
    dtype: np.dtype = np.dtype(ml_dtypes.bfloat16)

    def check(self, name: str, shapes: Mapping[str, Shape]) -> None:
        """Raises CheckpointError where those beside the tensor `name` haven't an entry for each of its blocks."""
        size = self.shape(shapes[name])[-2:]
        for other, grain in zip(self.beside, self.grains[1:], strict=True):
            expected = tuple(-(-n // g) for n, g in zip(size, grain, strict=True))
            if shapes[other][-2:] != expected:
                raise CheckpointError(
                    f"Tensor {other!r} has shape {list(shapes[other])}, expected {list(expected)} at its end: one for "
                    f"{grain[0]} x {grain[1]} weights of {name!r}, {list(size)}."
                )

    def slices(self, rows: slice, columns: slice) -> tuple[list[tuple[slice, slice]], tuple[slice, slice]]:
        """What is to be read for rows and columns of the weights, bounds given: no more than the blocks these are in.

        Returns:
          Slices of rows and columns of the tensor and of each beside it; and what of the weights that these make.
        """
        parts, rest = zip(
            *(_aligned(at, [grain[axis] for grain in self.grains]) for axis, at in enumerate((rows, columns))),
            strict=True,
        )
        return list(zip(*parts, strict=True)), rest


def _aligned(at: slice, grains: Sequence[int]) -> tuple[list[slice], slice]:
    """An axis of `Packed.slices`: the slice of each array, and what of the weights that they make."""
    block, step = max(grains), 1 if at.step is None else at.step
    if block == 1:
        return [at] * len(grains), slice(None)
    wanted = range(at.start, at.stop, step)
    if not wanted:
        return [slice(0, 0)] * len(grains), slice(None)
    low, high = min(wanted), max(wanted) + 1
    begin, end = low // block * block, -(-high // block) * block  # Beyond the last weight: slices end there themselves.
    rest = slice(wanted[0] - begin, wanted[-1] - begin + (1 if step > 0 else -1), step)
    return [slice(begin // grain, end // grain) for grain in grains], rest


class Tensors(NamedTuple):
    """The stored tensors that make one parameter.

    Attributes:
      names: of one, or of one for each expert.
      transposed: the last two axes are the other way round in the file: [out, in].
      stacked: there is one for each expert, [in, out] without transposing; they are stacked on axis 0.
      part: which outputs they are; None: all.
      packed: of each, how it is unpacked; empty: they hold the weights themselves.
      copies: other names under which the tensor is to be written as well.
      merged: this axis of the tensor and the next are one of the parameter's, such as heads and their width.
      scale: what the tensor is to be multiplied by.
    """

    names: tuple[str, ...]
    transposed: bool = SAME
    stacked: bool = False
    part: Part | None = None
    packed: tuple[Packed, ...] = ()
    copies: tuple[str, ...] = ()
    merged: int | None = None
    scale: float = 1.0

    @property
    def plain(self) -> bool:
        """The tensor is the parameter."""
        changed = self.merged is not None or self.scale != 1
        return not (self.transposed or self.stacked or self.part or self.packed or changed)

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The parameter's. Raises CheckpointError where shapes of experts differ, or don't fit parts or scales."""
        found = [shapes[name] for name in self.names]
        for name, other in zip(self.names, found, strict=True):
            if other != found[0]:
                raise CheckpointError(
                    f"Tensor {name!r} has shape {list(other)}, but {self.names[0]!r} {list(found[0])}."
                )
        for name, packed in zip(self.names, self.packed, strict=False):
            packed.check(name, shapes)
        shape = self.packed[0].shape(found[0]) if self.packed else found[0]
        if (axis := self.merged) is not None:
            if len(shape) < axis + 2:
                raise CheckpointError(f"Tensor {self.names[0]!r} has shape {list(shape)}, expected an axis of heads.")
            shape = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
        if self.transposed:
            shape = (*shape[:-2], *shape[:-3:-1])
        if self.part is not None:
            if shape[-1] % self.part.of:
                raise CheckpointError(
                    f"Tensor {self.names[0]!r} has {shape[-1]} outputs, expected a multiple of {self.part.of}."
                )
            shape = (*shape[:-1], shape[-1] // self.part.of)
        return (len(self.names), *shape) if self.stacked else shape


class Row(NamedTuple):
    """A line of a table; names are templates. See `Tensors`."""

    parameter: str
    tensor: str
    transposed: bool = SAME
    part: Part | None = None
    packed: Packed | None = None
    merged: int | None = None


class Table:
    """Names of parameters and of the tensors that make them.

    Args:
      rows: of two with the same parameter the first is written, and both are read; of two with the same tensor, each
        takes its part.
      fields: what {layer} and others stand for, as regular expressions. {expert} is a number.
    """

    def __init__(self, rows: Sequence[Row], fields: Mapping[str, str]):
        self.rows, self.fields = tuple(rows), {**fields, "expert": NUMBER}

    def tensors(self, parameter: str, num_experts: int) -> Tensors:
        """What a parameter is written to. Raises KeyError if it isn't known."""
        for (pattern, _), row in zip(self._patterns, self.rows, strict=True):
            if match := pattern.fullmatch(parameter):
                stacked = "{expert}" in row.tensor
                every = [match.groupdict() | {"expert": e} for e in (range(num_experts) if stacked else [0])]
                names = tuple(row.tensor.format(**fields) for fields in every)
                packed = tuple(_filled(row.packed, fields) for fields in every) if row.packed else ()
                return Tensors(names, row.transposed, stacked, row.part, packed, merged=row.merged)
        raise KeyError(parameter)

    def parameters(self, names: Iterable[str]) -> tuple[dict[str, Tensors], list[str]]:
        """The parameters that tensors make, and the names that nothing is known of.

        Raises:
          CheckpointError: experts are missing.
        """
        names = list(names)
        there = set(names)
        beside: set[str] = set()
        found: dict[str, dict[int, tuple[int, str, Packed | None]]] = {}  # parameter -> expert -> row, tensor, ...
        foreign = []
        for name in names:
            matches = self._matches(name)
            if not matches:
                foreign.append(name)
            for number, fields in matches:
                row, packed = self.rows[number], None
                if row.packed and there.issuperset(_filled(row.packed, fields).beside):
                    packed = _filled(row.packed, fields)
                    beside.update(packed.beside)
                experts = found.setdefault(row.parameter.format(**fields), {})
                tensor, expert = (number, name, packed), int(fields.get("expert") or 0)
                experts[expert] = min(tensor, experts.get(expert, tensor), key=lambda t: t[:2])

        num_experts = 1 + max((e for experts in found.values() for e in experts), default=0)
        if num_experts > len(names):
            which = next(t for experts in found.values() for e, (_, t, _) in experts.items() if e == num_experts - 1)
            raise CheckpointError(
                f"Tensor {which!r} is of expert {num_experts - 1}, but there are {len(names)} tensors."
            )
        parameters, missing = {}, []
        for parameter, experts in found.items():
            row = self.rows[experts[min(experts)][0]]
            stacked = "{expert}" in row.tensor
            expected = range(num_experts) if stacked else [0]
            if absent := [e for e in expected if e not in experts]:
                missing.append(f"{parameter}: {', '.join(map(str, absent[:8]))}{', ...' if len(absent) > 8 else ''}")
                continue
            tensors = [experts[e] for e in expected]
            all_packed = tuple(p for _, _, p in tensors if p is not None)
            if all_packed and len(all_packed) < len(tensors):
                lacking = next(name for _, name, p in tensors if p is None)
                missing.append(f"{parameter}: what {lacking} is unpacked with")
                continue
            names_of = tuple(name for _, name, _ in tensors)
            parameters[parameter] = Tensors(names_of, row.transposed, stacked, row.part, all_packed, merged=row.merged)
        if missing:
            raise CheckpointError(listed(f"Of {num_experts} experts some are missing:", missing))
        return parameters, [name for name in foreign if name not in beside]

    def _matches(self, name: str) -> list[tuple[int, dict[str, str]]]:
        """Rows of a tensor, and what their fields are: the first that fits, and others with the same tensor."""
        for number, (_, pattern) in enumerate(self._patterns):
            if match := pattern.fullmatch(name):
                same = [i for i, row in enumerate(self.rows) if row.tensor == self.rows[number].tensor]
                return [(i, match.groupdict()) for i in same]
        return []

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern, re.Pattern]]:
        return [(self._pattern(row.parameter), self._pattern(row.tensor)) for row in self.rows]

    def _pattern(self, template: str) -> re.Pattern:
        pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
        for field, values in self.fields.items():
            pattern = pattern.replace(f"{{{field}}}", f"(?P<{field}>{values})")
        return re.compile(pattern)


def _filled(packed: Packed, fields: Mapping[str, object]) -> Packed:
    return packed._replace(beside=tuple(name.format(**fields) for name in packed.beside))


def in_short(names: Iterable[str]) -> list[str]:
    """Names that differ in nothing but numbers as one, with the least and the greatest: 'layers.61.experts.0-255'."""
    alike: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "{}", name), []).append(tuple(map(int, re.findall(r"\d+", name))))
    return [
        template.format(*(f"{min(c)}-{max(c)}" if len(set(c)) > 1 else c[0] for c in zip(*numbers, strict=True)))
        for template, numbers in alike.items()
    ]
