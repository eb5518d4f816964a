"""A forward pass over all documents at once, layer by layer, so that one layer's weights are in memory at a time.

The activations of all documents lie end to end in one host array (the paper's list buffer, section 3.2). A layer's
attention runs batch by batch; its experts then run group by group, each on all tokens routed to it. `run` is the loop;
compression is the same loop with a quantizer, which replaces each group of experts by its quantized version.

Several processes share the documents, whole batches each, and the experts of every layer (`exchange`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from qmoe_jax import reports, resources
from qmoe_jax.checkpoints.checkpoint import Checkpoint
from qmoe_jax.checkpoints.checks import check_finite
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.models.expert_parallel import place_batch, replicate
from qmoe_jax.models.family import Example, Layer, Stream
from qmoe_jax.processes import Processes
from qmoe_jax.streaming.buffers import ListBuffer, OwnRows
from qmoe_jax.streaming.documents import Documents
from qmoe_jax.streaming.exchange import Alone, Exchange, RoutedRows, Several
from qmoe_jax.streaming.experts import Delivery, ExpertGroup, add_experts, chunks
from qmoe_jax.streaming.losses import DocumentLosses
from qmoe_jax.streaming.settings import Settings

X = "x"  # what the activations of the stream that is under way are called where they are committed


class Quantizer(Protocol):
    """Replaces experts while documents stream through them.

    Attributes:
      own: the experts of every layer that this process has.
      sample: by stream, rows that every group's inputs have beside those of its own tokens, rising.
    """

    own: range
    sample: Mapping[str, np.ndarray]

    def begin(self, layer: str, rows: np.ndarray, routed: RoutedRows) -> None:
        """Before a layer's first group: what is routed where of this process's tokens.

        Args:
          layer: its name.
          rows: int [tokens], where each is in the list buffers' order of all processes.
          routed: of these tokens.
        """
        ...

    def __call__(self, group: ExpertGroup) -> dict[str, Any] | None:
        """The kernels that are used in place of the group's; None: its outputs are left out."""
        ...

    def finish(self, layer: str) -> None:
        """After a layer's last group, by all processes together: they may have different numbers of groups."""
        ...


class Commits(Protocol):
    """Where a pass that is interrupted goes on.

    Attributes:
      done: how many layers are done already.
    """

    done: int

    def fill(self, name: str, array: OwnRows) -> None:
        """Reads this process's rows of an array that was committed."""
        ...

    def commit(self, done: int, arrays: Mapping[str, OwnRows]) -> None:
        """So many layers are done: 'x' are the activations after them; those of streams that have ended, by name."""
        ...


def run(
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    settings: Settings,
    *,
    quantizer: Quantizer | None = None,
    commits: Commits | None = None,
    processes: Processes | None = None,
    stages: resources.Stages | None = None,
    what: str = "evaluating",
    first_measured: int = 0,
) -> DocumentLosses:
    """Losses of examples, one layer in memory at a time.

    Args:
      checkpoint: the model, read once from front to back.
      examples: as the family's task has them.
      settings: memory and precision.
      quantizer: called for each group of experts; returns the kernels that are used in its place.
      commits: tells where to go on, and is told after each layer with experts; None: nothing is kept.
      processes: of the run; None: `jax.distributed`'s. Each calls this with the same arguments, and gets all losses.
      stages: where seconds are counted.
      what: the progress bar's label.
      first_measured: losses are those of examples from here on; the ones before, which calibrate, have none.

    Raises:
      CheckpointError: something could not be read, or is NaN or Inf.
      ValueError: settings below one; no documents, an empty one, or ids that the embedding doesn't have; activations
        become NaN or Inf (names layer and document).
    """
    settings.check()
    checkpoint.family.task.check(examples, checkpoint.config.vocab_size)
    with Pass(checkpoint, examples, settings, quantizer, processes, stages, what, first_measured) as forward:
        layers = forward.model.layers
        done = forward.resume(commits)
        for layer in layers[done:]:
            forward.advance(layer, quantizer)
            done += 1
            resources.give_freed_memory_back()
            if commits is not None and layer.expert is not None:
                forward.commit(commits, done)
        return forward.losses()


class Pass:
    """The state that the steps of a streamed pass share, and these steps; arguments as `run` has them.

    As a context manager: `resume`, then `advance` for each of `model.layers` that isn't done.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        examples: Sequence[Example],
        settings: Settings,
        quantizer: Quantizer | None,
        processes: Processes | None,
        stages: resources.Stages | None,
        what: str,
        first_measured: int,
    ):
        self.checkpoint, self.settings = checkpoint, settings
        self.config, self.processes = checkpoint.config, processes or Processes()
        self.stages = stages or resources.Stages()
        self.model = checkpoint.family.streamed(self.config, settings.dtype)
        task, memory = checkpoint.family.task, (settings.tokens_per_batch, settings.activations)
        self.documents = Documents(examples, task, *memory, self.processes, first_measured)
        self.first_measured = first_measured
        self.own = self.processes.share(self.config.num_experts) if quantizer is None else quantizer.own
        self.exchange: Exchange = Alone(self.config.num_experts)
        if self.processes.count > 1:
            sample = {} if quantizer is None else quantizer.sample
            self.exchange = Several(self.processes, self.documents, self.config.num_experts, sample, self.stages)
        self.x: dict[str, ListBuffer] = {}  # by stream; all but the last have ended
        self.kept: dict[str, Any] = {}  # parameters beside those of layers, by prefix
        self.what, self.context = what, contextlib.ExitStack()

    def __enter__(self) -> Pass:
        groups = -(-len(self.own) // self.settings.experts_per_group)
        self.groups_per_layer, batches = groups, len(self.documents.batches)
        steps = sum(batches + (groups if layer.expert else 0) for layer in self.model.layers)
        steps += len(self.documents.measured)
        self.bar = self.context.enter_context(reports.progress(steps, self.what, "step", shown=self.processes.first))
        return self

    def __exit__(self, *raised) -> None:
        self.context.__exit__(*raised)

    def step(self, steps: int = 1) -> None:
        self.bar.update(steps)
        self.documents.release()

    # --- a layer ------------------------------------------------------------------------------------------------------

    def advance(self, layer: Layer, quantizer: Quantizer | None = None) -> None:
        """Activations of the layer's stream go through it; layers come in order."""
        x = self.activations(layer.stream)
        routed = self.attend(layer, x)
        if routed is not None:
            if quantizer is not None:
                quantizer.begin(layer.name, self.documents.rows(layer.stream), routed)
            y = self.sums(layer, x)
            for delivery in self.deliveries(layer, routed, y):
                group: dict[str, Any] | None = delivery.kernels
                if quantizer is not None:
                    assert layer.expert is not None  # Something is routed to it.
                    group = quantizer(delivery.group(layer.name, layer.stream, layer.expert))
                if group is not None:
                    self.add_experts(layer, delivery, group)
                del delivery, group  # Not kept while the next ones are read.
            if quantizer is not None:
                quantizer.finish(layer.name)
            self.finish(layer, x, y)

    # --- weights ------------------------------------------------------------------------------------------------------

    def read(self, prefix: str) -> dict[str, Any]:
        """Parameters below a prefix, experts left out, checked, and rounded to bfloat16 where that is asked for."""

        def weights(path, value):
            check_finite(prefix + "/".join(k.key for k in path), value)
            return value.astype(ml_dtypes.bfloat16) if self.settings.round_weights else value

        with self.stages("reading"):
            return jax.tree_util.tree_map_with_path(weights, self.checkpoint.params(prefix))

    def params(self, prefixes: Sequence[str]) -> dict[str, Any]:
        """Parameters below some prefixes, nested, by their whole names; they stay in memory."""
        flat: dict[str, Any] = {}
        for prefix in prefixes:
            if prefix not in self.kept:
                self.kept[prefix] = self.read(prefix)
            flat |= {prefix + n: v for n, v in traverse_util.flatten_dict(self.kept[prefix], sep="/").items()}
        return traverse_util.unflatten_dict(flat, sep="/")

    def groups(self, layer: Layer) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """The layer's groups of this process's experts: start, stop, kernels."""
        done = self.own.start
        family, biases = self.checkpoint.family, layer.expert.biases if layer.expert else ()
        names = {bias: family.expert_parameter(layer.name, bias) for bias in biases}
        while done < self.own.stop:
            with self.stages("reading"):  # What isn't done in the background already.
                found, start, stop, kernels = next(self.stream, ("nothing", 0, 0, {}))
                wanted = range(max(start, self.own.start), min(stop, self.own.stop))
                kernels = {m: _cut(k, start, wanted.start, wanted.stop) for m, k in kernels.items()}
                for bias, name in names.items():
                    kernels[bias] = self.checkpoint.read(name, (slice(wanted.start, wanted.stop),))
            if (found, wanted.start) != (layer.name, done):
                raise RuntimeError(
                    f"{layer.name}: experts from {done} on were expected, but {found}, {start} came next."
                )
            done = wanted.stop
            yield wanted.start, wanted.stop, kernels
            del kernels

    # --- activations --------------------------------------------------------------------------------------------------

    def resume(self, commits: Commits | None) -> int:
        """Reads what was committed, and begins to read experts; how many layers are done."""
        done = 0 if commits is None else commits.done
        if commits is not None and done:
            under_way = self.model.layers[done - 1].stream
            for stream in self.model.streams:
                self.x[stream.name] = self.buffer(stream.name)
                last = stream.name == under_way
                commits.fill(X if last else stream.name, self.documents.own_rows(stream.name, self.x[stream.name]))
                if last:
                    break
        left = [layer.name for layer in self.model.layers[done:] if layer.expert]
        s = self.settings
        groups = self.checkpoint.stream(left, s.experts_per_group, s.reading, self.own)
        self.stream = self.context.enter_context(contextlib.closing(groups))
        for layer in self.model.layers[:done]:
            self.bar.update(len(self.documents.batches) + (self.groups_per_layer if layer.expert else 0))
        return done

    def buffer(self, stream: str, width: int | None = None, dtype: Any = None) -> ListBuffer:
        return self.documents.buffer(stream, width or self.config.d_model, dtype or self.settings.dtype)

    def activations(self, stream: str) -> ListBuffer:
        """Those of a stream, which begins when its first layer comes; the one before then ends."""
        if stream not in self.x:
            ahead = {s.name: s for s in self.model.streams}
            if self.x:
                self.end(ahead[list(self.x)[-1]])
            self.x[stream] = self.begin(ahead[stream])
        return self.x[stream]

    def begin(self, stream: Stream) -> ListBuffer:
        x, params = self.buffer(stream.name), self.params(stream.begins_with)
        for i in np.flatnonzero(self.documents.own):
            x.data[x.offsets[i] : x.offsets[i + 1]] = stream.begins(params, self.documents.examples[i])
            if i % 1024 == 0:
                x.release()
        return x

    def end(self, stream: Stream) -> None:
        if stream.ends is None:
            return
        x, params = self.x[stream.name], self.params(stream.ends_with)
        for batch in self.documents.batches:
            positions = x.positions(batch.indices, batch.length(stream.name))
            x.put(positions, np.asarray(stream.ends(params, x.get(positions))))
            x.release()

    def attend(self, layer: Layer, x: ListBuffer) -> RoutedRows | None:
        """x = attend(x), batch by batch; where there are experts, what is to go through them."""
        params, shared = replicate(self.read(f"{layer.name}/"), self.settings.mesh), self.params(layer.shared)
        routed: tuple[ListBuffer, ...] = ()
        if layer.expert is not None:
            routed = (
                self.buffer(layer.stream),
                self.buffer(layer.stream, layer.choices, np.int32),
                self.buffer(layer.stream, layer.choices, np.float32),
            )
        for batch in self.documents.batches:
            with self.stages("attention"):
                positions = x.positions(batch.indices, batch.length(layer.stream))
                context = {s: self.x[s].get(self.x[s].positions(batch.indices, batch.length(s))) for s in layer.context}
                inputs = place_batch((x.get(positions), context, tuple(batch.tokens)), self.settings.mesh)
                new_x, new_h, routing = layer.attend(params, shared, *inputs)
                x.put(positions, new_x)
                x.check_finite(layer.name, positions, np.asarray(new_x))
                if routed:
                    assert routing is not None
                    for buffer, values in zip(routed, (new_h, routing.expert, routing.gate), strict=True):
                        buffer.put(positions, values)
            self.step()
        if not routed:
            return None
        h, expert, gate = (buffer.data for buffer in routed)
        return RoutedRows(layer.stream, h, expert, gate, routed)

    # --- experts ------------------------------------------------------------------------------------------------------

    def sums(self, layer: Layer, x: ListBuffer) -> ListBuffer:
        """Where experts' outputs are added up: x itself, or, where tokens have several choices, a buffer of its own.

        Choices are added to each other, by rising expert, before they are to x.
        """
        return x if layer.choices == 1 else self.buffer(layer.stream)

    def deliveries(self, layer: Layer, routed: RoutedRows, y: ListBuffer) -> Iterator[Delivery]:
        return self.exchange.deliveries(self.groups(layer), routed, y.data)

    def add_experts(self, layer: Layer, delivery: Delivery, kernels: dict[str, Any]) -> None:
        assert layer.expert is not None
        with self.stages("experts"):
            add_experts(delivery, layer.expert, kernels, self.settings)
        self.step(-(-(delivery.stop - delivery.start) // self.settings.experts_per_group))

    def finish(self, layer: Layer, x: ListBuffer, y: ListBuffer) -> None:
        """x with all of its experts' outputs, checked."""
        if y is not x:
            x.data[:] += y.data
        with self.stages("experts"):
            for rows in chunks(np.arange(len(x.data)), 1 << 16):
                x.check_finite(layer.name, rows, x.data[rows[0] : rows[-1] + 1])
                x.release()

    def commit(self, commits: Commits, done: int) -> None:
        with self.stages("committing"):
            rows = {name: self.documents.own_rows(name, x) for name, x in self.x.items()}
            commits.commit(done, {X if name == list(rows)[-1] else name: r for name, r in rows.items()})

    # --- loss ---------------------------------------------------------------------------------------------------------

    def losses(self) -> DocumentLosses:
        stream = self.model.streams[-1].name
        x, params = self.activations(stream), jax.device_put(self.params(self.model.losses_with))
        total = np.zeros(len(self.documents.examples))
        for indices, batch in self.documents.measured:
            with self.stages("loss"):
                positions = x.positions(indices, batch.length(stream))
                loss = self.model.losses(params, x.get(positions), tuple(batch.tokens))
                real = indices >= 0
                total[indices[real]] = np.asarray(loss, np.float64)[real]
            self.step()
        total = np.sum(self.processes.gather(total.tolist()), axis=0)  # All but one of these are zero.
        if len(bad := np.flatnonzero(~np.isfinite(total))):
            raise ValueError(
                f"The loss of document {bad[0]} is {total[bad[0]]}, of {len(bad)} of {len(total)} documents it is so: "
                "logits are NaN or Inf, as a parameter after the last layer is far too large. Look at the checkpoint."
            )
        return DocumentLosses(*(of[self.first_measured :] for of in (total, self.documents.predicted)))


def _cut(kernel, first: int, start: int, stop: int):
    """Experts start:stop of a kernel that begins with expert `first`."""
    if stop - start == kernel.shape[0]:
        return kernel
    start, stop = start - first, stop - first
    return kernel.take(start, stop) if isinstance(kernel, CompressedExperts) else kernel[start:stop]
