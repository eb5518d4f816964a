"""A whole fine-tuning: the original model's predictions, training towards them, and the checkpoint that comes of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qmoe_jax import reports, resources
from qmoe_jax.checkpoints import Checkpoint, CompressedWriter
from qmoe_jax.checkpoints.compressed.target import refuse_dense
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.compression.progress import Progress, fingerprint
from qmoe_jax.errors import CheckpointError
from qmoe_jax.finetuning import teacher
from qmoe_jax.finetuning.parts import LEVELS, PARTS, Flat, part_of, rising, trainable, with_trained_levels
from qmoe_jax.finetuning.training import Documents, Run, Settings, State, split
from qmoe_jax.lock import locked
from qmoe_jax.models.family import Config, Example
from qmoe_jax.streaming import OwnRows

STATE, LOG_P, TOKENS = "x", "log_p", "tokens"  # arrays that are committed; 'x' is the one that changes


def finetune_examples(
    checkpoint: Checkpoint,
    original: Checkpoint,
    examples: Sequence[Example],
    settings: Settings,
    *,
    output: str | os.PathLike,
    resume: bool = True,
    commit_share: float = 0.03,
    keep_progress: bool = False,
) -> dict[str, Any]:
    """Trains what isn't quantized to give the original model's predictions, and writes a compressed checkpoint.

    Symbols stay as they are.

    The predictions are computed once and kept in `output`, as is the state of training, as often as `commit_share`
    allows: if the run ends before it is through, however it ends, the same call goes on there.

    Args:
      checkpoint: the compressed model; its experts stay compressed in memory.
      original: the model that it was made from, whole in memory while its predictions are computed.
      examples: documents, as the family's task has them; some are held out (see `Settings`).
      settings: how.
      output: directory of the new compressed checkpoint.
      resume: go on from what an interrupted run has committed in `output`; otherwise that is removed.
      commit_share: of the time, at most, for commits.
      keep_progress: leave what was committed in `output`, for the caller to `remove_progress` once all is written.

    Returns:
      The report, as JSON values: mean divergence from the original model per predicted token of the documents held out,
      'before' and 'after', that of each epoch, 'parameters' trained by part, 'bytes_experts'.

    Raises:
      CheckpointError: `checkpoint` isn't compressed, or `original` is.
      ValueError: they are different models; too few documents; training diverges.
      InUseError: another process is writing to `output`.
      OtherRunError: the interrupted run in `output` had other data or settings, or other checkpoints.
    """
    check_models(checkpoint, original)
    task, stages = checkpoint.family.task, resources.Stages()
    task.check(examples, checkpoint.config.vocab_size)
    settings = dataclasses.replace(settings, teacher_top=min(settings.teacher_top, checkpoint.config.vocab_size))
    trained_on, held_out = split(len(examples), settings)
    with locked(output):
        progress = Progress(output, identity_of(checkpoint, original, examples, settings), resume, share=commit_share)
        try:
            predictions = _predictions(progress, original, examples, settings, stages)
            documents = Documents(task, examples, predictions)
            with stages("reading"):
                params = flat_params(checkpoint)
            model = checkpoint.family.model(checkpoint.config, jnp.float32, None)
            start = trainable(params, checkpoint.config, settings.parts)
            if not start:
                raise ValueError(
                    f"parts: of {', '.join(settings.parts)}, {checkpoint.path} has nothing to train (levels that "
                    "share a ladder stay as they are). Give other parts."
                )
            run = Run(model, params, documents, trained_on, held_out, settings)
            state = _train(run, start, progress, stages)
            with stages("writing"):
                written = write(checkpoint, original, params, state.best, output, settings, len(examples))
        except BaseException as e:
            if progress.committed:
                e.add_note(f"{output}: what was trained so far is committed; run the same command to go on")
            raise
        if not keep_progress:
            progress.remove()
    number = {part: 0 for part in PARTS if part in settings.parts}
    for name, value in start.items():
        number[_part(name, params[name], checkpoint)] += value.size
    return {
        "before": state.history[0]["held_out"],
        "after": min(epoch["held_out"] for epoch in state.history),
        "epochs": state.history,
        "parameters": number,
        "bytes_experts": {
            "before": sum(m.nbytes for layer in checkpoint.expert_sizes.values() for m in layer.values()),
            "after": written,
        },
        "documents": {"trained_on": len(trained_on), "held_out": len(held_out)},
        "settings": dataclasses.asdict(settings),
        "seconds": stages.report(),
        "peak_rss_bytes": resources.peak_rss_bytes(),
    }


def check_models(checkpoint: Checkpoint, original: Checkpoint) -> None:
    """Raises CheckpointError or ValueError unless one is a compressed checkpoint of a model like the other."""
    refuse_dense(checkpoint, "fine-tuning")
    if original.is_compressed:
        raise CheckpointError(f"{original.path}: its experts are compressed. Give the original model's checkpoint.")
    if checkpoint.family is not original.family:
        families = checkpoint.family.name, original.family.name
        raise ValueError(f"{checkpoint.path} is of family {families[0]}, {original.path} of {families[1]}.")
    ours, theirs = checkpoint.config.to_dict(), original.config.to_dict()
    fields = (*checkpoint.family.told, *checkpoint.family.UNTOLD)
    if differ := [f"{k}: {ours[k]!r}, {theirs[k]!r}" for k in fields if ours[k] != theirs[k]]:
        raise ValueError(
            f"{checkpoint.path} is no compressed {original.path}: they differ in {'; '.join(differ)}. Give the "
            "checkpoint it was made from."
        )


def identity_of(
    checkpoint: Checkpoint, original: Checkpoint, examples: Sequence[Example], settings: Settings
) -> dict[str, Any]:
    """What two fine-tunings have in common that give the same result, as JSON values."""
    manifest = getattr(checkpoint, "manifest", {})  # It has the checksums of all that is stored.
    what = {
        "finetune": dataclasses.asdict(settings),
        "compressed checkpoint": manifest.get("sha256"),
        "original checkpoint": fingerprint(original, (), (), {})["checkpoint"],
    }
    return fingerprint(checkpoint, examples, (), what)


def flat_params(checkpoint: Checkpoint) -> Flat:
    """All parameters, on the device, by '/'-joined name; experts' matrices as `CompressedExperts`."""
    put = lambda name, value: value if isinstance(value, CompressedExperts) else jnp.asarray(value)
    return traverse_util.flatten_dict(checkpoint.load(put), sep="/")


def _part(name: str, value: Any, checkpoint: Checkpoint) -> str:
    return LEVELS if isinstance(value, CompressedExperts) else part_of(name, value.shape, checkpoint.config)


# --- What is committed -----------------------------------------------------------------------------------------------


def _rows(array: np.ndarray) -> OwnRows:
    return OwnRows(array, None, len(array))


def _predictions(
    progress: Progress, original: Checkpoint, examples: Sequence[Example], settings: Settings, stages: resources.Stages
) -> teacher.Predictions:
    """The original model's, from what is committed, or computed and committed."""
    task = original.family.task
    found = teacher.empty(int(task.predicted(examples).sum()), settings.teacher_top)
    if progress.committed:
        progress.fill(LOG_P, _rows(found.log_p))
        progress.fill(TOKENS, _rows(found.tokens))
        return found
    with stages("original model"):
        # As for compression: the weights of the original in bfloat16.
        params = original.load(lambda name, value: jnp.asarray(value, jnp.bfloat16))
        model = original.family.model(original.config, jnp.float32, None)
        batches = len(task.batches(examples, settings.tokens_per_batch))
        with reports.progress(batches, "original model", "batch") as bar:
            for _ in teacher.predict(model, params, task, examples, settings.tokens_per_batch, found):
                bar.update()
    if not np.isfinite(found.log_p).all():
        raise ValueError(f"{original.path}: its predictions are NaN or Inf. Look at the checkpoint.")
    progress.commit({"state": None}, {LOG_P: _rows(found.log_p), TOKENS: _rows(found.tokens)})
    return found


def _train(run: Run, start: dict[str, jax.Array], progress: Progress, stages: resources.Stages) -> State:
    """The last state, from where `progress` is."""
    constant = {name: _rows(getattr(run.documents.predictions, name)) for name in (LOG_P, TOKENS)}
    with stages("training"):
        state = run.begin(start)
        assert progress.committed is not None
        if (committed := progress.committed["state"]) is not None:
            values = np.zeros((state.size(), 1), np.float32)
            progress.fill(STATE, _rows(values))
            state = state.restored(committed, values[:, 0])
            reports.say(f"{progress.output}: going on after {state.steps} of {run.total_steps} steps")
        elif not state.history:
            state = run.evaluated(state)

        with reports.progress(run.total_steps, "fine-tuning", "step") as bar:
            bar.update(state.steps)
            for reached in run.states(state):
                state = reached
                bar.update(state.steps - bar.n)
                bar.set_postfix(divergence=f"{state.history[-1]['held_out']:.4f}")
                arrays = {STATE: _rows(state.values()[:, None])} if _due(progress, state) else {}
                if arrays:
                    progress.commit({"state": state.told()}, arrays | constant)
    return state


def _due(progress: Progress, state: State) -> bool:
    """Whether to commit now; asked without copying the state from the device."""
    return progress.due({STATE: OwnRows(np.broadcast_to(np.float32(0), (state.size(), 1)), None, state.size())})


# --- The result ------------------------------------------------------------------------------------------------------


def write(
    checkpoint: Checkpoint,
    original: Checkpoint,
    params: Flat,
    trained: dict[str, jax.Array],
    output: str | os.PathLike,
    settings: Settings,
    documents: int,
) -> int:
    """The compressed checkpoint with these in place; manifest and provenance are the old one's, with what was done.

    Returns the bytes of its experts.
    """
    told = destination(checkpoint, original, settings, documents)
    with CompressedWriter(output, *told) as writer:
        for layer in checkpoint.config.sparse_layers:
            matrices = {}
            for matrix, name in checkpoint.matrices(layer).items():
                experts = params[name]
                if name in trained:
                    experts = with_trained_levels(experts, rising(trained[name]))
                matrices[matrix] = experts
                matrices[matrix].validate()
            writer.write_layer(layer, matrices)
        writer.finish({name: np.asarray(trained.get(name, params[name])) for name in checkpoint.specs})
        return sum(layer["bytes"] for layer in writer.layers.values())


def destination(
    checkpoint: Checkpoint, original: Checkpoint, settings: Settings, documents: int, **more: Any
) -> tuple[Config, Any, str, dict[str, Any], int | None]:
    """What `CompressedWriter` is told of the new checkpoint: as of the old one, and in its provenance what was done."""
    assert checkpoint.codec is not None
    manifest = getattr(checkpoint, "manifest", {})
    shards = next((len(layer.get("shards", [0])) for layer in manifest.get("layers", {}).values()), None)
    done = {
        "checkpoint": checkpoint.path,
        "manifest_sha256": manifest.get("sha256"),
        "original": original.path,
        "documents": documents,
        "settings": dataclasses.asdict(settings) | more,
    }
    provenance = {**checkpoint.provenance, "finetuned": [*checkpoint.provenance.get("finetuned", []), done]}
    return checkpoint.config, checkpoint.quantization, checkpoint.codec, provenance, shards


def recovered(original: float, before: float, after: float) -> float | None:
    """The share of the loss that compression had cost, and that is gone; None where it had cost nothing."""
    return (before - after) / (before - original) if before > original else None
