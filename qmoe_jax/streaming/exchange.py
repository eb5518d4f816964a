"""Rows to the process that has their expert, and back: one process or several, behind one function.

`deliveries` yields group after group of a layer's experts with the rows that are to go through it; by the time the
next one is asked for, results have been added, and are where they belong. Alone a group gets all rows as they lie, and
nothing moves. Several processes each have a group of their own experts at a time; all take part until the last of them
has no group left. Rows meet their expert in the order of one process, and what a token's experts give is added up in
their order, wherever they are, so that all sums are those of one, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from qmoe_jax import resources
from qmoe_jax.processes import Processes
from qmoe_jax.streaming.buffers import ListBuffer, Rows
from qmoe_jax.streaming.documents import Documents
from qmoe_jax.streaming.experts import Delivery, Routed, chunks

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
        own, choices = self.documents.rows(routed.stream), routed.expert.shape[1]
        total = int(self.documents.lengths[routed.stream].sum())
        everywhere = self._everywhere(self.sample.get(routed.stream, np.zeros(0, np.int64)), own, routed.h)
        separate = None  # Of two summands the order doesn't matter: nothing has to wait for others.
        if choices > 2:
            separate = self.documents.buffer(routed.stream, choices * y.shape[1], y.dtype)
        while True:
            start, stop, kernels = next(groups, (0, 0, {}))
            with self.stages("exchange"):
                bounds = self.processes.gather([start, stop])
                if all(a == b for a, b in bounds):
                    break
                wanted = [np.flatnonzero(_within(routed.expert, a, b).any(1)) for a, b in bounds]
                sent = [
                    {"row": own[w], "h": routed.h[w], "expert": routed.expert[w], "gate": routed.gate[w]}
                    for w in wanted
                ]
                received = self.processes.exchange(sent)
                arrived = {name: np.concatenate([r[name] for r in received]) for name in sent[0]}
                sender = np.repeat(np.arange(len(received)), [len(r["row"]) for r in received])
                order = np.argsort(arrived["row"])  # That of one process.
                # A row for each choice that is in the group.
                at, choice = np.nonzero(_within(arrived["expert"][order], start, stop))
                at = order[at]
                row, h, sender = (a[at] for a in (arrived["row"], arrived["h"], sender))
                expert, gate = (arrived[name][at, choice][:, None] for name in ("expert", "gate"))
            results = np.zeros_like(h)
            if start < stop:
                index, first = np.unique(np.concatenate([row, everywhere["row"]]), return_index=True)
                inputs = Rows(index, np.concatenate([h, everywhere["h"]])[first], total)
                sorted_ = Routed(expert, gate, self.num_experts)
                yield Delivery(start, stop, kernels, h, sorted_, results, inputs, tokens=row)
            with self.stages("exchange"):
                returned = self.processes.exchange([{"y": results[sender == p]} for p in range(len(received))])
                for (a, b), rows, part in zip(bounds, wanted, returned, strict=True):
                    at, choice = np.nonzero(_within(routed.expert[rows], a, b))
                    _put(y if separate is None else separate.data, rows[at], choice, part["y"])
                self.documents.release()
        if separate is not None:
            _add_in_order(y, separate, routed.expert)

    def _everywhere(self, rows: np.ndarray, own: np.ndarray, h: np.ndarray) -> dict[str, np.ndarray]:
        """These rows of h on every process."""
        at = np.flatnonzero(np.isin(own, rows))
        received = self.processes.exchange([{"row": own[at], "h": h[at]}] * self.processes.count)
        return {name: np.concatenate([r[name] for r in received]) for name in ("row", "h")}


def _within(expert: np.ndarray, start: int, stop: int) -> np.ndarray:
    return (start <= expert) & (expert < stop)


def _put(y: np.ndarray, rows: np.ndarray, choice: np.ndarray, values: np.ndarray) -> None:
    """Values [n, d] of rows and their choices: added to y [tokens, d], or put in y [tokens, choices * d]."""
    d = values.shape[1]
    for c in np.unique(choice):  # In one choice no row occurs twice.
        of = choice == c
        if y.shape[1] == d:
            y[rows[of]] += values[of]
        else:
            y[rows[of], c * d : (c + 1) * d] = values[of]


def _add_in_order(y: np.ndarray, separate: ListBuffer, expert: np.ndarray) -> None:
    """y [tokens, d] += what each choice gave [tokens, choices * d], by rising expert [tokens, choices]."""
    for rows in chunks(np.arange(len(y)), 1 << 12):
        part = slice(rows[0], rows[-1] + 1)
        given = separate.data[part].reshape(len(rows), -1, y.shape[1])
        for choice in np.argsort(expert[part], axis=1, kind="stable").T:
            y[part] += given[np.arange(len(rows)), choice]
        separate.release()
