"""A forward pass over all documents at once, layer by layer, so that one layer's weights are in memory at a time.

The activations of all documents lie end to end in one host array (the paper's list buffer, section 3.2). A layer's
attention runs batch by batch; its experts then run group by group, each on all tokens routed to it:

    for each layer:   x = attend(x), batch by batch;   route;   for each group of experts: x += gate * expert(norm(x))

Compression is this pass with a hook that replaces each group of experts by its quantized version.

Several processes share the documents, whole batches each, and the experts of every layer. What is to go through a group
of experts is sent to the process that has it and comes back, so that all sums are those of one process, to the bit.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from qmoe_jax import reporting, scratch
from qmoe_jax.checkpoints.base import Checkpoint
from qmoe_jax.checkpoints.checks import check_finite
from qmoe_jax.checkpoints.reading import Reading
from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.config import ModelConfig
from qmoe_jax.data import Batch, make_batches
from qmoe_jax.models.expert_parallel import part_of_mesh, place_batch, place_experts, replicate
from qmoe_jax.models.layers import RelativePositionBias, RMSNorm
from qmoe_jax.models.moe import Routing, apply_experts, expert_mlp, grouped
from qmoe_jax.models.switch import (
    DecoderLayer,
    EncoderLayer,
    SwitchTransformer,
    decoder_masks,
    decoder_token_mask,
    encoder_masks,
)
from qmoe_jax.processes import Processes


class ListBuffer:
    """Vectors of all tokens of all documents, end to end: `data` [tokens, width]; one document's are consecutive.

    In memory, or in a file below `folder`.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: DTypeLike, folder: str | None = None):
        self.lengths = np.asarray(lengths)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        # One more row, always zero: padding is read from there.
        shape = (int(self.offsets[-1]) + 1, width)
        self._mapped = None if folder is None else scratch.MappedArray(folder, shape, dtype)
        self._rows = np.zeros(shape, dtype) if self._mapped is None else self._mapped.array
        self.data = self._rows[:-1]

    def positions(self, documents: np.ndarray, length: int) -> np.ndarray:
        """Row of each token of padded documents: [batch, length]; padding is the last row (documents -1: only that)."""
        steps = np.arange(length)
        lengths = np.where(documents >= 0, self.lengths[documents], 0)
        rows = self.offsets[documents][:, None] + steps
        return np.where(steps < lengths[:, None], rows, len(self.data))

    def get(self, positions: np.ndarray) -> np.ndarray:
        return self._rows[positions]

    def put(self, positions: np.ndarray, values: ArrayLike) -> None:
        real = positions < len(self.data)
        self._rows[positions[real]] = np.asarray(values)[real]

    def release(self) -> None:
        """Gives back the memory of what is in a file as well."""
        if self._mapped is not None:
            self._mapped.release()


class Documents:
    """Corrupted documents, in batches of a few fixed shapes, with each batch's rows in the list buffers.

    Batches are composed of all documents, and each process has some of them: `batches`, and in its list buffers their
    documents' tokens. The list buffers are in memory, or in files below `folder`.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[np.ndarray, np.ndarray]],
        tokens_per_batch: int,
        folder: str | None,
        processes: Processes,
    ):
        self.pairs = pairs
        batches = make_batches(pairs, tokens_per_batch)
        self.batches: list[Batch] = [batches[i] for i in processes.share(len(batches))]
        self.lengths = {
            "encoder": np.array([len(e) for e, _ in pairs]),
            "decoder": np.array([len(d) - 1 for _, d in pairs]),
        }
        self.own = np.zeros(len(pairs), bool)
        for batch in self.batches:
            self.own[batch.indices[batch.indices >= 0]] = True
        self._folder = folder
        self._buffers: weakref.WeakSet[ListBuffer] = weakref.WeakSet()

    def buffer(self, stack: str, width: int, dtype: DTypeLike) -> ListBuffer:
        buffer = ListBuffer(np.where(self.own, self.lengths[stack], 0), width, dtype, self._folder)
        self._buffers.add(buffer)
        return buffer

    def release(self) -> None:
        """See `ListBuffer.release`; called often, so that few rows are in memory."""
        for buffer in self._buffers:
            buffer.release()

    def rows(self, stack: str) -> np.ndarray:
        """Which row each of this process's would be if one process had all documents: rising."""
        return np.flatnonzero(np.repeat(self.own, self.lengths[stack]))


class Rows:
    """Some rows of an array [tokens, width], by their index in it; the others read as zeros.

    Args:
      index: of the rows, rising.
      values: [rows, width].
      tokens: how many rows the array has.
    """

    def __init__(self, index: np.ndarray, values: np.ndarray, tokens: int):
        self.index, self.shape = index, (tokens, values.shape[1])
        self._values = np.concatenate([values, np.zeros_like(values, shape=(1, values.shape[1]))])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        at = np.searchsorted(self.index, rows)
        there = np.append(self.index, -1)[at] == rows
        return self._values[np.where(there, at, len(self.index))]


class ExpertGroup(NamedTuple):
    """Experts start:stop of a layer, and what arrives at them.

    Attributes:
      layer: such as 'encoder/layers_1'.
      stack: 'encoder' or 'decoder'.
      start: first expert.
      stop: one past the last expert.
      kernels: by name (wi, wo, ...), [experts, in, out] or `CompressedExperts`.
      inputs: normed inputs of all tokens [tokens, d_model], in the list buffers' order. With several processes, `Rows`
        of those that are routed to the group.
      tokens: per expert of the group, the tokens routed to it as any of their choices, or that it chose (rows of
        `inputs`), in order.
      gates: per expert, the router's probability by which it multiplies its output for each of these tokens, float32.
    """

    layer: str
    stack: str
    start: int
    stop: int
    kernels: dict[str, Any]
    inputs: np.ndarray | Rows
    tokens: list[np.ndarray]
    gates: list[np.ndarray]


class Settings(NamedTuple):
    """How a streamed pass uses memory and devices.

    Attributes:
      dtype: of activations, float32 or bfloat16.
      round_weights: round weights to bfloat16 first, as a compressed checkpoint stores those it doesn't quantize.
      tokens_per_batch: most tokens, padding included, that go through a layer's attention at once.
      tokens_per_expert_call: most tokens that go through a group of experts at once.
      experts_per_group: experts that are quantized together, or computed.
      mesh: over whose devices a batch and a group of experts are, as far as they divide them; None: one device.
      weights_bytes: most memory for experts that are read; None: half of the host's.
      scratch: folder for what of them doesn't fit; None: the system's for temporary files.
      activations: folder for the list buffers; None: they are in memory.
      commit_share: a compression commits a layer where that takes at most this share of the time since the last commit;
        1: each layer.
    """

    dtype: Any = jnp.float32
    round_weights: bool = False
    tokens_per_batch: int = 8_192
    tokens_per_expert_call: int = 16_384
    experts_per_group: int = 16
    mesh: Mesh | None = None
    weights_bytes: int | None = None
    scratch: str | None = None
    activations: str | None = None
    commit_share: float = 0.03

    @property
    def reading(self) -> Reading:
        return Reading(ml_dtypes.bfloat16 if self.round_weights else None, self.weights_bytes, self.scratch)


class DocumentLosses(NamedTuple):
    """Cross-entropy in nats, per document."""

    total: np.ndarray  # float64 [documents], summed over predicted tokens
    tokens: np.ndarray  # int64 [documents], predicted tokens

    def summary(self) -> dict[str, Any]:
        """`loss`, the mean per predicted token, and `loss_paper`.

        The paper weights each document's mean over its L - 1 predicted tokens by its decoder length L.
        """
        weight = self.tokens + 1
        return {
            "loss": float(self.total.sum() / self.tokens.sum()),
            "loss_paper": float(np.sum(weight * self.total / self.tokens) / weight.sum()),
            "num_documents": len(self.tokens),
            "num_tokens": int(self.tokens.sum()),
        }


Hook = Callable[[ExpertGroup], dict[str, Any]]


class OwnRows(NamedTuple):
    """This process's rows of an array [tokens, width]: values [n, width] are its rows `rows`, rising; None: all."""

    values: np.ndarray
    rows: np.ndarray | None
    tokens: int


class Position(NamedTuple):
    """Between two layers: where a pass goes on, with what `commit` was told there.

    Attributes:
      stack: 'encoder' or 'decoder'.
      layers: how many layers of the stack are done.
      fill: fill(name, array) reads this process's rows of the array of that name.
    """

    stack: str
    layers: int
    fill: Callable[[str, OwnRows], None]


# commit(stack, layers, arrays): so many layers of the stack are done. 'x' [tokens, d_model] are the activations after
# them and, in the decoder, 'encoded' the encoder's output.
Commit = Callable[[str, int, dict[str, OwnRows]], None]


def run(
    checkpoint: Checkpoint,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    settings: Settings,
    *,
    hook: Hook | None = None,
    finish: Callable[[str], None] | None = None,
    sample: Mapping[str, np.ndarray] | None = None,
    processes: Processes | None = None,
    experts: range | None = None,
    stages: reporting.Stages | None = None,
    what: str = "evaluating",
    position: Position | None = None,
    commit: Commit | None = None,
) -> DocumentLosses:
    """Losses of corrupted documents, one layer in memory at a time.

    Args:
      checkpoint: the model, read once from front to back.
      pairs: (encoder int32 [Le], decoder int32 [Ld]) per document; decoder[:-1] is fed, decoder[1:] predicted.
      settings: memory and precision.
      hook: called for each group of experts; returns the kernels that are used in its place.
      finish: called with each sparse layer's name after its last group, by all processes together: they may have
        different numbers of groups, so the hook itself can't ask the others anything but in its first.
      sample: by stack, rows that every group's inputs have beside those of its own tokens, rising.
      processes: of the run; None: `jax.distributed`'s. Each calls this with the same arguments, and gets all losses.
      experts: of every layer, those that this process has; None: an equal share.
      stages: where seconds are counted.
      what: the progress bar's label.
      position: where to go on; None: at the beginning.
      commit: called after each sparse layer.

    Raises:
      CheckpointError: something could not be read, or is NaN or Inf.
      ValueError: settings below one; no documents, an empty one, or ids that the embedding doesn't have; activations
        become NaN or Inf (names layer and document).
    """
    config = checkpoint.config
    for name in ("tokens_per_batch", "tokens_per_expert_call", "experts_per_group"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: found {getattr(settings, name)}, expected at least 1.")
    _check_documents(pairs, config.vocab_size)
    stages = stages or reporting.Stages()
    processes = processes or Processes()
    documents = Documents(pairs, settings.tokens_per_batch, settings.activations, processes)
    own = experts or processes.share(config.num_experts)
    units = sum(_units(config, settings, len(documents.batches), len(own)).values())
    layers = [layer for layer in config.sparse_layers if not _is_done(layer, position)]
    with (
        contextlib.closing(checkpoint.stream(layers, settings.experts_per_group, settings.reading, own)) as stream,
        reporting.progress(units, what, "step", shown=processes.first) as bar,
    ):
        forward = _Pass(checkpoint, stream, config, documents, settings, hook, sample, processes, own, stages, bar)
        forward.finish, forward.position, forward.commit = finish, position, commit
        encoded = forward.encoder()
        return forward.losses(forward.decoder(encoded))


def _is_done(layer: str, position: Position | None) -> bool:
    """Whether a layer, such as 'encoder/layers_1', lies before a position."""
    stack, _, number = layer.partition("/layers_")
    if position is None or stack != position.stack:
        return position is not None and stack == "encoder"
    return int(number) < position.layers


def _check_documents(pairs: Sequence[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> None:
    if not pairs:
        raise ValueError("There are no documents.")
    for i, (encoder, decoder) in enumerate(pairs):
        if len(encoder) < 1 or len(decoder) < 2:
            raise ValueError(
                f"Document {i} has {len(encoder)} encoder and {len(decoder)} decoder tokens; expected at least 1 and 2."
            )
        low, high = min(encoder.min(), decoder.min()), max(encoder.max(), decoder.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"Document {i} has token ids from {low} to {high}; the model's embedding has 0 to {vocab_size - 1}. "
                "Is this the model's vocabulary?"
            )


def _units(config: ModelConfig, settings: Settings, batches: int, experts: int) -> dict[str, int]:
    """Steps of the progress bar: batches through attention, groups through experts, batches through the loss."""
    groups = -(-experts // settings.experts_per_group)
    return {
        "attention": (config.num_encoder_layers + config.num_decoder_layers) * batches,
        "experts": len(config.sparse_layers) * groups,
        "loss": batches,
    }


class _Pass:
    """One streamed forward pass; the state that its steps share."""

    def __init__(self, checkpoint, stream, config, documents, settings, hook, sample, processes, own, stages, bar):
        self.checkpoint, self.stream, self.config, self.documents = checkpoint, stream, config, documents
        self.settings, self.hook, self.sample, self.processes = settings, hook, sample, processes
        self.own, self.stages, self.bar = own, stages, bar
        self.finish: Callable[[str], None] | None = None
        self.position: Position | None = None
        self.commit: Commit | None = None
        self.embedder = self.params("token_embedder/")

    def step(self, steps: int = 1) -> None:
        self.bar.update(steps)
        self.documents.release()

    def weights(self, name: str, value: np.ndarray) -> np.ndarray:
        """Checked, and rounded to bfloat16 where that is asked for."""
        check_finite(name, value)
        return value.astype(ml_dtypes.bfloat16) if self.settings.round_weights else value

    def params(self, prefix: str) -> dict[str, Any]:
        with self.stages("reading"):
            tree = self.checkpoint.params(prefix)
            return jax.tree_util.tree_map_with_path(
                lambda path, v: self.weights(prefix + "/".join(k.key for k in path), v), tree
            )

    def embed(self, stack: str) -> ListBuffer:
        x = self.documents.buffer(stack, self.config.d_model, self.settings.dtype)
        embedding = self.embedder["embedding"]
        for i in np.flatnonzero(self.documents.own):
            encoder, decoder = self.documents.pairs[i]
            tokens = encoder if stack == "encoder" else decoder[:-1]
            x.data[x.offsets[i] : x.offsets[i + 1]] = embedding[tokens]
            if i % 1024 == 0:
                x.release()
        return x

    def shared_bias(self, stack: str, params, length: int) -> jax.Array | None:
        if self.config.relpos_per_layer:
            return None
        bias = RelativePositionBias(self.config, stack == "encoder", self.settings.dtype)
        positions = jnp.arange(length)
        return bias.apply({"params": params}, positions, positions)

    # --- layers ------------------------------------------------------------------------------------------------------

    def begin(self, stack: str) -> ListBuffer:
        """What goes into the first layer of the stack that isn't done."""
        if self.position is None or self.position.stack != stack:
            return self.embed(stack)
        x = self.documents.buffer(stack, self.config.d_model, self.settings.dtype)
        self.position.fill("x", self.own_rows(stack, x))
        return x

    def encoder(self) -> ListBuffer:
        if self.position is not None and self.position.stack == "decoder":
            encoded = self.documents.buffer("encoder", self.config.d_model, self.settings.dtype)
            self.position.fill("encoded", self.own_rows("encoder", encoded))
            self.skip("encoder", self.config.num_encoder_layers)
            return encoded
        x = self.begin("encoder")
        relpos = self.params("encoder/relpos_bias/")

        def attend(layer, params, batch):
            positions = x.positions(batch.indices, batch.encoder_input_tokens.shape[1])
            bias = self.shared_bias("encoder", relpos, positions.shape[1])
            tokens = batch.encoder_input_tokens
            x_batch, tokens = place_batch((x.get(positions), tokens), self.settings.mesh)
            return positions, _encoder_layer(layer, params, x_batch, tokens, bias)

        self.layers("encoder", EncoderLayer, x, attend, {})
        norm = self.params("encoder/encoder_norm/")
        for batch in self.documents.batches:
            positions = x.positions(batch.indices, batch.encoder_input_tokens.shape[1])
            x.put(positions, _norm(self.config, self.settings.dtype, norm, x.get(positions)))
            x.release()
        return x

    def decoder(self, encoded: ListBuffer) -> ListBuffer:
        x = self.begin("decoder")
        relpos = self.params("decoder/relpos_bias/")

        def attend(layer, params, batch):
            positions = x.positions(batch.indices, batch.decoder_input_tokens.shape[1])
            bias = self.shared_bias("decoder", relpos, positions.shape[1])
            memory = encoded.get(encoded.positions(batch.indices, batch.encoder_input_tokens.shape[1]))
            x_batch, memory, tokens = place_batch((x.get(positions), memory, tuple(batch[1:])), self.settings.mesh)
            return positions, _decoder_layer(layer, params, x_batch, memory, tokens, bias)

        self.layers("decoder", DecoderLayer, x, attend, {"encoded": self.own_rows("encoder", encoded)})
        return x

    def skip(self, stack: str, layers: int) -> None:
        """Steps of the progress bar that an earlier run has done."""
        c, groups = self.config, -(-len(self.own) // self.settings.experts_per_group)
        sparse = [i for i in (c.encoder_sparse_layers if stack == "encoder" else c.decoder_sparse_layers) if i < layers]
        self.bar.update(layers * len(self.documents.batches) + len(sparse) * groups)

    def own_rows(self, stack: str, x: ListBuffer) -> OwnRows:
        alone = self.processes.count == 1
        return OwnRows(x.data, None if alone else self.documents.rows(stack), int(self.documents.lengths[stack].sum()))

    def layers(self, stack: str, kind, x: ListBuffer, attend, others: dict[str, OwnRows]) -> None:
        c, dtype = self.config, self.settings.dtype
        sparse_layers = c.encoder_sparse_layers if stack == "encoder" else c.decoder_sparse_layers
        first = self.position.layers if self.position is not None and self.position.stack == stack else 0
        self.skip(stack, first)
        for i in range(first, c.num_encoder_layers if stack == "encoder" else c.num_decoder_layers):
            sparse = i in sparse_layers
            layer = kind(c, sparse, stack == "decoder", dtype)
            params = replicate(self.params(f"{stack}/layers_{i}/"), self.settings.mesh)
            h = self.documents.buffer(stack, c.d_model, dtype) if sparse else None
            # Where experts choose, they do among the tokens of a batch; each expert has a column.
            choices = c.num_experts if stack == "encoder" and c.experts_choose is not None else c.top_k
            expert = self.documents.buffer(stack, choices, np.int32) if sparse else None
            gate = self.documents.buffer(stack, choices, np.float32) if sparse else None
            for batch in self.documents.batches:
                with self.stages("attention"):
                    positions, (new_x, new_h, routing) = attend(layer, params, batch)
                    x.put(positions, new_x)
                    self.check(f"{stack}/layers_{i}", x, positions, np.asarray(new_x))
                    if sparse:
                        h.put(positions, new_h)
                        expert.put(positions, routing.expert)
                        gate.put(positions, routing.gate)
                self.step()
            if sparse:
                self.experts(f"{stack}/layers_{i}", stack, x, h.data, expert.data, gate.data)
                if self.commit is not None:
                    with self.stages("committing"):
                        self.commit(stack, i + 1, {"x": self.own_rows(stack, x), **others})

    def check(self, layer: str, x: ListBuffer, positions: np.ndarray, values: np.ndarray) -> None:
        """Raises ValueError for activations that aren't finite; values [..., d_model] of rows `positions` of x."""
        if np.isfinite(values.sum(dtype=np.float64)):
            return
        bad = np.unique(positions[~np.isfinite(values).all(-1)])
        bad = bad[bad < len(x.data)]
        if len(bad):
            document = int(np.searchsorted(x.offsets, bad[0], side="right")) - 1
            raise ValueError(
                f"{layer}: activations of document {document}, token {bad[0] - x.offsets[document]}, are NaN or Inf "
                f"({len(bad)} tokens here). Nothing is computed from them: take float32 for activations, or look at "
                "the document and the checkpoint."
            )

    def experts(self, layer: str, stack: str, buffer: ListBuffer, h, expert, gate) -> None:
        """x += sum of a token's gate * expert(h), group by group. x, h [tokens, d_model]; expert, gate [tokens, top_k].

        Two choices are added to each other before they are to x: in whichever order they come, the sum is the same.
        """
        x = buffer.data
        sums = None if expert.shape[1] == 1 else self.documents.buffer(stack, x.shape[1], x.dtype)
        y = x if sums is None else sums.data
        if self.processes.count == 1:
            routed = _Routed(expert, gate, self.config.num_experts)
            for start, stop, kernels in self.read_experts(layer):
                self.group(layer, stack, start, stop, kernels, y, h, h, routed, None)
        else:
            self.experts_of_processes(layer, stack, y, h, expert, gate)
        if self.finish is not None:
            self.finish(layer)
        if y is not x:
            x += y
        with self.stages("experts"):
            for rows in _chunks(np.arange(len(x)), 1 << 16):
                self.check(layer, buffer, rows, x[rows[0] : rows[-1] + 1])
                buffer.release()

    def group(self, layer, stack, start, stop, kernels, y, h, inputs, routed, in_all) -> None:
        """y += gate * expert(h) for the tokens of experts start:stop.

        `inputs` are what the hook gets for h, in which its row i is row in_all[i].
        """
        if self.hook is not None:
            tokens, gates = zip(*map(routed.to_expert, range(start, stop)), strict=True)
            tokens = [t if in_all is None else in_all[t] for t in tokens]
            kernels = self.hook(ExpertGroup(layer, stack, start, stop, kernels, inputs, tokens, list(gates)))
        with self.stages("experts"):
            matrices = [kernels[name] for name in self.config.expert_matrices]
            if self.settings.mesh is not None or isinstance(matrices[0], CompressedExperts):
                self.add_group(y, h, routed, start, stop, matrices)
            else:
                self.add_experts(y, h, routed, start, stop, matrices)
        self.step(-(-(stop - start) // self.settings.experts_per_group))

    def experts_of_processes(self, layer, stack, y, h, expert, gate) -> None:
        """`experts`, where each process has a group of its own experts at a time, and gets all tokens for it."""
        own, tokens = self.documents.rows(stack), int(self.documents.lengths[stack].sum())
        everywhere = self.rows_everywhere(self.sample[stack] if self.sample else np.zeros(0, np.int64), own, h)
        groups = self.read_experts(layer)
        while True:
            start, stop, kernels = next(groups, (0, 0, None))
            with self.stages("exchange"):
                bounds = self.processes.gather([start, stop])
                if all(a == b for a, b in bounds):
                    break
                wanted = [np.flatnonzero(((a <= expert) & (expert < b)).any(1)) for a, b in bounds]
                sent = [{"row": own[w], "h": h[w], "expert": expert[w], "gate": gate[w]} for w in wanted]
                received = self.processes.exchange(sent)
                counts = np.cumsum([len(r["row"]) for r in received])[:-1]
                arrived = {name: np.concatenate([r[name] for r in received]) for name in sent[0]}
                order = np.argsort(arrived["row"])  # That of one process.
                row, own_h, own_expert, own_gate = (arrived[name][order] for name in ("row", "h", "expert", "gate"))
            results = np.zeros_like(own_h)
            if start < stop:
                index, first = np.unique(np.concatenate([row, everywhere["row"]]), return_index=True)
                inputs = Rows(index, np.concatenate([own_h, everywhere["h"]])[first], tokens)
                routed = _Routed(own_expert, own_gate, self.config.num_experts)
                self.group(layer, stack, start, stop, kernels, results, own_h, inputs, routed, row)
            with self.stages("exchange"):
                unsorted = np.empty_like(results)
                unsorted[order] = results
                returned = self.processes.exchange([{"y": part} for part in np.split(unsorted, counts)])
                for rows, part in zip(wanted, returned, strict=True):
                    y[rows] += part["y"]

    def rows_everywhere(self, rows: np.ndarray, own: np.ndarray, h: np.ndarray) -> dict[str, np.ndarray]:
        """These rows of h on every process."""
        at = np.flatnonzero(np.isin(own, rows))
        received = self.processes.exchange([{"row": own[at], "h": h[at]}] * self.processes.count)
        return {name: np.concatenate([r[name] for r in received]) for name in ("row", "h")}

    def add_experts(self, x, h, routed: _Routed, start: int, stop: int, kernels: list) -> None:
        """Expert by expert, so that what a token gets doesn't depend on which experts make a group, to the bit."""
        device = jax.local_devices()[0]
        for e in range(start, stop):
            tokens, gates = routed.to_expert(e)
            if not len(tokens):
                continue
            matrices = jax.device_put([kernel[e - start] for kernel in kernels], device)
            for rows in _chunks(np.arange(len(tokens)), self.settings.tokens_per_expert_call):
                rows, gate = tokens[rows], gates[rows]
                padded = _pad(rows, len(x))
                y = _gated_expert(
                    np.take(h, padded, axis=0, mode="clip"), np.pad(gate, (0, len(padded) - len(rows))), matrices
                )
                x[rows] += np.asarray(y)[: len(rows)]

    def add_group(self, x, h, routed: _Routed, start: int, stop: int, kernels: list) -> None:
        """All tokens of a group of experts at once."""
        mesh = None if self.settings.mesh is None else part_of_mesh(self.settings.mesh, stop - start)
        kernels = [place_experts(kernel, mesh) for kernel in kernels]
        for choice, (order, begins) in enumerate(zip(routed.orders, routed.begins, strict=True)):
            group = order[begins[start] : begins[stop]]  # In one choice no token occurs twice.
            own, gate = routed.expert[:, choice] - start, routed.gate[:, choice]
            if mesh is not None:
                self.experts_over_mesh(mesh, np.sort(group), x, h, own, gate, kernels)
                continue
            for rows in _chunks(group, self.settings.tokens_per_expert_call):
                sizes = np.bincount(own[rows], minlength=stop - start)
                padded = _pad(rows, len(x))
                y = _gated_experts(
                    np.take(h, padded, axis=0, mode="clip"),
                    np.take(gate, padded, mode="clip"),
                    kernels,
                    sizes.astype(np.int32),
                )
                x[rows] += np.asarray(y)[: len(rows)]

    def experts_over_mesh(self, mesh, group, x, h, expert, gate, kernels) -> None:
        """x += gate * expert(h) for rows `group`, in any order; `expert` counts from the first of `kernels`."""
        for rows in _chunks(group, self.settings.tokens_per_expert_call):
            padded = _pad(rows, len(x))
            whose = np.full(len(padded), kernels[0].shape[0], np.int32)
            whose[: len(rows)] = expert[rows]
            inputs = (np.take(h, padded, axis=0, mode="clip"), whose, np.take(gate, padded, mode="clip"))
            y = _experts_over_mesh(mesh, *place_batch(inputs, mesh), kernels)
            x[rows] += np.asarray(y)[: len(rows)]

    def read_experts(self, layer: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
        own, done = self.own, self.own.start
        while done < own.stop:
            with self.stages("reading"):  # What isn't done in the background already.
                found, start, stop, kernels = next(self.stream, (None, 0, 0, {}))
                kernels = {m: _cut(k, start, max(start, own.start), min(stop, own.stop)) for m, k in kernels.items()}
                start, stop = max(start, own.start), min(stop, own.stop)
            if (found, start) != (layer, done):
                raise RuntimeError(f"{layer}: experts from {done} on were expected, but {found}, {start} came next.")
            done = stop
            yield start, stop, kernels
            del kernels

    # --- loss --------------------------------------------------------------------------------------------------------

    def losses(self, x: ListBuffer) -> DocumentLosses:
        names = ("decoder_norm",) if self.config.tied else ("decoder_norm", "logits_dense")
        params = {"decoder": {n: self.params(f"decoder/{n}/") for n in names}, "token_embedder": self.embedder}
        params = jax.device_put(params)
        total = np.zeros(len(self.documents.pairs))
        for batch in self.documents.batches:
            with self.stages("loss"):
                positions = x.positions(batch.indices, batch.decoder_input_tokens.shape[1])
                model = SwitchTransformer(self.config, self.settings.dtype)
                loss = _loss(model, params, x.get(positions), batch.decoder_target_tokens, batch.decoder_input_tokens)
                real = batch.indices >= 0
                total[batch.indices[real]] = np.asarray(loss, np.float64)[real]
            self.step()
        total = np.sum(self.processes.gather(total.tolist()), axis=0)  # All but one of these are zero.
        return DocumentLosses(total, self.documents.lengths["decoder"])


class _Routed:
    """Which tokens go to which expert: expert, gate [tokens, choices]. Expert `num_experts`: no choice."""

    def __init__(self, expert: np.ndarray, gate: np.ndarray, num_experts: int):
        self.expert, self.gate = expert, gate
        # Tokens in the order of their experts, and where each expert's begin, for each choice.
        self.orders = [np.argsort(choice, kind="stable") for choice in expert.T]
        bounds = np.arange(num_experts + 1)
        self.begins = [np.searchsorted(c[order], bounds) for c, order in zip(expert.T, self.orders, strict=True)]

    def to_expert(self, e: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that have chosen expert e, in order, and their gates."""
        routed = [order[b[e] : b[e + 1]] for order, b in zip(self.orders, self.begins, strict=True)]
        tokens = np.concatenate(routed)
        gates = np.concatenate([self.gate[rows, choice] for choice, rows in enumerate(routed)])
        in_order = np.argsort(tokens)
        return tokens[in_order], gates[in_order]


def _cut(kernel, first: int, start: int, stop: int):
    """Experts start:stop of a kernel that begins with expert `first`."""
    if stop - start == kernel.shape[0]:
        return kernel
    start, stop = start - first, stop - first
    return kernel.take(start, stop) if isinstance(kernel, CompressedExperts) else kernel[start:stop]


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for i in range(0, len(rows), size):
        yield rows[i : i + size]


def _pad(rows: np.ndarray, fill: int) -> np.ndarray:
    """Rows, and `fill` up to a power of two, so that few shapes are compiled."""
    padded = np.full(max(16, 1 << (len(rows) - 1).bit_length()), fill)
    padded[: len(rows)] = rows
    return padded


# --- jitted steps ----------------------------------------------------------------------------------------------------


def _mlp_or_route(layer, params, x, token_mask):
    """A dense layer's MLP is applied; a sparse layer's input and routing are returned instead."""
    if not layer.sparse:
        return layer.apply(params, x, token_mask, None, method="mlp_half"), None, None
    h = layer.apply(params, x, token_mask, method="mlp_input")
    return x, h, layer.apply(params, h, method="route")


@functools.partial(jax.jit, static_argnums=0)
def _encoder_layer(layer: EncoderLayer, params, x, tokens, shared_bias):
    params = {"params": params}
    token_mask, bias = encoder_masks(tokens, layer.dtype)
    x = layer.apply(params, x, token_mask, bias, shared_bias, method="attend")
    return _mlp_or_route(layer, params, x, token_mask)


@functools.partial(jax.jit, static_argnums=0)
def _decoder_layer(layer: DecoderLayer, params, x, encoded, tokens, shared_bias):
    params = {"params": params}
    masks = decoder_masks(*tokens, layer.dtype)
    x = layer.apply(params, x, encoded, masks, shared_bias, method="attend")
    return _mlp_or_route(layer, params, x, masks.token)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _norm(config: ModelConfig, dtype, params, x):
    return RMSNorm(config.d_model, dtype).apply({"params": params}, x)


@jax.jit
def _gated_expert(h, gate, kernels):
    """gate * expert(h) for one expert's rows; kernels [in, out]."""

    def dot(rows, kernel):
        return jnp.matmul(rows, kernel.astype(rows.dtype), preferred_element_type=jnp.float32).astype(rows.dtype)

    return gate[:, None].astype(h.dtype) * expert_mlp(h, kernels, dot)


@jax.jit
def _gated_experts(h, gate, kernels, group_sizes):
    """gate * expert(h) for rows sorted by expert."""
    return gate[:, None].astype(h.dtype) * expert_mlp(h, kernels, grouped(group_sizes))


@functools.partial(jax.jit, static_argnums=0)
def _experts_over_mesh(mesh: Mesh, h, expert, gate, kernels):
    return apply_experts(h, Routing(expert[:, None], gate[:, None]), kernels, mesh)


@functools.partial(jax.jit, static_argnums=0)
def _loss(model: SwitchTransformer, params, x, targets, inputs):
    """Summed cross-entropy of each document [batch], one document's logits in memory at a time."""
    token_mask = decoder_token_mask(inputs)[..., None].astype(model.dtype)
    y = model.apply({"params": params}, x, token_mask, method=lambda m, x, mask: m.decoder.finish(x, mask))

    def document(args):
        y, targets = args
        logits = model.apply({"params": params}, y[None], method="logits")[0]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(jnp.where(targets > 0, loss, 0.0))

    return jax.lax.map(document, (y, targets))
