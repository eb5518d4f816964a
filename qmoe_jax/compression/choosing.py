"""Which documents calibrate, chosen among more of them so that every expert gets tokens.

A document has something of each of many cells: of each token id, which is known at once, or of each expert of each
layer, which a pass of the unquantized model tells (`look`). Those are taken that most raise

    sum over cells of log(1 + how often the documents so far have it)

so that what is rare counts most. Greedy is within 1 - 1/e of the best choice, as a document's gain only falls the more
there are already (Nemhauser, Wolsey and Fisher 1978); for the same reason most gains need not be computed again.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qmoe_jax import streaming
from qmoe_jax.checkpoints import Checkpoint
from qmoe_jax.models.family import Example
from qmoe_jax.processes import Processes
from qmoe_jax.quantization import statistics
from qmoe_jax.quantization.sharding import expert_sharding
from qmoe_jax.streaming.experts import ExpertGroup

BY = ("tokens", "routing")


class Has(NamedTuple):
    """What a document has: of each of these cells, int [n], so many, int [n]."""

    cells: np.ndarray
    counts: np.ndarray


def choose(documents: Sequence[Has], number: int) -> list[int]:
    """Which, rising: so many of the documents, of which there are enough."""
    covered = np.zeros(1 + max((int(d.cells.max(initial=0)) for d in documents), default=0), np.int64)

    def gain(i: int) -> float:
        cells, counts = documents[i]
        return float(np.sum(np.log1p(counts / (1 + covered[cells]))))

    queue = [(-gain(i), i) for i in range(len(documents))]  # gains are at most these
    heapq.heapify(queue)
    chosen: list[int] = []
    while len(chosen) < number:
        _, i = queue[0]
        now = (-gain(i), i)
        if len(queue) > 1 and now > min(queue[1:3]):
            heapq.heapreplace(queue, now)
            continue
        heapq.heappop(queue)
        covered[documents[i].cells] += documents[i].counts
        chosen.append(i)
    return sorted(chosen)


def choose_examples(
    checkpoint: Checkpoint, candidates: Sequence[Example], number: int, by: str, memory: streaming.Settings
) -> list[Example]:
    """So many of the candidates, in their order.

    Args:
      checkpoint: the model.
      candidates: more examples than are wanted.
      number: how many are.
      by: 'tokens' covers token ids, which costs nothing; 'routing' the experts themselves, which takes a `look`.
      memory: how a look uses memory and devices.

    Raises:
      ValueError: another `by`, or too few candidates.
    """
    if by not in BY:
        raise ValueError(f"choose_by: found {by!r}, expected one of {', '.join(BY)}.")
    if number > len(candidates):
        raise ValueError(f"candidates: found {len(candidates)}, expected at least the {number} that are to be chosen.")
    has = tokens_of(candidates) if by == "tokens" else look(checkpoint, candidates, memory).of_examples()
    return [candidates[i] for i in choose(has, number)]


def tokens_of(examples: Sequence[Example]) -> list[Has]:
    """Token ids of each example: routing, of early layers above all, goes by them."""
    return [Has(*np.unique(np.concatenate(example), return_counts=True)) for example in examples]


class Look(NamedTuple):
    """What a pass of the unquantized model saw.

    Attributes:
      tokens: by sparse layer, int32 [examples, experts], how many of an example's tokens went to each expert.
      peaks: by sparse layer, float32 [experts], see `super_experts`.
    """

    tokens: dict[str, np.ndarray]
    peaks: dict[str, np.ndarray]

    def of_examples(self) -> list[Has]:
        """For `choose`."""
        rows = np.concatenate(list(self.tokens.values()), axis=1)
        return [Has(np.flatnonzero(row), row[row > 0]) for row in rows]


def look(
    checkpoint: Checkpoint, examples: Sequence[Example], memory: streaming.Settings, processes: Processes | None = None
) -> Look:
    """Runs the model on examples as it is, which takes reading all of it; every process gets what all have seen."""
    processes = processes or Processes()
    looking = _Looking(checkpoint, examples, processes)
    streaming.run(
        checkpoint,
        examples,
        memory._replace(round_weights=True),
        quantizer=looking,
        processes=processes,
        what="looking at experts",
    )
    return Look(_of_all(looking.tokens, processes, np.sum), _of_all(looking.peaks, processes, np.max))


class _Looking:
    """Sees each group of experts, and leaves it as it is. See `streaming.Quantizer`."""

    def __init__(self, checkpoint: Checkpoint, examples: Sequence[Example], processes: Processes):
        config = checkpoint.config
        self.own, self.sample = processes.share(config.num_experts), dict[str, np.ndarray]()
        self.ends = {stream: np.cumsum(n) for stream, n in checkpoint.family.task.lengths(examples).items()}
        shape = (len(examples), config.num_experts)
        self.tokens = {layer: np.zeros(shape, np.int32) for layer in config.sparse_layers}
        self.peaks = {layer: np.zeros(shape[1], np.float32) for layer in config.sparse_layers}

    def __call__(self, group: ExpertGroup) -> Mapping[str, Any]:
        ends, experts = self.ends[group.stream], range(group.start, group.stop)
        for e, rows in zip(experts, group.tokens, strict=True):
            whose = np.searchsorted(ends, rows, side="right")
            self.tokens[group.layer][:, e] = np.bincount(whose, minlength=len(ends))
        samples = [statistics.Samples(rows, np.ones(len(rows), np.float32)) for rows in group.tokens]
        sharding = expert_sharding(len(samples))
        found = statistics.output_peaks(group.expert, group.kernels, group.inputs, samples, sharding)
        self.peaks[group.layer][group.start : group.stop] = found
        return group.kernels

    def finish(self, layer: str) -> None:
        pass


def _of_all(found: dict[str, np.ndarray], processes: Processes, combine: Any) -> dict[str, np.ndarray]:
    received = processes.exchange([{n: a.reshape(-1) for n, a in found.items()}] * processes.count)
    return {n: combine([r[n] for r in received], axis=0).astype(a.dtype).reshape(a.shape) for n, a in found.items()}
