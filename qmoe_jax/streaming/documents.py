"""The documents of a streamed pass: which batch, which process and which rows each belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
from jax.typing import DTypeLike

from qmoe_jax.models.family import Batch, Example, Task
from qmoe_jax.processes import Processes
from qmoe_jax.streaming.buffers import ListBuffer, OwnRows


class Documents:
    """Examples, in batches of a few fixed shapes, with each batch's rows in the list buffers.

    Batches are composed of all documents, and each process has some of them: `batches`, and in its list buffers their
    documents' tokens. The list buffers are in memory, or in files below `folder`. Of examples from `first_measured` on
    the loss is wanted: `measured` are batches of these alone, with what takes the place of their indices: -1 for rows
    of other processes too.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        task: Task,
        tokens_per_batch: int,
        folder: str | None,
        processes: Processes,
        first_measured: int = 0,
    ):
        self.examples = examples
        batches = task.batches(examples, tokens_per_batch)
        self.batches: list[Batch] = [batches[i] for i in processes.share(len(batches))]
        self.lengths = task.lengths(examples)
        self.predicted = task.predicted(examples)
        self.own = np.zeros(len(examples), bool)
        for batch in self.batches:
            self.own[batch.indices[batch.indices >= 0]] = True
        self.measured = [(batch.indices, batch) for batch in self.batches]
        if first_measured:  # Shapes of a pass without the others: its programs serve here too.
            together = task.batches(examples[first_measured:], tokens_per_batch)
            own = [(self._own_rows(batch, first_measured), batch) for batch in together]
            self.measured = [(indices, batch) for indices, batch in own if (indices >= 0).any()]
        self._folder = folder
        self._buffers: weakref.WeakSet[ListBuffer] = weakref.WeakSet()

    def _own_rows(self, batch: Batch, first: int) -> np.ndarray:
        """Indices of a batch of the examples from `first` on, -1 for other processes' too."""
        indices = np.where(batch.indices >= 0, batch.indices + first, -1)
        return np.where(np.append(self.own, False)[indices], indices, -1)

    def buffer(self, stream: str, width: int, dtype: DTypeLike) -> ListBuffer:
        buffer = ListBuffer(np.where(self.own, self.lengths[stream], 0), width, dtype, self._folder)
        self._buffers.add(buffer)
        return buffer

    def release(self) -> None:
        """See `ListBuffer.release`; called often, so that few rows are in memory."""
        for buffer in self._buffers:
            buffer.release()

    def rows(self, stream: str) -> np.ndarray:
        """Which row each of this process's would be if one process had all documents: rising."""
        return np.flatnonzero(np.repeat(self.own, self.lengths[stream]))

    def own_rows(self, stream: str, buffer: ListBuffer) -> OwnRows:
        """A buffer's rows among those of all processes."""
        alone = bool(self.own.all())
        return OwnRows(buffer.data, None if alone else self.rows(stream), int(self.lengths[stream].sum()))
