"""Rows to the process that has their expert, and back: one process or several, behind one function.

`deliveries` yields group after group of a layer's experts with the rows that are to go through it; by the time the
next one is asked for, results have been added, and are where they belong. Alone a group gets all rows as they lie, and
nothing moves. Several processes each have a group of their own experts at a time; all take part until the last of them
has no group left. Rows meet their expert in the order of one process, so that all sums are those of one, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from qmoe_jax import resources
from qmoe_jax.processes import Processes
from qmoe_jax.streaming.buffers import ListBuffer, Rows
from qmoe_jax.streaming.documents import Documents
from qmoe_jax.streaming.experts import Delivery, Routed

Groups = Iterator[tuple[int, int, dict[str, Any]]]  # start, stop, kernels


class RoutedRows(NamedTuple):
    """What a layer's attention leaves: of each of this process's tokens.

    Attributes:
      stream: whose they are.
      h: [tokens, d_model], inputs of the experts.
      expert: int32 [tokens, choices].
      gate: float32 [tokens, choices].
      buffers: what these lie in, so that their memory is given back (`Documents.release`) as long as they are wanted.
    """

    stream: str
    h: np.ndarray
    expert: np.ndarray
    gate: np.ndarray
    buffers: tuple[ListBuffer, ...] = ()


class Exchange(Protocol):
    """See `deliveries`."""

    def deliveries(self, groups: Groups, routed: RoutedRows, y: np.ndarray) -> Iterator[Delivery]:
        """Groups of experts with their rows; results are added to y [tokens, d_model], row by row of `routed`."""
        ...


class Alone:
    """One process: it has all rows."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def deliveries(self, groups: Groups, routed: RoutedRows, y: np.ndarray) -> Iterator[Delivery]:
        sorted_ = Routed(routed.expert, routed.gate, self.num_experts)
        for start, stop, kernels in groups:
            yield Delivery(start, stop, kernels, routed.h, sorted_, y, inputs=routed.h)


class Several:
    """Several processes, each with some documents' rows and some experts of every layer.

    Args:
      processes: all of them.
      documents: of this one.
      num_experts: of a layer.
      sample: by stream, tokens whose inputs every group gets beside those of its own tokens, rising.
      stages: where seconds are counted.
    """

    def __init__(
        self,
        processes: Processes,
        documents: Documents,
        num_experts: int,
        sample: Mapping[str, np.ndarray],
        stages: resources.Stages,
    ):
        self.processes, self.documents, self.num_experts = processes, documents, num_experts
        self.sample, self.stages = sample, stages

    def deliveries(self, groups: Groups, routed: RoutedRows, y: np.ndarray) -> Iterator[Delivery]:
        own = self.documents.rows(routed.stream)
        total = int(self.documents.lengths[routed.stream].sum())
        everywhere = self._everywhere(self.sample.get(routed.stream, np.zeros(0, np.int64)), own, routed.h)
        while True:
            start, stop, kernels = next(groups, (0, 0, {}))
            with self.stages("exchange"):
                bounds = self.processes.gather([start, stop])
                if all(a == b for a, b in bounds):
                    return
                wanted = [np.flatnonzero(((a <= routed.expert) & (routed.expert < b)).any(1)) for a, b in bounds]
                sent = [
                    {"row": own[w], "h": routed.h[w], "expert": routed.expert[w], "gate": routed.gate[w]}
                    for w in wanted
                ]
                received = self.processes.exchange(sent)
                counts = np.cumsum([len(r["row"]) for r in received])[:-1]
                arrived = {name: np.concatenate([r[name] for r in received]) for name in sent[0]}
                order = np.argsort(arrived["row"])  # That of one process.
                row, h, expert, gate = (arrived[name][order] for name in ("row", "h", "expert", "gate"))
            results = np.zeros_like(h)
            if start < stop:
                index, first = np.unique(np.concatenate([row, everywhere["row"]]), return_index=True)
                inputs = Rows(index, np.concatenate([h, everywhere["h"]])[first], total)
                sorted_ = Routed(expert, gate, self.num_experts)
                yield Delivery(start, stop, kernels, h, sorted_, results, inputs, tokens=row)
            with self.stages("exchange"):
                unsorted = np.empty_like(results)
                unsorted[order] = results
                returned = self.processes.exchange([{"y": part} for part in np.split(unsorted, counts)])
                for rows, part in zip(wanted, returned, strict=True):
                    y[rows] += part["y"]

    def _everywhere(self, rows: np.ndarray, own: np.ndarray, h: np.ndarray) -> dict[str, np.ndarray]:
        """These rows of h on every process."""
        at = np.flatnonzero(np.isin(own, rows))
        received = self.processes.exchange([{"row": own[at], "h": h[at]}] * self.processes.count)
        return {name: np.concatenate([r[name] for r in received]) for name in ("row", "h")}
