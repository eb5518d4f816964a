"""Training towards the original model's predictions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.finetuning import teacher
from qmoe_jax.finetuning.parts import ATTENTION, LEVELS, NORMS, ROUTERS, Flat, check_parts, with_trained
from qmoe_jax.finetuning.teacher import Predictions, Targets
from qmoe_jax.models.family import Batch, Example, Task


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to fine-tune.

    Attributes:
      parts: what is trained, of `parts.PARTS`.
      learning_rate: of Adam, the largest; it rises over the first `warmup` of all steps, then falls as a cosine to 0.
      levels_learning_rate: of levels, relative to `learning_rate`.
      warmup: share of steps.
      epochs: over the documents that aren't held out.
      tokens_per_batch: most tokens of a batch, with padding.
      clip: largest norm of all gradients of a step together.
      held_out: share of the documents that training doesn't see, and that say which state is the best.
      patience: so many epochs without a better state end it.
      teacher_top: of each prediction of the original model, the likeliest tokens that are kept one by one.
      seed: of the order of documents, and of which are held out.
    """

    parts: tuple[str, ...] = (NORMS, ROUTERS, ATTENTION, LEVELS)
    learning_rate: float = 2e-4
    levels_learning_rate: float = 1.0
    warmup: float = 0.1
    epochs: int = 6
    tokens_per_batch: int = 2_048
    clip: float = 1.0
    held_out: float = 0.1
    patience: int = 2
    teacher_top: int = 256
    seed: int = 0

    def __post_init__(self):
        check_parts(self.parts)
        for name in ("epochs", "tokens_per_batch", "patience", "teacher_top"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1.")
        for name in ("learning_rate", "levels_learning_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a positive number.")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup: found {self.warmup}, expected a share, 0 to 1.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: found {self.held_out}, expected a share between 0 and 1.")


class Documents(NamedTuple):
    """Examples with what the original model predicts."""

    task: Task
    examples: Sequence[Example]
    predictions: Predictions

    def some(self, indices: np.ndarray, tokens_per_batch: int) -> Sequence[Batch]:
        """Batches of these examples; documents of like length meet by their order."""
        return self.task.batches([self.examples[i] for i in indices], tokens_per_batch)

    def of(self, batch: Batch, indices: np.ndarray) -> tuple[tuple[np.ndarray, ...], Targets]:
        """Inputs of the model, and targets, for a batch of `some(indices)`."""
        length = batch.tokens[-1].shape[1]  # of the stream that ends in logits
        examples = np.where(batch.indices >= 0, indices[batch.indices], -1)
        rows, real = teacher.positions(self.task.predicted(self.examples), examples, length)
        log_p, tokens = (array[rows] for array in self.predictions)
        return self.task.inputs(batch.tokens), Targets(log_p, tokens, real)


def split(number: int, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Documents that are trained on, and those that are held out: their indices. Raises ValueError for too few."""
    order = np.random.RandomState(settings.seed).permutation(number)
    held_out = max(1, round(settings.held_out * number))
    if number - held_out < 1:
        raise ValueError(f"{number} documents, of which {held_out} are held out: give more calibration documents.")
    return order[held_out:], np.sort(order[:held_out])


def make_optimizer(settings: Settings, names_of_levels: Collection[str], steps: int) -> optax.GradientTransformation:
    """Adam on clipped gradients, with the rate that `Settings` describes; parameters are dicts by name."""

    def adam(rate: float) -> optax.GradientTransformation:
        warmup = round(settings.warmup * steps)
        return optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(steps, warmup + 1)), b2=0.99)

    rates = {LEVELS: settings.learning_rate * settings.levels_learning_rate, "others": settings.learning_rate}
    kind = lambda params: {name: LEVELS if name in names_of_levels else "others" for name in params}
    by_kind = optax.multi_transform({name: adam(rate) for name, rate in rates.items()}, kind)
    return optax.chain(optax.clip_by_global_norm(settings.clip), by_kind)


def total_divergence(
    model: Any, params: Flat, trained: Mapping[str, jax.Array], inputs: tuple, targets: Targets
) -> jax.Array:
    """Summed KL(teacher || model) of a batch, in nats; differentiable in `trained`."""
    logits = model.apply({"params": with_trained(params, trained)}, *inputs)
    return jnp.sum(teacher.divergence(logits, targets.log_p, targets.tokens), where=targets.real)


@functools.partial(jax.jit, static_argnums=0)
def gradients(
    model: Any, params: Flat, trained: dict[str, jax.Array], inputs: tuple, targets: Targets
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean divergence per predicted token of a batch, and its gradient."""
    mean = lambda trained: total_divergence(model, params, trained, inputs, targets) / jnp.sum(targets.real)
    return jax.value_and_grad(mean)(trained)


measure = functools.partial(jax.jit, static_argnums=0)(total_divergence)


class State(NamedTuple):
    """Where training is.

    Attributes:
      trained, optimizer: parameters by name, and Adam's moments.
      best: of all states after an epoch, that with the least divergence on the documents held out.
      epoch, batch: how many epochs are through, and batches of the present one.
      steps: in all.
      total: divergence of the present epoch's batches, added up.
      history: of the start and of each epoch, mean divergence per predicted token 'held_out', and 'trained_on'.
    """

    trained: Any
    optimizer: Any
    best: Any
    epoch: int
    batch: int
    steps: int
    total: float
    history: tuple[dict[str, Any], ...]

    def _arrays(self) -> Any:
        return self.trained, self.optimizer, self.best

    def size(self) -> int:
        """Numbers that `values` has."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._arrays()))

    def values(self) -> np.ndarray:
        """All arrays end to end, float32 (counts of steps are exact in it)."""
        return np.concatenate([np.asarray(leaf, np.float32).reshape(-1) for leaf in jax.tree.leaves(self._arrays())])

    def told(self) -> dict[str, Any]:
        """All else, as JSON values."""
        return {name: getattr(self, name) for name in ("epoch", "batch", "steps", "total", "history")}

    def restored(self, told: Mapping[str, Any], values: np.ndarray) -> State:
        """The state that `told` and `values` are of; this one says what is where."""
        leaves, tree = jax.tree.flatten(self._arrays())
        parts = np.split(values, np.cumsum([leaf.size for leaf in leaves])[:-1])
        arrays = [jnp.asarray(p.reshape(leaf.shape), leaf.dtype) for p, leaf in zip(parts, leaves, strict=True)]
        trained, optimizer, best = jax.tree.unflatten(tree, arrays)
        return State(trained, optimizer, best, **{**told, "history": tuple(told["history"])})


class Run:
    """Training of one model.

    Args:
      model: the Flax module.
      params: of the compressed model, by name.
      documents: all.
      trained_on, held_out: which of them are what.
      settings: how.
    """

    def __init__(
        self,
        model: Any,
        params: Flat,
        documents: Documents,
        trained_on: np.ndarray,
        held_out: np.ndarray,
        settings: Settings,
    ):
        self.model, self.params, self.documents, self.settings = model, params, documents, settings
        self.trained_on, self.held_out = trained_on, held_out
        self.total_steps = len(documents.some(trained_on, settings.tokens_per_batch)) * settings.epochs
        levels = {name for name, value in params.items() if isinstance(value, CompressedExperts)}
        self.optimizer = make_optimizer(settings, levels, self.total_steps)
        self._update = jax.jit(self._updated)

    def _updated(self, gradients, optimizer, trained):
        updates, optimizer = self.optimizer.update(gradients, optimizer, trained)
        return optax.apply_updates(trained, updates), optimizer

    def begin(self, trained: dict[str, jax.Array]) -> State:
        """Before the first step."""
        return State(trained, self.optimizer.init(trained), trained, 0, 0, 0, 0.0, ())

    def divergence(self, trained: dict[str, jax.Array]) -> float:
        """Mean per predicted token of the documents held out, in nats."""
        total, tokens = 0.0, 0
        for batch in self.documents.some(self.held_out, self.settings.tokens_per_batch):
            inputs, targets = self.documents.of(batch, self.held_out)
            total += float(measure(self.model, self.params, trained, inputs, targets))
            tokens += int(targets.real.sum())
        return total / tokens

    def evaluated(self, state: State) -> State:
        """After an epoch, or before the first: what is best so far, and the history with one entry more."""
        found = self.divergence(state.trained)
        if not np.isfinite(found):
            raise ValueError(
                f"After {state.steps} steps the divergence is {found}: lower the learning rate "
                f"({self.settings.learning_rate:g}), or look at the checkpoint."
            )
        best = min((epoch["held_out"] for epoch in state.history), default=np.inf)
        mean = state.total / state.batch if state.batch else None
        entry = {"held_out": found, "trained_on": mean}
        return state._replace(
            best=state.trained if found < best else state.best,
            epoch=state.epoch + (state.batch > 0),
            batch=0,
            total=0.0,
            history=(*state.history, entry),
        )

    def is_over(self, state: State) -> bool:
        """Whether all epochs are through, or `patience` of them have brought nothing."""
        held_out = [epoch["held_out"] for epoch in state.history]
        return state.epoch >= self.settings.epochs or len(held_out) - 1 - int(np.argmin(held_out)) >= (
            self.settings.patience
        )

    def states(self, state: State) -> Iterator[State]:
        """The states after each step."""
        while not self.is_over(state):
            rng = np.random.RandomState([self.settings.seed, state.epoch])
            order = rng.permutation(self.trained_on)  # Documents of like length meet others in each epoch.
            batches = self.documents.some(order, self.settings.tokens_per_batch)
            for i in rng.permutation(len(batches))[state.batch :]:
                inputs, targets = self.documents.of(batches[i], order)
                loss, slope = gradients(self.model, self.params, state.trained, inputs, targets)
                trained, optimizer = self._update(slope, state.optimizer, state.trained)
                if not np.isfinite(loss):
                    raise ValueError(
                        f"Step {state.steps}: the divergence is {loss}. Lower the learning rate "
                        f"({self.settings.learning_rate:g}), or look at the checkpoint."
                    )
                state = state._replace(
                    trained=trained,
                    optimizer=optimizer,
                    batch=state.batch + 1,
                    steps=state.steps + 1,
                    total=state.total + float(loss),
                )
                if state.batch == len(batches):
                    state = self.evaluated(state)
                yield state
