"""What every checkpoint layout offers: the architecture, and parameters by name, read only when asked for.

Store                 stored arrays by name: T5X's directories, files of tensors; knows no model
Names                 a family's: which of them make a parameter
StoredCheckpoint      both: parameters as they are stored
Checkpoint            what others see; where experts are compressed, a layout reads them itself
"""

from __future__ import annotations

import abc
import contextlib
import functools
import logging
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from qmoe_jax.checkpoints import reading
from qmoe_jax.checkpoints.checks import check_finite, check_tree
from qmoe_jax.checkpoints.reading import Reading, Source, prefetched
from qmoe_jax.checkpoints.store import Index, Store, box_of, slices
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.models.families import family_of
from qmoe_jax.models.family import Family, Names
from qmoe_jax.models.names import COPY, Shape, Tensors, in_short

Kernels = dict[str, Any]  # matrices of experts by name: arrays [experts, in, out], or `CompressedExperts`
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
logger = logging.getLogger(__name__)


class StoredMatrix(NamedTuple):
    """A compressed matrix of all experts of a layer: what is known without reading it."""

    shape: tuple[int, int, int]  # experts, out, in
    nbytes: int


def check_group_size(group_size: int) -> None:
    if group_size < 1:
        raise ValueError(f"group_size: found {group_size}, expected at least 1 expert.")


class Checkpoint(abc.ABC):
    """A model on disk.

    A layout gives `specs` and `read`. One that doesn't keep experts as parameters gives `read_experts`, too, and
    `groups` if some of them are best read together.

    Attributes:
      path: where it is.
      config: its architecture.
      provenance: what is known of its origin, as JSON values.
      codec: name of the codec of the experts, None where they are uncompressed.
      quantization: settings of the quantizer, as JSON values; empty where it isn't known.
    """

    path: str
    config: Any
    provenance: dict[str, Any]
    codec: str | None = None
    quantization: Mapping[str, Any] = types.MappingProxyType({})

    @property
    @abc.abstractmethod
    def specs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype by '/'-joined parameter name, experts' kernels left out where they are compressed."""

    @property
    def expert_sizes(self) -> Mapping[str, Mapping[str, StoredMatrix]]:
        """Of compressed experts, by layer and matrix; empty where they are uncompressed."""
        return {}

    @abc.abstractmethod
    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The slice `index` of parameter `name`, as stored; nothing else is read."""

    def read_experts(self, layer: str, start: int, stop: int) -> Kernels:
        """The matrices of experts start:stop of a sparse layer, by name."""
        return {m: self.read(n, (slice(start, stop),)) for m, n in self.matrices(layer).items()}

    def groups(self, layer: str, group_size: int) -> Iterator[range]:
        """Consecutive experts of a layer that are read together: about `group_size` of them."""
        for start in range(0, self.config.num_experts, group_size):
            yield range(start, min(start + group_size, self.config.num_experts))

    def sources(self, layer: str) -> dict[str, Source]:
        """The matrices of a sparse layer as they are stored, by name; empty unless they are in chunks."""
        return {}

    # --- What follows from these --------------------------------------------------------------------------------------

    @property
    def family(self) -> Family:
        """The family that it is of."""
        return family_of(self.config)

    def is_expert(self, name: str) -> bool:
        """Whether a parameter, by its '/'-joined name, is a matrix of all experts of a layer."""
        return self.family.expert_of(name) is not None

    @property
    def is_compressed(self) -> bool:
        """Whether its experts are."""
        return not any(map(self.is_expert, self.specs))

    def matrices(self, layer: str) -> dict[str, str]:
        """Parameters of a sparse layer's experts, by matrix in order of use."""
        return {m: self.family.expert_parameter(layer, m) for m in self.config.expert.matrices}

    def grids(self, layer: str) -> dict[str, reading.Grid]:
        """How a layer's matrices are cut into what is read at once, by name."""
        if sources := self.sources(layer):
            return {m: source.grid for m, source in sources.items()}
        specs = {m: self.specs[n] for m, n in self.matrices(layer).items()}
        return {m: reading.Grid(s.shape, (1, *s.shape[1:]), s.dtype.itemsize) for m, s in specs.items()}

    def experts(self, layer: str, group_size: int | None = None) -> Iterator[tuple[int, int, Kernels]]:
        """The experts of a sparse layer, in groups of about `group_size` (None: one group).

        Yields (start, stop, kernels) with the matrices of experts start:stop by name: either arrays
        [experts, in, out] or `CompressedExperts`.
        """
        if group_size is None:
            yield 0, self.config.num_experts, self.read_experts(layer, 0, self.config.num_experts)
            return
        check_group_size(group_size)
        if self.sources(layer):
            with contextlib.closing(self.stream([layer], group_size)) as groups:
                for _, start, stop, kernels in groups:
                    yield start, stop, kernels
            return
        for group in self.groups(layer, group_size):
            yield group.start, group.stop, self.read_experts(layer, group.start, group.stop)

    def stream(
        self, layers: Sequence[str], group_size: int, how: Reading = reading.DEFAULT, experts: range | None = None
    ) -> Generator[tuple[str, int, int, Kernels]]:
        """The experts of many layers one after the other; the next are read while the caller has the present ones.

        Args:
          layers: names of sparse layers, in the order in which they are wanted.
          group_size: about how many experts are handed out together.
          how: memory, dtype and patience. Where experts aren't in chunks, the dtype only is heeded.
          experts: those that are wanted of every layer, None: all. Groups may hold others beside them.

        Yields:
          (layer, start, stop, kernels) as from `experts`; arrays are checked to be finite, and cast.

        Raises:
          CheckpointError: something can't be read, or is NaN or Inf.
        """
        check_group_size(group_size)
        return self._stream(layers, group_size, how, experts or range(self.config.num_experts))

    def _stream(self, layers, group_size, how, wanted):
        if layers and self.sources(layers[0]):
            opened = [(layer, functools.partial(self.sources, layer)) for layer in layers]
            yield from reading.stream(opened, group_size, how, wanted)
        else:
            yield from prefetched(self._checked(layers, group_size, how.dtype, wanted))

    def _checked(self, layers, group_size, dtype, wanted):
        for layer in layers:
            for group in self.groups(layer, group_size):
                if group.start >= wanted.stop or group.stop <= wanted.start:
                    continue
                kernels = self.read_experts(layer, group.start, group.stop)
                for matrix, name in self.matrices(layer).items():
                    if not isinstance(kernels[matrix], CompressedExperts):
                        kernels[matrix] = kernels[matrix] if dtype is None else kernels[matrix].astype(dtype)
                        self._check_finite(name, kernels[matrix], group.start)
                yield layer, group.start, group.stop, kernels
                del kernels  # Not kept while the next ones are read.

    def _check_finite(self, name: str, value: np.ndarray, first_expert: int | None = None) -> None:
        try:
            check_finite(name, value, first_expert)
        except CheckpointError as e:
            raise CheckpointError(f"{self.path}: {e}") from e

    def params(self, prefix: str = "") -> dict[str, Any]:
        """Nested dict of all parameters below `prefix` (a layer's name and '/'), experts' kernels left out."""
        names = [n for n in self.specs if n.startswith(prefix) and not self.is_expert(n)]
        flat = {n[len(prefix) :]: self.read(n) for n in names}
        return traverse_util.unflatten_dict(flat, sep="/")

    def load(self, put: Callable[[str, Any], Any] = lambda name, value: value) -> dict[str, Any]:
        """The whole parameter tree; an experts' kernel may be `CompressedExperts`.

        Args:
          put: put(name, value) is kept in place of each parameter, once it is read: where it is to be.

        Raises CheckpointError for NaN or Inf, naming parameter and expert.
        """
        flat = traverse_util.flatten_dict(self.params(), sep="/")
        for name, value in flat.items():
            self._check_finite(name, value)
            flat[name] = put(name, value)
        for layer in self.config.sparse_layers:
            ((_, _, kernels),) = self.experts(layer)
            for matrix, name in self.matrices(layer).items():
                if not isinstance(kernels[matrix], CompressedExperts):
                    self._check_finite(name, kernels[matrix], 0)
                flat[name] = put(name, kernels.pop(matrix))
        return traverse_util.unflatten_dict(flat, sep="/")


class StoredCheckpoint(Checkpoint):
    """Parameters as a store has them, by a family's names; experts' kernels are arrays [experts, in, out].

    Args:
      store: stored arrays.
      layout: whose names they have.
      family: of the model.
      overrides: fields of the config to change, or that aren't told.
      dtype: to which all is cast when it is read; None: as stored.

    Raises:
      CheckpointError: arrays are missing, foreign, of wrong shape, or don't fit what is told beside them.

    Attributes:
      left_out: stored arrays that no parameter is made of, names in short by what they are; also in the provenance, and
        logged. Copies of what is read don't count.
    """

    def __init__(
        self, store: Store, layout: str, family: Family, overrides: Mapping[str, Any], dtype: np.dtype | None = None
    ):
        self.path, self.store, names = store.path, store, family.names[layout]
        stored = {name: spec.shape for name, spec in store.specs.items()}
        try:
            self._tensors: dict[str, Tensors] = names.parameters(stored, store.described)
            shapes: dict[str, Shape] = {name: t.shape(stored) for name, t in self._tensors.items()}
            self.config = names.config(shapes, store.described, **overrides)
            self.left_out = _left_out(names, self.config, stored, self._tensors)
        except ValueError as e:  # A CheckpointError, or a config's own.
            raise CheckpointError(f"{self.path}: {e}") from e
        self._specs = {
            name: jax.ShapeDtypeStruct(shapes[name], dtype or _dtype(tensors, store))
            for name, tensors in self._tensors.items()
        }
        self.provenance = {"checkpoint": self.path, "layout": layout, "step": None}
        check_tree(self)
        if self.left_out:
            self.provenance["left_out"] = self.left_out
        for why, arrays in self.left_out.items():
            logger.warning("%s: left out: %s: %s", self.path, why, ", ".join(arrays))

    @property
    def specs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return self._specs

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        if name not in self._specs:
            others = "outside the compressed experts" if self.codec else f"among its {len(self._specs)}"
            raise CheckpointError(f"{self.path}: there is no parameter {name!r} {others}.")
        tensors, spec = self._tensors[name], self._specs[name]
        if tensors.plain:
            return self.store.read(tensors.names[0], index).astype(spec.dtype, copy=False)
        box, rest = box_of(index, spec.shape)
        if not tensors.stacked:
            return self._read(tensors, 0, box, spec.shape).astype(spec.dtype, copy=False)[rest]
        experts = np.empty([len(r) for r in box], spec.dtype)
        for i, expert in enumerate(box[0]):
            experts[i] = self._read(tensors, expert, box[1:], spec.shape[1:])
        return experts[rest]

    def stored_names(self, name: str) -> Sequence[str]:
        """The stored arrays that a parameter comes from: one, or one for each expert."""
        return self._tensors[name].names

    def _read(self, tensors: Tensors, number: int, box: tuple[range, ...], shape: Shape) -> np.ndarray:
        """Part of a parameter [..., in, out], or of an expert's: that of its tensor of that number."""
        at = list(slices(box))
        if tensors.part is not None:
            at[-1] = tensors.part.outputs(box[-1].start, box[-1].stop, shape[-1])
        if tensors.transposed:
            at[-2:] = at[:-3:-1]
        name = tensors.names[number]
        if tensors.packed:
            packed, experts = tensors.packed[number], at[:-2]
            parts, rest = packed.slices(*at[-2:])
            stored = zip((name, *packed.beside), parts, strict=True)
            values = packed.unpack(*(self.store.read(n, (*experts, *part)) for n, part in stored))[(..., *rest)]
        elif tensors.merged is not None:
            values = self._read_merged(name, tensors.merged, at)
        else:
            values = self.store.read(name, tuple(at))
        values = values.swapaxes(-1, -2) if tensors.transposed else values
        return values if tensors.scale == 1 else values.astype(np.float32) * np.float32(tensors.scale)

    def _read_merged(self, name: str, axis: int, at: list[slice]) -> np.ndarray:
        """Part of a tensor whose axes `axis` and `axis + 1` are taken for one: whole entries of the first are read."""
        width, (start, stop) = self.store.specs[name].shape[axis + 1], (at[axis].start, at[axis].stop)
        first = slice(start // width, -(-stop // width))
        values = self.store.read(name, (*at[:axis], first, slice(None), *at[axis + 1 :]))
        shape = values.shape
        values = values.reshape(*shape[:axis], shape[axis] * width, *shape[axis + 2 :])
        rest = slice(start - first.start * width, stop - first.start * width)
        return values[(slice(None),) * axis + (rest,)]

    def sources(self, layer: str) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for matrix, name in self.matrices(layer).items():
            tensors = self._tensors.get(name)
            source = self.store.source(tensors.names[0]) if tensors is not None and tensors.plain else None
            if source is None:
                return {}
            found[matrix] = source._replace(name=name)
        return found


def _left_out(
    names: Names, config: Any, stored: Iterable[str], parameters: Mapping[str, Tensors]
) -> dict[str, list[str]]:
    """See `StoredCheckpoint.left_out`. Raises CheckpointError that lists those of which nobody knows what they are."""
    used = {name for tensors in parameters.values() for name in tensors.names}
    used |= {name for tensors in parameters.values() for packed in tensors.packed for name in packed.beside}
    found: dict[str, list[str]] = {}
    unknown: list[str] = []
    for name in stored:
        if name not in used:
            why = names.why_left_out(config, name)
            (unknown if why is None else found.setdefault(why, [])).append(name)
    if unknown:
        raise CheckpointError(listed(f"{len(unknown)} arrays are part of no parameter:", unknown))
    return {why: in_short(arrays) for why, arrays in found.items() if why != COPY}


def _dtype(tensors: Tensors, store: Store) -> np.dtype:
    """Of a parameter: its tensors', or float32, which holds both 16-bit formats, where they differ."""
    if tensors.packed:
        return tensors.packed[0].dtype
    if tensors.scale != 1:
        return np.dtype(np.float32)
    dtypes = {store.specs[name].dtype for name in tensors.names}
    return np.dtype(dtypes.pop()) if len(dtypes) == 1 else np.dtype(np.float32)
