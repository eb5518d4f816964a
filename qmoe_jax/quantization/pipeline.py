"""QMoE's compression: experts are quantized layer by layer while documents stream through the model (section 3).

For each group of experts, with the tokens that the router sends them:

    H_wi = 2/n X'X,  H_wo = 2/n A'A      X: the expert's inputs, A = activation(X wi), calibration tokens only
    Q    = GPTQ(W, H)                    every matrix of the group at once, sharded over devices
    trits, levels -> codec -> checkpoint

and all tokens then go through the quantized experts, so that later layers see what they will see in use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qmoe_jax import codecs, reporting
from qmoe_jax.checkpoints import Checkpoint, CompressedWriter
from qmoe_jax.checkpoints.base import is_expert_kernel
from qmoe_jax.codecs.experts import CompressedExperts, concatenate
from qmoe_jax.data import Examples, Vocabulary
from qmoe_jax.models import streaming
from qmoe_jax.models.layers import activate
from qmoe_jax.quantization.gptq import Quantized, gptq, round_to_nearest
from qmoe_jax.quantization.hessian import accumulate

METHODS = ("gptq", "rtn")
TERNARY = 1.5


@dataclasses.dataclass(frozen=True)
class QuantizationSettings:
    """How experts are quantized; the defaults are the paper's.

    Attributes:
      method: 'gptq', or 'rtn' (round to nearest).
      bits: 1.5 (ternary) or 2.
      block_size: GPTQ's columns per block.
      damping: GPTQ's dampening, relative to H's mean diagonal.
      group_size: columns that share a grid; None: one grid per row. Ternary with groups can't be stored.
      activation_order: GPTQ takes columns by falling diagonal of H.
      mask_special_tokens: leave sentinels, and decoder tokens that precede one, out of H (section 3.3).
      token_cap: most tokens in an expert's H, relative to calibration tokens / experts; the first ones are taken.
    """

    method: str = "gptq"
    bits: float = TERNARY
    block_size: int = 128
    damping: float = 0.1
    group_size: int | None = None
    activation_order: bool = False
    mask_special_tokens: bool = True
    token_cap: float = 4.0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"quantization.method: found {self.method!r}, expected one of {', '.join(METHODS)}.")
        if self.bits not in (1.5, 2):
            raise ValueError(f"quantization.bits: found {self.bits!r}, expected 1.5 (ternary) or 2.")
        for name in ("block_size", "group_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"quantization.{name}: found {size!r}, expected at least 1 column.")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"quantization.damping: found {self.damping!r}, expected a finite number, at least 0.")
        if not 0 < self.token_cap < math.inf:
            raise ValueError(f"quantization.token_cap: found {self.token_cap!r}, expected a finite number above 0.")


class LayerAccount(NamedTuple):
    """What became of a layer's experts.

    Attributes:
      tokens: calibration tokens in each expert's Hessian.
      fallback: why, for each expert that was rounded to nearest instead.
      zeros: share of zero weights.
      entropy: empirical entropy of the symbols of all its matrices, in bits per weight (mean over matrices).
      weights: how many weights it has.
      stored_bytes: of its compressed form, None if that isn't made.
    """

    tokens: dict[int, int]
    fallback: dict[int, str]
    zeros: float
    entropy: float
    weights: int
    stored_bytes: int | None


def entropy(symbols: np.ndarray) -> float:
    """Empirical entropy of symbols 0..3 in bits."""
    p = np.bincount(symbols.reshape(-1), minlength=4) / symbols.size
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


class Quantizer:
    """The hook that quantizes each group of experts, keeps account, and writes each layer when it is complete.

    Args:
      settings: how.
      calibration: per stack, bool [tokens] in the list buffers' order: which tokens calibrate.
      num_experts: experts per layer.
      codec: codec by name; None stores nothing.
      writer: where compressed layers go, None: nowhere.
      stages: where seconds are counted.
    """

    def __init__(
        self,
        settings: QuantizationSettings,
        calibration: dict[str, np.ndarray],
        num_experts: int,
        codec: str | None,
        writer: CompressedWriter | None,
        stages: reporting.Stages,
    ):
        self.settings, self.calibration, self.num_experts = settings, calibration, num_experts
        self.codec, self.writer, self.stages = codec, writer, stages
        self.accounts: dict[str, LayerAccount] = {}
        self._groups: dict[str, list[_Group]] = {}  # by layer

    def __call__(self, group: streaming.ExpertGroup) -> dict[str, Any]:
        sharding = expert_sharding(group.stop - group.start)
        kernels = {m: jax.device_put(jnp.asarray(k, jnp.float32), sharding) for m, k in group.kernels.items()}
        tokens = [t[self.calibration[group.stack][t]] for t in group.tokens]
        if self.settings.method == "gptq":
            cap = math.ceil(self.settings.token_cap * self.calibration[group.stack].sum() / self.num_experts)
            tokens = [t[:cap] for t in tokens]
            with self.stages("hessians"):
                hessians = expert_hessians(kernels, group.inputs, tokens, sharding)
        with self.stages("quantization"):
            quantized = {}
            for matrix, kernel in kernels.items():
                W = kernel.swapaxes(1, 2)  # [experts, out, in]: the quantizer's rows are outputs.
                if self.settings.method == "gptq":
                    H = hessians["wo" if matrix == "wo" else "wi"]
                    quantized[matrix] = self._gptq(W, H)
                else:
                    quantized[matrix] = round_to_nearest(
                        W, bits=self.settings.bits, group_size=self.settings.group_size
                    )
            jax.block_until_ready(quantized)
        with self.stages("encoding"):
            finished = self._finish_group(group, quantized, [len(t) for t in tokens])
            self._groups.setdefault(group.layer, []).append(finished)
            if group.stop == self.num_experts:
                self._finish_layer(group.layer)
        return {m: q.Q.swapaxes(1, 2) for m, q in quantized.items()}

    def _gptq(self, W: jax.Array, H: jax.Array) -> Quantized:
        s = self.settings
        return gptq(
            W,
            H,
            bits=s.bits,
            block_size=s.block_size,
            damping=s.damping,
            group_size=s.group_size,
            activation_order=s.activation_order,
        )

    def _finish_group(self, group, quantized: dict[str, Quantized], tokens: list[int]) -> _Group:
        symbols = {m: np.asarray(q.symbols) for m, q in quantized.items()}
        experts = {}
        if self.codec is not None:
            for matrix, q in quantized.items():
                experts[matrix] = CompressedExperts.from_trits(symbols[matrix], np.asarray(q.levels), self.codec)
        fallback = {}
        for i in range(group.stop - group.start):
            failed = [m for m, q in quantized.items() if bool(q.fallback[i])]
            if failed:
                unusable = f"the Hessian of {', '.join(failed)} is zero or its Cholesky factorisation failed"
                fallback[group.start + i] = "no calibration tokens" if tokens[i] == 0 else unusable
        return _Group(
            tokens=dict(zip(range(group.start, group.stop), tokens, strict=True)),
            fallback=fallback,
            zeros=sum(int((np.asarray(q.Q) == 0).sum()) for q in quantized.values()),
            weights=sum(s.size for s in symbols.values()),
            entropies=[entropy(s) for matrix in symbols.values() for s in matrix],
            experts=experts,
        )

    def _finish_layer(self, layer: str) -> None:
        groups = self._groups.pop(layer)
        seen = [e for g in groups for e in g.tokens]
        if seen != list(range(self.num_experts)):
            raise RuntimeError(f"{layer}: experts came as {seen}, expected each of {self.num_experts} once, in order.")
        experts = {m: concatenate([g.experts[m] for g in groups]) for m in groups[0].experts}
        tokens = {e: n for g in groups for e, n in g.tokens.items()}
        if self.writer is not None:
            self.writer.write_layer(layer, experts)
        weights = sum(g.weights for g in groups)
        self.accounts[layer] = LayerAccount(
            tokens=tokens,
            fallback={e: why for g in groups for e, why in g.fallback.items()},
            zeros=sum(g.zeros for g in groups) / weights,
            entropy=float(np.mean([h for g in groups for h in g.entropies])),
            weights=weights,
            stored_bytes=sum(e.nbytes for e in experts.values()) if experts else None,
        )


class _Group(NamedTuple):
    tokens: dict[int, int]
    fallback: dict[int, str]
    zeros: int
    weights: int
    entropies: list[float]
    experts: dict[str, CompressedExperts]


def expert_sharding(experts: int) -> NamedSharding:
    """Experts over as many local devices as divide them: a mesh with the axis 'expert'."""
    devices = jax.local_devices()
    count = math.gcd(experts, len(devices))
    return NamedSharding(Mesh(np.array(devices[:count]), ("expert",)), PartitionSpec("expert"))


def expert_hessians(
    kernels: dict[str, jax.Array],
    inputs: np.ndarray,
    tokens: Sequence[np.ndarray],
    sharding: NamedSharding,
    tokens_per_chunk: int = 512,
) -> dict[str, jax.Array]:
    """Hessians of the inputs of wi and of wo for a group of experts, from the unquantized experts.

    Args:
      kernels: by name, float32 [experts, in, out].
      inputs: [all tokens, d_model].
      tokens: per expert, rows of `inputs`.
      sharding: of the expert axis.
      tokens_per_chunk: tokens of each expert that are on the device at once.

    Returns:
      'wi' [experts, d_model, d_model] (of wi_0 and wi_1 too) and 'wo' [experts, d_ff, d_ff], float32.
    """
    experts, d_model = len(tokens), inputs.shape[1]
    d_ff = kernels["wo"].shape[1]
    most = max(map(len, tokens))
    chunk = min(tokens_per_chunk, max(16, 1 << (most - 1).bit_length()))

    def zeros(width):
        return jax.device_put(jnp.zeros((experts, width, width), jnp.float32), sharding)

    count = jax.device_put(jnp.zeros(experts, jnp.int32), sharding)
    state = (zeros(d_model), zeros(d_ff), count)
    for first in range(0, most, chunk):
        index = np.zeros((experts, chunk), np.int64)
        mask = np.zeros((experts, chunk), bool)
        for e, rows in enumerate(tokens):
            rows = rows[first : first + chunk]
            index[e, : len(rows)] = rows
            mask[e, : len(rows)] = True
        X, mask = jax.device_put((inputs[index], mask), sharding)
        state = _accumulate_both(state, kernels, X, mask)
    return {"wi": state[0], "wo": state[1]}


@jax.jit
def _accumulate_both(state, kernels, X, mask):
    H_wi, H_wo, n = state
    X = X.astype(jnp.float32)
    hidden = [jnp.einsum("eti,eio->eto", X, k) for m, k in sorted(kernels.items()) if m != "wo"]
    H_wo, _ = accumulate(H_wo, n, activate(hidden), mask)
    H_wi, n = accumulate(H_wi, n, X, mask)
    return H_wi, H_wo, n


def compress(
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    calibration: Examples | None,
    validation: Examples,
    quantization: QuantizationSettings,
    memory: streaming.Settings,
    *,
    codec: str | None = "dictionary",
    output: str | None = None,
    provenance: dict[str, Any] | None = None,
    what: str = "compressing",
) -> dict[str, Any]:
    """Quantizes all experts and measures the loss of the result on the validation documents.

    Args:
      checkpoint: the model; its weights are rounded to bfloat16 first, as the paper's are.
      vocabulary: tells sentinels.
      calibration: documents whose tokens make the Hessians; None will do for 'rtn'.
      validation: documents whose loss is measured.
      quantization: how.
      memory: how the streamed pass uses memory and devices.
      codec: how ternary experts are stored; None: sizes aren't measured. 2-bit experts have no codec yet.
      output: directory of the compressed checkpoint; None: nothing is written.
      provenance: kept in the manifest.
      what: the progress bar's label.

    Returns:
      The report, as JSON values.

    Raises:
      ValueError: 2-bit or grouped experts are to be stored; no calibration for 'gptq'; experts are compressed already.
      CheckpointError: a weight can't be read, or is NaN or Inf; then no checkpoint is left behind.
    """
    config = checkpoint.config
    if quantization.bits != TERNARY or quantization.group_size is not None:
        if output is not None:
            raise ValueError(
                f"{quantization.bits:g}-bit experts (group_size {quantization.group_size}) can't be stored yet: the "
                "codecs hold one ternary grid per row. Measure them without saving, or use bits 1.5 without group_size."
            )
        codec = None
    if codec is not None:
        codecs.get(codec)
    if not any(map(is_expert_kernel, checkpoint.specs)):
        raise ValueError(
            f"{checkpoint.path}: its experts are compressed already. Give the checkpoint it was made from."
        )
    if quantization.method == "gptq" and calibration is None:
        raise ValueError("GPTQ needs calibration documents.")
    stages = reporting.Stages()
    memory = memory._replace(round_weights=True)
    pairs = [*calibration.pairs, *validation.pairs] if quantization.method == "gptq" else validation.pairs
    num_calibration = len(pairs) - len(validation.pairs)
    masks = _calibration_masks(pairs, num_calibration, vocabulary, quantization.mask_special_tokens)

    def run(writer):
        hook = Quantizer(quantization, masks, config.num_experts, codec, writer, stages)
        losses = streaming.run(checkpoint, pairs, memory, hook=hook, stages=stages, what=what)
        missing = set(config.sparse_layers) - set(hook.accounts)
        if missing:
            raise RuntimeError(f"Sparse layers {sorted(missing)} were not quantized.")
        if writer is not None:
            with stages("writing"):
                writer.finish({n: checkpoint.read(n) for n in checkpoint.specs if not is_expert_kernel(n)})
        return hook.accounts, losses

    if output is None:
        accounts, losses = run(None)
    else:
        with CompressedWriter(output, config, dataclasses.asdict(quantization), codec, provenance or {}) as writer:
            accounts, losses = run(writer)
    validation_losses = streaming.DocumentLosses(*(a[num_calibration:] for a in losses))
    dense_weights = sum(math.prod(s.shape) for n, s in checkpoint.specs.items() if not is_expert_kernel(n))
    return {
        **validation_losses.summary(),
        "method": quantization.method,
        "bits": quantization.bits,
        "codec": codec,
        "num_calibration_documents": num_calibration,
        **_sizes(accounts, dense_weights),
        "experts_total": sum(len(a.tokens) for a in accounts.values()),
        "experts_quantized": sum(len(a.tokens) - len(a.fallback) for a in accounts.values()),
        "experts_fallback": sum(len(a.fallback) for a in accounts.values()),
        "layers": {
            layer: {
                "zeros": a.zeros,
                "entropy_per_weight": a.entropy,
                "bits_per_weight": None if a.stored_bytes is None else 8 * a.stored_bytes / a.weights,
                "tokens_per_expert": list(a.tokens.values()),
                "fallback": {str(e): why for e, why in a.fallback.items()},
            }
            for layer, a in accounts.items()
        },
        "seconds": stages.report(),
        "peak_rss_bytes": reporting.peak_rss_bytes(),
    }


def _sizes(accounts: dict[str, LayerAccount], dense_weights: int) -> dict[str, Any]:
    """Rates against bfloat16; everything that isn't experts counts as bfloat16 on both sides."""
    weights = sum(a.weights for a in accounts.values())
    stored = [a.stored_bytes for a in accounts.values()]
    expert_bytes = None if None in stored else sum(stored)
    sizes = {
        "zeros": sum(a.zeros * a.weights for a in accounts.values()) / weights,
        "entropy_per_weight": sum(a.entropy * a.weights for a in accounts.values()) / weights,
        "expert_weights": weights,
        "bytes_bfloat16": 2 * (weights + dense_weights),
        "bytes_experts": expert_bytes,
        "bytes_model": None,
        "bits_per_weight": None,
        "compression_experts": None,
        "compression_model": None,
    }
    if expert_bytes is not None:
        model_bytes = expert_bytes + 2 * dense_weights
        sizes |= {
            "bytes_model": model_bytes,
            "bits_per_weight": 8 * expert_bytes / weights,
            "compression_experts": 2 * weights / expert_bytes,
            "compression_model": sizes["bytes_bfloat16"] / model_bytes,
        }
    return sizes


def _calibration_masks(pairs, num_calibration: int, vocabulary: Vocabulary, mask_special: bool):
    """Per stack, which tokens in the list buffers' order calibrate: bool [tokens].

    Left out are sentinels in the encoder, and in the decoder tokens whose successor, the target, is one (section 3.3).
    """
    masks = {}
    for stack in ("encoder", "decoder"):
        tokens = [e if stack == "encoder" else d[1:] for e, d in pairs]
        flat = np.concatenate(tokens)
        mask = np.arange(len(flat)) < sum(map(len, tokens[:num_calibration]))
        masks[stack] = mask & ~vocabulary.is_sentinel(flat) if mask_special else mask
    return masks
