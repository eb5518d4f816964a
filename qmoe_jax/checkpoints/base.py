"""What every checkpoint layout offers: the architecture, and parameters by name, read only when asked for."""

from __future__ import annotations

import abc
import functools
import types
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from qmoe_jax.checkpoints import reading
from qmoe_jax.checkpoints.checks import check_finite
from qmoe_jax.checkpoints.reading import Reading, prefetched
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.models.families import family_of
from qmoe_jax.models.family import Family


class StoredMatrix(NamedTuple):
    """A compressed matrix of all experts of a layer: what is known without reading it."""

    shape: tuple[int, int, int]  # experts, out, in
    nbytes: int


def check_group_size(group_size: int) -> None:
    if group_size < 1:
        raise ValueError(f"group_size: found {group_size}, expected at least 1 expert.")


class Checkpoint(abc.ABC):
    """A model on disk.

    Attributes:
      path: where it is.
      config: its architecture.
      specs: shape and dtype by '/'-joined parameter name, experts' kernels left out where they are compressed.
      provenance: what is known of its origin, as JSON values.
      codec: name of the codec of the experts, None where they are uncompressed.
      expert_sizes: of compressed experts, by layer and matrix; empty where they are uncompressed.
      quantization: settings of the quantizer, as JSON values; empty where it isn't known.
    """

    path: str
    config: Any
    specs: Mapping[str, jax.ShapeDtypeStruct]
    provenance: dict[str, Any]
    codec: str | None = None
    expert_sizes: Mapping[str, Mapping[str, StoredMatrix]] = types.MappingProxyType({})
    quantization: Mapping[str, Any] = types.MappingProxyType({})

    @property
    def family(self) -> Family:
        """The family that it is of."""
        return family_of(self.config)

    def is_expert(self, name: str) -> bool:
        """Whether a parameter, by its '/'-joined name, is a matrix of all experts of a layer."""
        return self.family.expert_of(name) is not None

    @abc.abstractmethod
    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        """The slice `index` of parameter `name`, as stored; nothing else is read."""

    @abc.abstractmethod
    def experts(self, layer: str, group_size: int | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """The experts of a sparse layer such as 'encoder/layers_1', in groups of about `group_size` (None: one group).

        Yields (start, stop, kernels) with the matrices of experts start:stop by name (wi, wo, ...): either arrays
        [experts, in, out] or `CompressedExperts`.
        """

    def grids(self, layer: str) -> dict[str, reading.Grid]:
        """How a layer's matrices are cut into what is read at once, by name."""
        shapes = self.family.param_shapes(self.config)
        names = {m: self.family.expert_parameter(layer, m) for m in self.config.expert.matrices}
        return {m: reading.Grid(shapes[n], (1, *shapes[n][1:]), self.specs[n].dtype.itemsize) for m, n in names.items()}

    def stream(
        self, layers: Sequence[str], group_size: int, how: Reading = reading.DEFAULT, experts: range | None = None
    ) -> Generator[tuple[str, int, int, dict[str, Any]]]:
        """The experts of many layers one after the other; the next are read while the caller has the present ones.

        Args:
          layers: such as 'encoder/layers_1', in the order in which they are wanted.
          group_size: about how many experts are handed out together.
          how: memory, dtype and patience. A layout that hands out whole layers heeds the dtype only.
          experts: those that are wanted of every layer, None: all. Groups may hold others beside them.

        Yields:
          (layer, start, stop, kernels) as from `experts`; arrays are checked to be finite, and cast.

        Raises:
          CheckpointError: something can't be read, or is NaN or Inf.
        """
        check_group_size(group_size)
        wanted = experts or range(self.config.num_experts)

        def groups():
            for layer in layers:
                for start, stop, kernels in self.experts(layer, group_size):
                    if start >= wanted.stop or stop <= wanted.start:
                        continue
                    for matrix, kernel in kernels.items():
                        if not isinstance(kernel, CompressedExperts):
                            cast = kernel if how.dtype is None else kernel.astype(how.dtype)
                            check_finite(self.family.expert_parameter(layer, matrix), cast, start)
                            kernels[matrix] = cast
                    yield layer, start, stop, kernels
                    del kernels

        return prefetched(groups())

    def params(self, prefix: str = "") -> dict[str, Any]:
        """Nested dict of all parameters below `prefix` (such as 'encoder/layers_1/'), experts' kernels left out."""
        names = [n for n in self.specs if n.startswith(prefix) and not self.is_expert(n)]
        flat = {n[len(prefix) :]: self.read(n) for n in names}
        return traverse_util.unflatten_dict(flat, sep="/")

    def load(self, put: Callable[[str, Any], Any] = lambda name, value: value) -> dict[str, Any]:
        """The whole parameter tree: T5X's names; an experts' kernel may be `CompressedExperts`.

        Args:
          put: put(name, value) is kept in place of each parameter, once it is read: where it is to be.

        Raises CheckpointError for NaN or Inf, naming parameter and expert.
        """
        flat = traverse_util.flatten_dict(self.params(), sep="/")
        for name, value in flat.items():
            check_finite(name, value)
            flat[name] = put(name, value)
        for layer in self.config.sparse_layers:
            ((_, _, kernels),) = self.experts(layer)
            for matrix, kernel in kernels.items():
                name = self.family.expert_parameter(layer, matrix)
                if not isinstance(kernel, CompressedExperts):
                    check_finite(name, kernel, 0)
                flat[name] = put(name, kernel)
        return traverse_util.unflatten_dict(flat, sep="/")

    def dense_leaves(self) -> dict[str, Callable[[], np.ndarray]]:
        """Every parameter of a native checkpoint, as a function that reads it; compressed experts are dequantized.

        `write_t5x(directory, checkpoint.dense_leaves())` gives a compressed model back to T5X, one array at a time.
        """

        def experts(layer, matrix):
            ((_, _, kernels),) = self.experts(layer)
            kernel = kernels[matrix]
            if isinstance(kernel, CompressedExperts):
                return np.asarray(kernel.to_dense()).swapaxes(1, 2)  # [experts, in, out]
            return kernel

        leaves: dict[str, Callable[[], np.ndarray]] = {n: functools.partial(self.read, n) for n in self.specs}
        for layer in self.config.sparse_layers:
            for matrix in self.config.expert.matrices:
                name = self.family.expert_parameter(layer, matrix)
                leaves.setdefault(name, functools.partial(experts, layer, matrix))
        return leaves
