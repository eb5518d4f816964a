"""Which documents calibrate, chosen among more of them so that every expert gets tokens.

How many tokens of a document go to each expert of each layer, a pass of the unquantized model tells (`look`). Those are
taken that for their length most raise

    - sum over experts of 1 / (1 + how many tokens it has so far)

so that an expert without tokens counts most. Greedy: a document's gain only falls the more there are already, so that
most gains need not be computed again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qmoe_jax import streaming
from qmoe_jax.checkpoints import Checkpoint
from qmoe_jax.models.family import Example
from qmoe_jax.processes import Processes
from qmoe_jax.quantization import statistics
from qmoe_jax.quantization.sharding import expert_sharding
from qmoe_jax.streaming.exchange import RoutedRows
from qmoe_jax.streaming.experts import ExpertGroup

BY = ("routers", "routing")


def choose(tokens: np.ndarray, number: int) -> list[int]:
    """Documents, rising: `number` of them.

    Args:
      tokens: int [documents, experts], how many tokens of each go to each expert of any layer.
      number: how many are wanted; there are as many.
    """
    length = np.maximum(tokens.sum(1), 1)
    covered = np.ones(tokens.shape[1])

    def gain(i: int) -> float:
        return float(np.sum(1 / covered - 1 / (covered + tokens[i])) / length[i])

    queue = [(-gain(i), i) for i in range(len(tokens))]  # gains are at most these
    heapq.heapify(queue)
    chosen: list[int] = []
    while len(chosen) < number:
        i = queue[0][1]
        now = (-gain(i), i)
        if now > min(queue[1:3], default=now):
            heapq.heapreplace(queue, now)
            continue
        heapq.heappop(queue)
        covered += tokens[i]
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
      by: 'routing': what routers choose in a pass of the whole model over all candidates; 'routers': what they choose
        where experts are left out, which reads and computes only what lies between them, and is the nearer to it the
        fewer layers there are before.
      memory: how the pass uses memory and devices.

    Raises:
      ValueError: another `by`, or too few candidates.
    """
    if by not in BY:
        raise ValueError(f"choose_by: found {by!r}, expected one of {', '.join(BY)}.")
    if number > len(candidates):
        raise ValueError(f"candidates: found {len(candidates)}, expected at least the {number} that are to be chosen.")
    tokens = look(checkpoint, candidates, memory, experts=by == "routing").tokens
    return [candidates[i] for i in choose(np.concatenate(list(tokens.values()), axis=1), number)]


class Look(NamedTuple):
    """What a pass of the unquantized model saw.

    Attributes:
      tokens: by sparse layer, int32 [examples, experts], how many of an example's tokens went to each expert.
      peaks: by sparse layer, float32 [experts], see `statistics.output_peaks`; zeros where experts were left out.
    """

    tokens: dict[str, np.ndarray]
    peaks: dict[str, np.ndarray]


def look(
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    memory: streaming.Settings,
    processes: Processes | None = None,
    *,
    experts: bool = True,
) -> Look:
    """Runs the model on examples, as it is or without its experts; every process gets what all have seen."""
    processes = processes or Processes()
    looking = _Looking(checkpoint, examples, processes, experts)
    source: Any = checkpoint if experts else _WithoutExperts(checkpoint)
    how = memory._replace(round_weights=True)
    streaming.run(source, examples, how, quantizer=looking, processes=processes, what="looking at routing")
    return Look(_of_all(looking.tokens, processes, np.sum), _of_all(looking.peaks, processes, np.max))


class _Looking:
    """Sees each group of experts, and leaves it as it is, or out. See `streaming.Quantizer`."""

    def __init__(self, checkpoint: Checkpoint, examples: Sequence[Example], processes: Processes, experts: bool):
        config, self.experts = checkpoint.config, experts
        self.own = processes.share(config.num_experts)
        self.sample: Mapping[str, np.ndarray] = {}
        self.ends = {stream: np.cumsum(n) for stream, n in checkpoint.family.task.lengths(examples).items()}
        shape = (len(examples), config.num_experts)
        self.tokens = {layer: np.zeros(shape, np.int32) for layer in config.sparse_layers}
        self.peaks = {layer: np.zeros(shape[1], np.float32) for layer in config.sparse_layers}

    def begin(self, layer: str, rows: np.ndarray, routed: RoutedRows) -> None:
        pass

    def __call__(self, group: ExpertGroup) -> dict[str, Any] | None:
        ends = self.ends[group.stream]
        for e, rows in zip(range(group.start, group.stop), group.tokens, strict=True):
            whose = np.searchsorted(ends, rows, side="right")
            self.tokens[group.layer][:, e] = np.bincount(whose, minlength=len(ends))
        if not self.experts:
            return None
        samples = [statistics.Samples(rows, np.ones(len(rows), np.float32)) for rows in group.tokens]
        sharding = expert_sharding(len(samples))
        found = statistics.output_peaks(group.expert, group.kernels, group.inputs, samples, sharding)
        self.peaks[group.layer][group.start : group.stop] = found
        return group.kernels

    def finish(self, layer: str) -> None:
        pass


class _WithoutExperts:
    """A checkpoint of which all is there but experts: these are zeros that take no memory."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def stream(self, layers: Sequence[str], group_size: int, how: Any, experts: range) -> Iterator[tuple]:
        for layer in layers:
            shapes = {m: self.specs[name].shape for m, name in self.matrices(layer).items()}
            for start in range(experts.start, experts.stop, group_size):
                stop = min(start + group_size, experts.stop)
                group = {m: (stop - start, *shape[1:]) for m, shape in shapes.items()}
                yield layer, start, stop, {m: np.broadcast_to(np.float32(0), shape) for m, shape in group.items()}


def _of_all(found: Mapping[str, np.ndarray], processes: Processes, combine: Any) -> dict[str, np.ndarray]:
    received = processes.exchange([{n: a.reshape(-1) for n, a in found.items()}] * processes.count)
    return {n: combine([r[n] for r in received], axis=0).astype(a.dtype).reshape(a.shape) for n, a in found.items()}
