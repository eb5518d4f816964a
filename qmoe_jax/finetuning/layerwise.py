"""Fine-tuning layer by layer, for models that don't fit in memory: the published recipe's streamed pass, with training.

Documents stream through the original and through the compressed model side by side. Before the compressed model's go on
through a layer, what is small in it (norms, router, levels; attention by the switch) is trained so that, from the
compressed model's activations x', it gives what the original layer gives from the original's own, x:

    least mean of |layer'(x') - layer(x)|^2 / |layer(x)|^2    over tokens

so that a layer also makes good what earlier ones have left. With `target` 'compressed' it is layer(x') instead.
In memory are both models' activations, one layer of the compressed model, and a group of the original's experts.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import traverse_util
from jax.typing import ArrayLike

from qmoe_jax import reports, resources, streaming
from qmoe_jax.checkpoints import Checkpoint, CompressedWriter
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.compression.progress import Progress
from qmoe_jax.finetuning.finetune import check_models, destination, identity_of
from qmoe_jax.finetuning.parts import EMBEDDINGS, LEVELS, PARTS, Flat, part_of, placed, rising, trainable
from qmoe_jax.finetuning.training import Settings, make_optimizer, split
from qmoe_jax.lock import locked
from qmoe_jax.models.experts import apply_experts
from qmoe_jax.models.family import Batch, Example, Expert, Layer
from qmoe_jax.processes import Processes
from qmoe_jax.streaming import OwnRows
from qmoe_jax.streaming.forward import X

TARGETS = ("original", "compressed")
ORIGINAL, COMPRESSED, TRAINED = "original", "compressed", "trained"  # what arrays that are committed begin with


def finetune_layers(
    checkpoint: Checkpoint,
    original: Checkpoint,
    examples: Sequence[Example],
    settings: Settings,
    memory: streaming.Settings,
    *,
    output: str | os.PathLike,
    target: str = "original",
    resume: bool = True,
    commit_share: float = 0.03,
    keep_progress: bool = False,
) -> dict[str, Any]:
    """Trains what isn't quantized of one layer at a time; writes a compressed checkpoint. Symbols stay.

    A run that ends before it is through goes on after the last layer that was committed when it is called again.

    Args:
      checkpoint: the compressed model.
      original: the model that it was made from. Of both, a layer is in memory at a time.
      examples: documents, as the family's task has them; some are held out (see `Settings`).
      settings: how; `teacher_top` says nothing here, and what lies outside layers, embeddings and last norms, stays.
        The learning rate rises and falls in every layer.
      memory: of both streamed passes.
      output: directory of the new compressed checkpoint.
      target: 'original' or 'compressed': from whose activations the original layer gives what is aimed at.
      resume: go on from what an interrupted run has committed in `output`; otherwise that is removed.
      commit_share: of the time, at most, for commits.
      keep_progress: leave what was committed in `output`, for the caller to `remove_progress` once all is written.

    Returns:
      The report, as JSON values. By layer, 'before' and 'after': mean of |error|^2 / |output|^2 over tokens of the
      documents held out. 'parameters' trained by part, 'bytes_experts'.

    Raises:
      CheckpointError, ValueError, InUseError, OtherRunError: as `finetune_examples`; also for 'embeddings' among
        the parts, and for a model whose tokens influence each other's routing beyond a document.
    """
    check_models(checkpoint, original)
    if target not in TARGETS:
        raise ValueError(f"target: found {target!r}, expected one of {', '.join(TARGETS)}.")
    if EMBEDDINGS in settings.parts:
        raise ValueError(
            f"parts: {EMBEDDINGS!r} lie outside layers and can't be trained layer by layer; leave them out."
        )
    if why := checkpoint.family.streamed(checkpoint.config, jnp.float32).one_process:
        raise ValueError(f"{checkpoint.path} can't be trained layer by layer: {why}.")
    checkpoint.family.task.check(examples, checkpoint.config.vocab_size)
    identity = identity_of(checkpoint, original, examples, settings)
    identity |= {"layerwise target": target, "layerwise tokens per batch": memory.tokens_per_batch}
    stages = resources.Stages()
    with locked(output):
        progress = Progress(output, identity, resume, share=commit_share)
        told = destination(checkpoint, original, settings, len(examples), layerwise=target)
        kept = None
        if (committed := progress.committed) is not None:
            kept = committed["kept"]
            reports.say(f"{progress.output}: going on after {committed['done']} layers")
        try:
            with CompressedWriter(output, *told, layers=kept) as writer:
                try:
                    run = _Run(checkpoint, original, examples, settings, memory, target, writer, progress, stages)
                    history = run.through()
                    with stages("writing"):
                        writer.finish({n: run.trained.get(n, checkpoint.read(n)) for n in checkpoint.specs})
                    written = sum(layer["bytes"] for layer in writer.layers.values())
                except BaseException:
                    stored = progress.stored()
                    writer.keep(stored["kept"] if stored else {})
                    raise
        except BaseException as e:
            if progress.committed:
                e.add_note(f"{output}: what was trained so far is committed; run the same command to go on")
            raise
        if not keep_progress:
            progress.remove()
    return {
        "layers": history,
        "parameters": run.parameters,
        "bytes_experts": {
            "before": sum(m.nbytes for layer in checkpoint.expert_sizes.values() for m in layer.values()),
            "after": written,
        },
        "documents": {"trained_on": len(run.trained_on), "held_out": len(run.held_out)},
        "settings": dataclasses.asdict(settings) | {"layerwise": target},
        "seconds": stages.report(),
        "peak_rss_bytes": resources.peak_rss_bytes(),
    }


# --- One layer -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """What is compiled of a layer: the same for layers that differ in their weights alone.

    Attributes:
      attend, arguments: `Layer.attend` is attend(*arguments, ...).
      expert: what its experts are; None: it has none.
      kernels: of each of their matrices and biases, what it is called below the layer's name.
    """

    attend: Callable[..., Any]
    arguments: tuple[Any, ...]
    expert: Expert | None
    kernels: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, layer: Layer, family: Any) -> Step:
        expert = layer.expert
        given: Any = layer.attend
        attend, arguments = given, ()
        if isinstance(given, functools.partial) and not given.keywords:
            attend, arguments = given.func, given.args
        names = () if expert is None else (*expert.matrices, *expert.biases)
        below = lambda name: family.expert_parameter(layer.name, name).removeprefix(f"{layer.name}/")
        return cls(attend, arguments, expert, tuple((name, below(name)) for name in names))


def output_of(step: Step, params: Flat, shared: Any, inputs: tuple) -> jax.Array:
    """The layer's output [rows, length, d_model].

    Args:
      step: what it does.
      params: all of its parameters, by their names below the layer's.
      shared, inputs: as `Layer.attend` takes them.
    """
    others = {name: value for name, value in params.items() if not isinstance(value, CompressedExperts)}
    x, h, routing = step.attend(*step.arguments, traverse_util.unflatten_dict(others, sep="/"), shared, *inputs)
    if step.expert is None:
        return x
    by_token = lambda a: a.reshape(-1, a.shape[-1])
    kernels = {name: params[below] for name, below in step.kernels}
    y = apply_experts(step.expert, by_token(h), jax.tree.map(by_token, routing), kernels)
    return x + y.reshape(x.shape).astype(x.dtype)


forward = functools.partial(jax.jit, static_argnums=0)(output_of)


def total_error(
    step: Step, params: Flat, trained: Flat, shared: Any, inputs: tuple, target: jax.Array, real: jax.Array
) -> jax.Array:
    """Sum over the tokens that are `real` [rows, length] of |output - target|^2 / |target|^2.

    `trained` takes the place of what is called so in `params`.
    """
    out = output_of(step, placed(params, trained), shared, inputs).astype(jnp.float32)
    target = target.astype(jnp.float32)
    size = jnp.sum(jnp.square(target), -1)
    error = jnp.sum(jnp.square(out - target), -1) / jnp.where(real & (size > 0), size, 1.0)
    return jnp.sum(error, where=real)


measure = functools.partial(jax.jit, static_argnums=0)(total_error)


@functools.partial(jax.jit, static_argnums=0)
def gradients(
    step: Step,
    params: Flat,
    trained: Flat,
    scale: ArrayLike,
    shared: Any,
    inputs: tuple,
    target: jax.Array,
    real: jax.Array,
) -> tuple[jax.Array, Flat]:
    """Mean error of a batch's tokens times `scale`, and its gradient."""
    tokens = jnp.maximum(jnp.sum(real), 1)
    mean = lambda trained: scale * total_error(step, params, trained, shared, inputs, target, real) / tokens
    return jax.value_and_grad(mean)(trained)


@functools.partial(jax.jit, static_argnums=0)
def update(how: tuple, slope: Flat, state: Any, trained: Flat) -> tuple[Flat, Any]:
    """A step of the optimizer that `make_optimizer(*how)` gives: what is trained, and its state."""
    updates, state = make_optimizer(*how).update(slope, state, trained)
    return optax.apply_updates(trained, updates), state


# --- The pass --------------------------------------------------------------------------------------------------------


class _Commits:
    """What is committed of one of the two passes, under names of its own (see `streaming.Commits`)."""

    def __init__(self, progress: Progress, which: str, done: int):
        self.progress, self.which, self.done = progress, which, done
        self.arrays: dict[str, OwnRows] = {}

    def _name(self, name: str, done: int) -> str:
        # One for each number of layers: what is called otherwise than 'x' is written once.
        return f"{self.which}-{X}-{done}" if name == X else f"{self.which}-{name}"

    def fill(self, name: str, array: OwnRows) -> None:
        self.progress.fill(self._name(name, self.done), array)

    def commit(self, done: int, arrays: Mapping[str, OwnRows]) -> None:
        self.arrays = {self._name(name, done): array for name, array in arrays.items()}


class _Run:
    """What is given, and how far it is: `trained` by whole name, rounded to bfloat16, but for experts' levels."""

    def __init__(self, checkpoint, original, examples, settings, memory, target, writer, progress, stages):
        self.checkpoint, self.examples, self.settings, self.target = checkpoint, examples, settings, target
        self.writer, self.progress, self.stages = writer, progress, stages
        self.task, self.family = checkpoint.family.task, checkpoint.family
        self.trained_on, self.held_out = split(len(examples), settings)
        # A layer of the compressed model is whole; of the original, experts pass group by group.
        ours = memory._replace(experts_per_group=checkpoint.config.num_experts, round_weights=False)
        theirs = memory._replace(round_weights=True)
        started = lambda of, how, what: streaming.Pass(of, examples, how, None, Processes(), stages, what, 0)
        self.theirs, self.ours = started(original, theirs, "original model"), started(checkpoint, ours, "fine-tuning")
        self.trained: dict[str, np.ndarray] = {}
        self.parameters = {part: 0 for part in PARTS if part in settings.parts}

    def through(self) -> list[dict[str, Any]]:
        """Trains and writes all layers from where `progress` is; what became of each."""
        committed = self.progress.committed or {"done": 0, "history": [], "trained": {}, "parameters": {}}
        done, history = committed["done"], list(committed["history"])
        self.parameters |= committed["parameters"]
        self._restore(committed["trained"])
        commits = [_Commits(self.progress, which, done) for which in (ORIGINAL, COMPRESSED)]
        with self.theirs, self.ours:
            for forward, commit in zip((self.theirs, self.ours), commits, strict=True):
                forward.resume(commit)
            layers = list(zip(self.theirs.model.layers, self.ours.model.layers, strict=True))
            for their_layer, layer in layers[done:]:
                self._aim(their_layer, layer)
                history.append({"layer": layer.name, **self._layer(layer)})
                done += 1
                resources.give_freed_memory_back()
                self._commit(done, history, commits)
        return history

    def _aim(self, their_layer: Layer, layer: Layer) -> None:
        """The original's activations after the layer, which are aimed at."""
        x, ours = (forward.activations(layer.stream) for forward in (self.theirs, self.ours))
        if self.target == COMPRESSED:
            for stream in (layer.stream, *layer.context):
                self.theirs.x[stream].data[:] = self.ours.x[stream].data
        assert x.data.shape == ours.data.shape
        self.theirs.advance(their_layer)

    def _layer(self, layer: Layer) -> dict[str, Any]:
        """Trains one layer, lets the compressed model's activations through, and writes its experts."""
        step, prefix = Step.of(layer, self.family), f"{layer.name}/"
        flat = traverse_util.flatten_dict(self.ours.read(prefix), sep="/")
        matrices: dict[str, CompressedExperts] = {}
        if layer.expert is not None:
            for _, _, kernels in self.ours.groups(layer):
                matrices = {m: kernels[m] for m in layer.expert.matrices}
        whole = {prefix + name: jnp.asarray(value) for name, value in flat.items()}
        whole |= {self.family.expert_parameter(layer.name, m): experts for m, experts in matrices.items()}
        start = trainable(whole, self.checkpoint.config, self.settings.parts)
        for name, value in start.items():
            part = LEVELS if name not in self.checkpoint.specs else part_of(name, value.shape, self.checkpoint.config)
            self.parameters[part] += value.size
        params = {name.removeprefix(prefix): value for name, value in whole.items()}
        short = {name.removeprefix(prefix): value for name, value in start.items()}
        shared = self.ours.params(layer.shared)
        with self.stages("training"):
            best, found = self._train(layer, step, params, short, shared) if short else (short, {})
        best = {name: rising(v) if isinstance(params[name], CompressedExperts) else v for name, v in best.items()}
        now = placed(params, best)
        with self.stages("compressed model"):
            self._let_through(layer, step, now, shared)
        for name in best:
            if not isinstance(now[name], CompressedExperts):
                self.trained[prefix + name] = np.asarray(now[name], ml_dtypes.bfloat16)
        if matrices:
            self.ours.step()  # For its one group of experts.
            with self.stages("writing"):
                below = dict(step.kernels)
                written = {m: now[below[m]] for m in matrices}
                for experts in written.values():
                    experts.validate()
                self.writer.write_layer(layer.name, written)
        return found

    def _inputs(self, layer: Layer, batch: Batch, indices: np.ndarray) -> tuple[np.ndarray, tuple]:
        """Rows of the list buffers, [rows, length], and what the layer gets, for a batch of these documents."""
        examples = np.where(batch.indices >= 0, indices[batch.indices], -1)
        at = lambda stream: self.ours.x[stream].positions(examples, batch.length(stream))
        context = {stream: self.ours.x[stream].get(at(stream)) for stream in layer.context}
        return at(layer.stream), (self.ours.x[layer.stream].get(at(layer.stream)), context, tuple(batch.tokens))

    def _batches(self, indices: np.ndarray, size: int) -> Sequence[Batch]:
        return self.task.batches([self.examples[i] for i in indices], size)

    def _let_through(self, layer: Layer, step: Step, params: Flat, shared: Any) -> None:
        x, everyone = self.ours.x[layer.stream], np.arange(len(self.examples))
        for batch in self._batches(everyone, self.ours.settings.tokens_per_batch):
            rows, inputs = self._inputs(layer, batch, everyone)
            out = np.asarray(forward(step, params, shared, inputs))
            x.put(rows, out)
            x.check_finite(layer.name, rows, out)
            self.ours.step()

    def _train(self, layer: Layer, step: Step, params: Flat, trained: Flat, shared: Any) -> tuple[Flat, dict[str, Any]]:
        """The best state after an epoch, and errors of the documents held out before and after."""
        s, target = self.settings, self.theirs.x[layer.stream]

        def batch_of(batch: Batch, indices: np.ndarray) -> tuple:
            rows, inputs = self._inputs(layer, batch, indices)
            return shared, inputs, target.get(rows), rows < len(target.data)

        def error(trained: Flat) -> float:
            total = tokens = 0.0
            for batch in self._batches(self.held_out, s.tokens_per_batch):
                arguments = batch_of(batch, self.held_out)
                total += float(measure(step, params, trained, *arguments))
                tokens += arguments[-1].sum()
            return total / tokens

        errors = [error(trained)]
        best = trained
        if errors[0] == 0:
            return best, {"before": 0.0, "after": 0.0}
        steps = len(self._batches(self.trained_on, s.tokens_per_batch)) * s.epochs
        levels = frozenset(name for name, value in params.items() if isinstance(value, CompressedExperts))
        how = (s, levels, steps)
        state = make_optimizer(*how).init(trained)
        scale = 1 / errors[0]  # So that clipping means the same for every layer.
        for epoch in range(s.epochs):
            rng = np.random.RandomState([s.seed, epoch])
            order = rng.permutation(self.trained_on)
            batches = self._batches(order, s.tokens_per_batch)
            for i in rng.permutation(len(batches)):
                _, slope = gradients(step, params, trained, scale, *batch_of(batches[i], order))
                trained, state = update(how, slope, state, trained)
            errors.append(error(trained))
            if not np.isfinite(errors[-1]):
                raise ValueError(
                    f"{layer.name}: after epoch {epoch + 1} the error is {errors[-1]}: lower the learning rate "
                    f"({s.learning_rate:g}), or look at the checkpoint."
                )
            if errors[-1] <= min(errors):
                best = trained
            if len(errors) - 1 - int(np.argmin(errors)) >= s.patience:
                break
        reports.say(f"{layer.name}: error {errors[0]:.5f} -> {min(errors):.5f}")
        return best, {"before": errors[0], "after": min(errors)}

    # --- What is committed -------------------------------------------------------------------------------------------

    def _commit(self, done: int, history: list, commits: Sequence[_Commits]) -> None:
        arrays: dict[str, OwnRows] = {}
        for forward, commit in zip((self.theirs, self.ours), commits, strict=True):
            forward.commit(commit, done)
            arrays |= commit.arrays
        if not self.progress.due(arrays):
            return
        files = {}
        for name, value in self.trained.items():
            file = f"{TRAINED}-{name.replace('/', '.')}"
            files[name] = [file, list(value.shape)]
            arrays[file] = OwnRows(value.astype(np.float32).reshape(-1, 1), None, value.size)
        state = {
            "done": done,
            "history": history,
            "kept": self.writer.layers,
            "trained": files,
            "parameters": self.parameters,
        }
        self.progress.commit(state, arrays)

    def _restore(self, files: Mapping[str, Any]) -> None:
        for name, (file, shape) in files.items():
            values = np.zeros((int(np.prod(shape)), 1), np.float32)
            self.progress.fill(file, OwnRows(values, None, len(values)))
            self.trained[name] = values.reshape(shape).astype(ml_dtypes.bfloat16)
