"""A whole compression: documents stream through the model while its experts are quantized, layer by layer, and written.

`compress_examples` is everything, with what it needs given as values; `api.compress` is what people call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qmoe_jax import reports, resources, streaming
from qmoe_jax.checkpoints import Checkpoint, CompressedWriter, checksums
from qmoe_jax.checkpoints.samples import Samples, changed, digest, of_layers, samples
from qmoe_jax.compression.choosing import look
from qmoe_jax.compression.progress import OtherRunError, Progress, fingerprint
from qmoe_jax.compression.report import compression_report
from qmoe_jax.errors import CheckpointError
from qmoe_jax.lock import locked_by_first
from qmoe_jax.models.family import Example
from qmoe_jax.processes import Processes
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.quantization.rate_control import RateControl
from qmoe_jax.quantization.settings import QuantizationSettings, why_not_stored
from qmoe_jax.quantization.super_experts import super_experts
from qmoe_jax.quantization.trials import trial_experts

LOOKED_AT = 16  # documents: massive activations are made of nearly any text


def compress_examples(
    checkpoint: Checkpoint,
    vocabulary: Any,
    calibration: Sequence[Example] | None,
    validation: Sequence[Example],
    quantization: QuantizationSettings,
    memory: streaming.Settings,
    *,
    codec: str | None = "gap",
    output: str | os.PathLike | None = None,
    provenance: dict[str, Any] | None = None,
    num_shards: int | None = None,
    resume: bool = True,
    keep_progress: bool = False,
    what: str = "compressing",
) -> dict[str, Any]:
    """Quantizes all experts and measures the loss of the result on the validation examples.

    With `output`, sparse layers are committed when they are done, as often as `memory.commit_share` allows (see
    `progress`). If the run ends before it is through, however it ends, the same call goes on after the last one that
    was committed, and gives the same bytes.

    Args:
      checkpoint: the model; its weights are rounded to bfloat16 first, as the paper's are.
      vocabulary: tells special tokens, to the family's task.
      calibration: examples whose tokens make the Hessians; None will do for a method that needs none.
      validation: examples whose loss is measured.
      quantization: how.
      memory: how the streamed pass uses memory and devices.
      codec: how experts are stored; None, or one that doesn't hold them: sizes aren't measured.
      output: directory of the compressed checkpoint; None: nothing is written.
      provenance: kept in the manifest.
      num_shards: of each layer in the compressed checkpoint; None: by size.
      resume: go on from what an interrupted run has committed in `output`; otherwise that is removed.
      keep_progress: leave what was committed in `output`, for the caller to `remove_progress` once all is written.
      what: the progress bar's label.

    Returns:
      The report, as JSON values.

    Raises:
      ValueError: experts are to be stored that the codec doesn't hold; no calibration for a method that needs it;
        experts are compressed already; activations become NaN or Inf.
      InUseError: another process is writing to `output`.
      OtherRunError: the interrupted run in `output` had other data or settings, or another checkpoint, or other
        weights at the same path (by samples of them; see `checkpoints.samples`).
      CheckpointError: a weight can't be read, or is NaN or Inf, or the weights are replaced while the run reads them;
        then no checkpoint is left behind, only what was committed.
    """
    if codec is not None and (problem := why_not_stored(quantization, codec)):
        if output is not None:
            raise ValueError(problem)
        codec = None
    check_uncompressed(checkpoint)
    quantization = _of_family(quantization, checkpoint)
    if quantization.calibrated and calibration is None:
        raise ValueError(f"quantization.method {quantization.method!r} needs calibration documents.")
    examples = [*(calibration or ()), *validation] if quantization.calibrated else list(validation)
    run = _Run(checkpoint, vocabulary, examples, len(examples) - len(validation), quantization, memory, codec, what)
    identity = identity_of(
        checkpoint, calibration, validation, quantization, memory, codec=codec, num_shards=num_shards
    )
    run.processes.agree(identity | {"weights (a sample)": digest(run.weights)})
    if output is None:
        losses = run.through()
    else:
        with locked_by_first(output, run.processes):
            progress = Progress(output, identity, resume, run.processes, memory.commit_share)
            check_weights(progress.committed, run.weights, output)
            origin = {**(provenance or {}), **checksums.noted(checkpoint), "weights_sample": digest(run.weights)}
            losses = _committed(run, output, progress, origin, num_shards)
            if not keep_progress and run.processes.first:
                progress.remove()
    return compression_report(
        losses, run.accounts, checkpoint, quantization, codec, run.num_calibration, run.stages.report()
    )


def identity_of(
    checkpoint: Checkpoint,
    calibration: Sequence[Example] | None,
    validation: Sequence[Example],
    quantization: QuantizationSettings,
    memory: streaming.Settings,
    *,
    codec: str | None = "gap",
    num_shards: int | None = None,
) -> dict[str, Any]:
    """What two compressions have in common that give the same bytes, as JSON values; arguments as `compress_examples`'.

    Samples of the weights aren't in it: see `checkpoints.samples`.
    """
    if codec is not None and why_not_stored(quantization, codec):
        codec = None
    settings = {
        "quantization": _of_family(quantization, checkpoint).to_dict(),
        "codec": codec,
        "num_shards": num_shards,
        # Of memory, what influences how sums are rounded.
        "model.dtype": str(jnp.dtype(memory.dtype)),
        "memory.tokens_per_batch": memory.tokens_per_batch,
        "memory.tokens_per_expert_call": memory.tokens_per_expert_call,
    }
    return fingerprint(checkpoint, (calibration or ()) if quantization.calibrated else (), validation, settings)


def _of_family(quantization: QuantizationSettings, checkpoint: Checkpoint) -> QuantizationSettings:
    """With the family's own `min_tokens` where none is given."""
    if quantization.calibration.min_tokens is None:
        return quantization.replace(min_tokens=checkpoint.family.min_tokens)
    return quantization


def check_uncompressed(checkpoint: Checkpoint) -> None:
    """Raises ValueError for a checkpoint whose experts are compressed already."""
    if not any(map(checkpoint.is_expert, checkpoint.specs)):
        raise ValueError(
            f"{checkpoint.path}: its experts are compressed already. Give the checkpoint it was made from."
        )


def check_weights(committed: Mapping[str, Any] | None, weights: Samples, output: str | os.PathLike) -> None:
    """Raises OtherRunError where what is committed came from other weights."""
    if committed and (names := changed(committed.get("weights", {}), weights)):
        raise OtherRunError(
            f"{output} holds an unfinished compression of other weights, which were replaced since: {names[0]}"
            f"{f' and {len(names) - 1} more parameters' if names[1:] else ''}. Put the old ones back to go on, or give "
            "another output, or --overwrite to start anew."
        )


def _committed(
    run: _Run, output: str | os.PathLike, progress: Progress, provenance: dict[str, Any], num_shards: int | None
) -> streaming.DocumentLosses:
    """The run, written to `output` and committed on the way; what is left where it stops, and what is said of it."""
    kept, total = progress.committed["kept"] if progress.committed else None, len(run.config.sparse_layers)
    if kept and run.processes.first:
        reports.say(f"{output}: going on after {len(kept)} of {total} sparse layers")
    try:
        settings = run.quantization.to_dict()
        with CompressedWriter(
            output, run.config, settings, run.codec, provenance, num_shards, layers=kept, processes=run.processes
        ) as writer:
            try:
                return run.through(writer, progress)
            except BaseException:
                stored = progress.stored()
                writer.keep(stored["kept"] if stored else {})
                raise
    except BaseException as e:
        if run.processes.first:
            if stored := progress.stored():
                e.add_note(
                    f"{output}: {len(stored['kept'])} of {total} sparse layers are committed; run the same command to "
                    "go on after them"
                )
            else:
                e.add_note(f"{output}: no sparse layer is committed yet")
                with contextlib.suppress(OSError):  # It needn't be what went wrong.
                    progress.remove()
        raise


class _Run:
    """What a compression is given, checked, and what comes of it."""

    def __init__(self, checkpoint, vocabulary, examples, num_calibration, quantization, memory, codec, what):
        self.checkpoint, self.config, self.what = checkpoint, checkpoint.config, what
        self.examples, self.num_calibration = examples, num_calibration
        self.quantization, self.codec = quantization, codec
        self.memory = memory._replace(round_weights=True)
        self.stages, self.processes = resources.Stages(), Processes()
        self.weights = samples(checkpoint)
        self.accounts: dict[str, Any] = {}
        alone = checkpoint.family.streamed(self.config, memory.dtype).one_process
        if self.processes.count > 1 and alone:
            raise ValueError(f"{checkpoint.path} is compressed by one process only: {alone}.")
        self.control, self.few = None, 0
        target = quantization.rounding.target_bits
        if target is not None:
            weights = weights_by_matrix(checkpoint)
            self.control = RateControl(target, weights)
            each = max(weights.values()) // (len(self.config.sparse_layers) * self.config.num_experts)
            self.few = trial_experts(self.config.num_experts, each)
            self.memory = self.memory._replace(experts_per_group=max(self.memory.experts_per_group, self.few))
        task = checkpoint.family.task
        lengths = task.lengths(examples)
        first = {stream: int(n[:num_calibration].sum()) for stream, n in lengths.items()}
        calibrates = {stream: np.arange(n.sum()) < first[stream] for stream, n in lengths.items()}
        self.measured = {stream: ~mask for stream, mask in calibrates.items()}
        if quantization.calibration.mask_special_tokens:
            special = task.special(examples, vocabulary)
            calibrates = {stream: mask & ~special[stream] for stream, mask in calibrates.items()}
        self.calibrates = calibrates

    def weights_of(self, layers: Iterable[str]) -> Samples:
        """Samples of what these layers came from. Raises CheckpointError, in all processes, where one has changed."""
        before = of_layers(self.weights, self.checkpoint, layers)
        names = self.processes.gather(changed(before, samples(self.checkpoint, before)))
        if found := next(filter(None, names), None):
            raise CheckpointError(
                f"{self.checkpoint.path}: weights were replaced while the run read them: {found[0]} isn't what it was, "
                "or can't be read. Put the old ones back and give the same command again, or start anew."
            )
        return before

    def super_experts(self) -> dict[str, list[int]]:
        """By layer, those that are to be kept at a higher rate, if any are."""
        kept: dict[str, list[int]] = {}
        if getattr(self.quantization.rounding, "super_weight", 1.0) != 1:
            looked_at = self.examples[: min(self.num_calibration, LOOKED_AT)]
            with self.stages("super experts"):
                peaks = look(self.checkpoint, looked_at, self.memory, self.processes).peaks
            for found in super_experts({layer: dict(enumerate(p.tolist())) for layer, p in peaks.items()}):
                kept.setdefault(found["layer"], []).append(found["expert"])
        return kept

    def through(
        self, writer: CompressedWriter | None = None, progress: Progress | None = None
    ) -> streaming.DocumentLosses:
        """Quantizes and measures, from where `progress` is; losses of the examples that don't calibrate."""
        own = self.processes.share(self.config.num_experts) if writer is None else writer.own
        if self.control is not None and (first := self.processes.from_first(len(own))) < self.few:
            raise ValueError(
                f"quantization.target_bits: {self.few} experts of each layer are tried by the first process, which "
                f"would have {first}: take fewer processes."
            )
        quantizer = Quantizer(
            self.quantization,
            self.calibrates,
            self.measured,
            self.config.num_experts,
            self.codec,
            writer,
            self.stages,
            self.control,
            own,
            self.processes,
            self.super_experts(),
        )
        commits = None
        if progress is not None and writer is not None:
            commits = LayerCommits(progress, writer, quantizer, self.weights_of)
        losses = streaming.run(
            self.checkpoint,
            self.examples,
            self.memory,
            quantizer=quantizer,
            commits=commits,
            processes=self.processes,
            stages=self.stages,
            what=self.what,
            first_measured=self.num_calibration,
        )
        missing = set(self.config.sparse_layers) - set(quantizer.accounts)
        if missing:
            raise RuntimeError(f"Sparse layers {sorted(missing)} were not quantized.")
        if writer is not None:
            with self.stages("writing"):
                self.weights_of(self.config.sparse_layers)
                names = [n for n in self.checkpoint.specs if not self.checkpoint.is_expert(n)]
                writer.finish({n: self.checkpoint.read(n) for n in names} if self.processes.first else {})
        self.accounts = quantizer.accounts
        return losses


class LayerCommits:
    """Commits what the writer has written and what the quantizer knows, with the pass's activations.

    See `streaming.Commits`.
    """

    def __init__(
        self,
        progress: Progress,
        writer: CompressedWriter,
        quantizer: Quantizer,
        weights_of: Callable[[Iterable[str]], Samples],
    ):
        self.progress, self.writer, self.quantizer, self.weights_of = progress, writer, quantizer, weights_of
        self.done = 0
        if progress.committed:
            quantizer.restore(progress.committed["quantizer"])
            self.done = progress.committed["done"]

    def fill(self, name: str, array: streaming.OwnRows) -> None:
        self.progress.fill(name, array)

    def commit(self, done: int, arrays: Mapping[str, streaming.OwnRows]) -> None:
        if self.progress.due(arrays):
            kept = self.writer.layers
            state = {"done": done, "kept": kept, "quantizer": self.quantizer.state(), "weights": self.weights_of(kept)}
            self.progress.commit(state, arrays)


def weights_by_matrix(checkpoint: Checkpoint) -> dict[str, int]:
    """How many of the model's weights are in experts' matrices of each name."""
    weights: dict[str, int] = {}
    for name, spec in checkpoint.specs.items():
        if (found := checkpoint.family.expert_of(name)) is not None:
            weights[found[1]] = weights.get(found[1], 0) + int(np.prod(spec.shape))
    return weights
