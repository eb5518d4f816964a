"""What the processes of one run tell each other, by JAX's collectives over one device of each.

Every process calls the same methods in the same order. Without `jax.distributed` there is one process, and nothing is
sent.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "process"
ROUND_BYTES = 1 << 26  # that a process sends to all others at once


class ProcessLost(OSError):
    """Another process of the run has ended, or can't be reached."""


def share(items: int, count: int, index: int) -> range:
    """The `index`-th of `count` consecutive ranges of items, as equal as can be."""
    return range(index * items // count, (index + 1) * items // count)


class Processes:
    """All processes of `jax.distributed`.

    Attributes:
      count: how many there are.
      index: which one this is; the first one reports.
    """

    def __init__(self):
        self.count, self.index = jax.process_count(), jax.process_index()

    @property
    def first(self) -> bool:
        return self.index == 0

    def share(self, items: int) -> range:
        """This process's range of items."""
        return share(items, self.count, self.index)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on every process. JSON values; floats stay what they are to the bit."""
        if self.count == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)[:, None]
        received = self.exchange([{"json": data}] * self.count)
        return [json.loads(r["json"].tobytes()) for r in received]

    def from_first(self, value: Any) -> Any:
        """The first process's value, on every process; a JSON value."""
        return self.gather(value if self.first else None)[0]

    def agree(self, what: Mapping[str, Any]) -> None:
        """Sees to it that all processes were given the same.

        Args:
          what: JSON values by name; a long one by its hash.

        Raises ValueError on every process, naming what differs and how.
        """
        told = self.gather(json.loads(json.dumps(what, default=str)))
        names = sorted({name for values in told for name in values})
        differ = [n for n in names if any(values.get(n) != told[0].get(n) for values in told)]
        if differ:
            said = "; ".join(
                f"{n}: " + ", ".join(f"process {i} has {_short(values.get(n))}" for i, values in enumerate(told))
                for n in differ
            )
            raise ValueError(
                f"The processes of this run were not given the same. {said}. Give all of them one command."
            )

    def wait(self) -> None:
        """Until every process has come here."""
        self.gather(None)

    def exchange(self, outgoing: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Rows from every process to every other, as many as each wants.

        Args:
          outgoing: for each process, arrays by name, all with the same number of rows [n, ...]; names, dtypes and
            shapes of a row are the same everywhere.

        Returns:
          From each process, what it had for this one; to the bit.

        Raises:
          ProcessLost: another process has ended.
        """
        if self.count == 1:
            return list(outgoing)
        packed = [_pack(arrays) for arrays in outgoing]
        width = packed[0].shape[1]
        sizes = np.array([[len(rows)] for rows in packed], np.uint32)  # [processes, 1]
        sizes = np.concatenate([sizes, np.full_like(sizes, max(map(len, packed)))], axis=1)
        sizes = self._all_to_all(sizes.view(np.uint8)).view(np.uint32)  # What comes, and the most that each one sends.
        coming, most = sizes[:, 0], int(sizes[:, 1].max())
        received = [np.empty((n, width), np.uint8) for n in coming]
        # Rounds are of one size, or of a smaller power of two, so that few shapes are compiled.
        step = min(1 << max(0, most - 1).bit_length(), max(1, ROUND_BYTES // (self.count * width)))
        for start in range(0, most, step):
            sent = np.zeros((self.count, step, width), np.uint8)
            for rows, to in zip(packed, sent, strict=True):
                part = rows[start : start + step]
                to[: len(part)] = part
            for rows, arrived in zip(received, self._all_to_all(sent), strict=True):
                part = rows[start : start + step]
                part[:] = arrived[: len(part)]
        return [_unpack(rows, like) for rows, like in zip(received, outgoing, strict=True)]

    def _all_to_all(self, x: np.ndarray) -> np.ndarray:
        """x [processes, ...], a part for each process -> [processes, ...], a part from each."""
        sharding = NamedSharding(_mesh(), P(AXIS))
        try:
            parts = jax.make_array_from_process_local_data(sharding, x[None], (self.count, *x.shape))
            return np.asarray(_all_to_all(_mesh(), parts).addressable_data(0))[0]
        except (ValueError, RuntimeError) as e:
            raise ProcessLost(
                "Another process of this run has ended, or can't be reached; its own message says why. What was "
                f"committed is kept: run the same command again, with as many processes as you like. ({_line(e)})"
            ) from e


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _line(e: Exception) -> str:
    return str(e).split("\n")[0][:200]


@functools.cache
def _mesh() -> Mesh:
    """One device of each process."""
    first: dict[int, jax.Device] = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    return Mesh(np.array([first[i] for i in sorted(first)]), (AXIS,))


@functools.partial(jax.jit, static_argnums=0)
def _all_to_all(mesh: Mesh, parts: jax.Array) -> jax.Array:  # [from, to, ...] -> [to, from, ...]
    def send(x):  # [1, to, ...]
        return jax.lax.all_to_all(x[0], AXIS, 0, 0, tiled=True)[None]

    return jax.shard_map(send, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))(parts)


def _pack(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """[n, bytes of a row]: as bytes no dtype is changed on the way."""
    rows = [np.ascontiguousarray(a).reshape(len(a), math.prod(a.shape[1:])).view(np.uint8) for a in arrays.values()]
    return np.concatenate(rows, axis=1)


def _unpack(rows: np.ndarray, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays, at = {}, 0
    for name, a in like.items():
        width = math.prod(a.shape[1:]) * a.dtype.itemsize
        part = np.ascontiguousarray(rows[:, at : at + width])
        arrays[name] = part.view(a.dtype).reshape(len(rows), *a.shape[1:])
        at += width
    return arrays
