"""QMoE's compression: experts are quantized layer by layer while documents stream through the model (section 3).

For each group of experts, with the tokens that the router sends them:

    H_wi = 2/n X'X,  H_wo = 2/n A'A      X: the expert's inputs, A = activation(X wi), calibration tokens only
    Q    = GPTQ(W, H)                    every matrix of the group at once, sharded over devices
    trits, levels -> codec -> checkpoint

and all tokens then go through the quantized experts, so that later layers see what they will see in use.
"""

from __future__ import annotations

import dataclasses
import functools
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
from qmoe_jax.processes import Processes
from qmoe_jax.quantization import grids, statistics
from qmoe_jax.quantization.asymmetric import match_outputs
from qmoe_jax.quantization.gptq import Quantized, gptq, round_to_nearest
from qmoe_jax.quantization.grids import Grid
from qmoe_jax.quantization.hessian import accumulate
from qmoe_jax.quantization.output_error import OutputError, output_error
from qmoe_jax.quantization.progress import Progress, fingerprint
from qmoe_jax.quantization.rate_control import TRIAL, RateControl
from qmoe_jax.quantization.rate_distortion import rate_distortion, refit_levels

METHODS = ("gptq", "rtn", "rd")
TERNARY = 1.5

# What a setting is where it is None: the paper's recipe, and ours.
PAPER = dict(
    activation_order=False,
    mask_special_tokens=True,
    router_weighted=False,
    sequential=False,
    asymmetric=False,
    shrinkage=0.0,
    refits=0,
)
DEFAULT_TARGET_BITS = 0.7
MOST_TARGET_BITS = 1.8
# Before a layer is quantized for a target rate, rows of its first experts are tried: of so many experts, or of more
# that have so many weights.
TRIAL_EXPERTS = 4
TRIAL_WEIGHTS = 750_000
TRIAL_ROWS = 32  # of an expert for each Lagrangian, or more: what is stored beside them weighs little then
RATE_DISTORTION = dict(
    activation_order=True,
    mask_special_tokens=False,
    router_weighted=True,
    sequential=True,
    asymmetric=True,
    shrinkage=0.0,
    refits=2,
)


@dataclasses.dataclass(frozen=True)
class QuantizationSettings:
    """How experts are quantized; the defaults are the paper's. None is what the method wants.

    Attributes:
      method: 'gptq', 'rtn' (round to nearest), or 'rd' (GPTQ with rounding by rate and distortion, ternary).
      bits: 1.5 (ternary) or 2.
      block_size: GPTQ's columns per block.
      damping: GPTQ's dampening, relative to H's mean diagonal.
      group_size: columns that share a grid; None: one grid per row. With groups they can't be stored.
      token_cap: most tokens in an expert's H, relative to calibration tokens / experts; the first ones are taken.
      activation_order: GPTQ takes columns by falling diagonal of H.
      mask_special_tokens: leave sentinels, and decoder tokens that precede one, out of H (section 3.3). 'rd' needs them
        in: levels within the extremes would otherwise err most along the inputs that H doesn't know.
      router_weighted: weight tokens by the square of the probability by which the router multiplies their output.
      sequential: wo's Hessian is of the outputs of the quantized wi.
      asymmetric: wo is first fitted to give, on those, the outputs that it gave before. Needs `sequential`.
      shrinkage: weight, in tokens, of a sample of the layer's tokens that joins every expert's Hessians.
      refits: how often levels are fitted anew. 'rd' rounds before each time; 'gptq' is refitted once, at most.
      lagrangian: 'rd': squared error of an expert's output that one bit is worth. None: found for `target_bits`.
      target_bits: 'rd': bits per weight, as stored, of all experts together. None: see `lagrangian`.
      level_bits: 'rd': bits of mantissa of a level.
    """

    method: str = "gptq"
    bits: float = TERNARY
    block_size: int = 128
    damping: float = 0.1
    group_size: int | None = None
    token_cap: float = 4.0
    activation_order: bool | None = None
    mask_special_tokens: bool | None = None
    router_weighted: bool | None = None
    sequential: bool | None = None
    asymmetric: bool | None = None
    shrinkage: float | None = None
    refits: int | None = None
    lagrangian: float | None = None
    target_bits: float | None = None
    level_bits: int = 3

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
        for name, value in (RATE_DISTORTION if self.method == "rd" else PAPER).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.method == "rd":
            self._check_rate_distortion()
        elif self.lagrangian is not None or self.target_bits is not None:
            raise ValueError("quantization.lagrangian, .target_bits: only method 'rd' trades bits for error.")
        if not 0 <= self.shrinkage < math.inf:
            raise ValueError(f"quantization.shrinkage: found {self.shrinkage!r}, expected a finite number, at least 0.")
        if type(self.refits) is not int or self.refits not in range(2 if self.method == "gptq" else 100):
            raise ValueError(f"quantization.refits: found {self.refits!r}, expected 0 or more (gptq: 0 or 1).")
        if self.method == "gptq" and self.refits and (self.bits != TERNARY or self.group_size is not None):
            raise ValueError("quantization.refits: only ternary levels without group_size can be refitted.")
        if self.asymmetric and not self.sequential:
            raise ValueError("quantization.asymmetric: needs quantization.sequential=true.")

    def _check_rate_distortion(self) -> None:
        if self.bits != TERNARY or self.group_size is not None:
            raise ValueError("quantization.method 'rd' makes ternary experts (bits 1.5) without group_size.")
        if (self.lagrangian is None) == (self.target_bits is None):
            if self.lagrangian is not None:
                raise ValueError("quantization: give lagrangian or target_bits, not both.")
            object.__setattr__(self, "target_bits", DEFAULT_TARGET_BITS)
        for name in ("lagrangian", "target_bits"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"quantization.{name}: found {value!r}, expected a finite number above 0.")
        if self.target_bits is not None and not 0.05 <= self.target_bits <= MOST_TARGET_BITS:
            raise ValueError(
                f"quantization.target_bits: found {self.target_bits!r}, expected 0.05 to {MOST_TARGET_BITS} bits per "
                "weight, which is what ternary weights can carry."
            )
        if self.level_bits not in range(8):
            raise ValueError(f"quantization.level_bits: found {self.level_bits!r}, expected 0 to 7.")

    @property
    def calibrated(self) -> bool:
        """Whether calibration documents are needed."""
        return self.method != "rtn"


def why_not_stored(quantization: QuantizationSettings, codec: str) -> str | None:
    """Why the codec can't hold such experts, and what to do; None if it can. Raises ValueError for an unknown codec."""
    held = codecs.get(codec).LEVELS
    levels = 2 if quantization.bits == TERNARY else 3
    if quantization.group_size is not None:
        return (
            f"{quantization.bits:g}-bit experts with group_size {quantization.group_size} can't be stored: codecs hold "
            "one grid per row. Leave group_size out, or measure without saving."
        )
    if levels not in held:
        others = [name for name, other in codecs.CODECS.items() if levels in other.LEVELS]
        return (
            f"{quantization.bits:g}-bit experts can't be stored by the codec {codec!r}. Use the codec "
            f"{' or '.join(map(repr, others))}, or measure without saving."
        )
    return None


class LayerAccount(NamedTuple):
    """What became of a layer's experts.

    Attributes:
      tokens: calibration tokens in each expert's Hessian.
      fallback: why, for each expert that wasn't quantized by its own tokens: most are rounded to nearest.
      overloaded: how many calibration tokens were routed to each expert that had more than may be in its Hessian.
      zeros: share of zero weights.
      entropy: empirical entropy of the symbols of all its matrices, in bits per weight (mean over matrices).
      weights: how many weights it has.
      stored_bytes: of its compressed form, None if that isn't made.
      output_error: what its outputs on validation tokens have lost.
    """

    tokens: dict[int, int]
    fallback: dict[int, str]
    overloaded: dict[int, int]
    zeros: float
    entropy: float
    weights: int
    stored_bytes: int | None
    output_error: OutputError

    def to_json(self) -> dict[str, Any]:
        fields = self._asdict() | {"output_error": [a.tolist() for a in self.output_error]}
        return {k: list(v.items()) if isinstance(v, dict) else v for k, v in fields.items()}  # JSON's keys are strings.

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> LayerAccount:
        error = OutputError(*(np.array(a, np.float64) for a in fields["output_error"]))
        by_expert = {name: dict(fields[name]) for name in ("tokens", "fallback", "overloaded")}
        return cls(**fields | by_expert | {"output_error": error})


def entropy(symbols: np.ndarray) -> float:
    """Empirical entropy of symbols 0..3 in bits."""
    p = np.bincount(symbols.reshape(-1), minlength=4) / symbols.size
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


class Quantizer:
    """The hook that quantizes each group of experts, keeps account, and writes each layer in `finish_layer`.

    Args:
      settings: how.
      calibration: per stack, bool [tokens] in the list buffers' order: which tokens calibrate.
      validation: likewise, which are measured on.
      num_experts: experts per layer.
      codec: codec by name; None stores nothing.
      writer: where compressed layers go, None: nowhere.
      stages: where seconds are counted.
      control: finds the Lagrangian for a target rate.
      own: the experts of every layer that this process quantizes, None: all.
      processes: which together quantize all of them.
    """

    def __init__(
        self,
        settings: QuantizationSettings,
        calibration: dict[str, np.ndarray],
        validation: dict[str, np.ndarray],
        num_experts: int,
        codec: str | None,
        writer: CompressedWriter | None,
        stages: reporting.Stages,
        control: RateControl | None = None,
        own: range | None = None,
        processes: Processes | None = None,
    ):
        self.settings, self.num_experts = settings, num_experts
        self.calibration, self.validation = calibration, validation
        self.codec, self.writer, self.stages = codec, writer, stages
        self.control = control
        self.own, self.processes = own or range(num_experts), processes or Processes()
        self.sample = {stack: statistics.sample_rows(np.flatnonzero(mask)) for stack, mask in calibration.items()}
        self.accounts: dict[str, LayerAccount] = {}
        self._groups: dict[str, list[_Group]] = {}  # by layer
        self._lagrangians: dict[str, float] = {}  # of this layer, by matrix name

    def __call__(self, group: streaming.ExpertGroup) -> dict[str, Any]:
        s = self.settings
        if group.start == self.own.start:
            self._lagrangians = {}
        tokens = [t[self.calibration[group.stack][t]] for t in group.tokens]
        overloaded = {}
        if s.calibrated:
            cap = math.ceil(s.token_cap * self.calibration[group.stack].sum() / self.num_experts)
            overloaded = {e: len(t) for e, t in enumerate(tokens, group.start) if len(t) > cap}
            tokens = [t[:cap] for t in tokens]
        quantized = self._quantize_group(group, tokens)
        replacement = {m: q.Q.swapaxes(1, 2) for m, q in quantized.items()}
        with self.stages("output error"):
            error = self._output_error(group, replacement)
        with self.stages("encoding"):
            finished = self._finish_group(group, quantized, [len(t) for t in tokens], error)
            finished = finished._replace(overloaded=overloaded)
            self._groups.setdefault(group.layer, []).append(finished)
        return replacement

    def _quantize_group(self, group: streaming.ExpertGroup, tokens: list[np.ndarray]) -> dict[str, Quantized]:
        s, count = self.settings, group.stop - group.start
        if count == 1:  # XLA computes one alone differently than several.
            twice = {m: np.repeat(k, 2, axis=0) for m, k in group.kernels.items()}
            group, tokens = group._replace(kernels=twice, tokens=2 * group.tokens, gates=2 * group.gates), 2 * tokens
        sharding = expert_sharding(len(tokens))
        kernels = {m: jax.device_put(jnp.asarray(k, jnp.float32), sharding) for m, k in group.kernels.items()}
        if s.method == "rtn":
            quantized = self._round_to_nearest(kernels)
        elif s.router_weighted or s.sequential or s.shrinkage or s.method == "rd":
            quantized = self._quantize_in_turn(kernels, group, tokens, sharding)
        else:
            quantized = self._gptq(kernels, group.inputs, tokens, sharding)
        return quantized if count > 1 else jax.tree.map(lambda a: a[:1], quantized)

    def state(self) -> dict[str, Any]:
        """What it has to know, between two layers, to go on: JSON values."""
        control = None if self.control is None else self.control.state()
        return {"accounts": {layer: a.to_json() for layer, a in self.accounts.items()}, "control": control}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self.accounts = {layer: LayerAccount.from_json(a) for layer, a in state["accounts"].items()}
        if self.control is not None:
            self.control.restore(state["control"])

    def _output_error(self, group, quantized) -> OutputError:
        measured = [self.validation[group.stack][t] for t in group.tokens]
        tokens, gates = ([a[m] for a, m in zip(of, measured, strict=True)] for of in (group.tokens, group.gates))
        return output_error(
            group.kernels, quantized, group.inputs, tokens, gates, expert_sharding(group.stop - group.start)
        )

    def _round_to_nearest(self, kernels) -> dict[str, Quantized]:
        s = self.settings
        with self.stages("quantization"):
            quantized = {
                m: round_to_nearest(k.swapaxes(1, 2), bits=s.bits, group_size=s.group_size) for m, k in kernels.items()
            }
            return {m: self._as_stored(q) for m, q in jax.block_until_ready(quantized).items()}

    def _gptq(self, kernels, inputs, tokens, sharding) -> dict[str, Quantized]:
        """The paper's recipe: Hessians of both matrices from the unquantized expert."""
        with self.stages("hessians"):
            hessians = jax.block_until_ready(expert_hessians(kernels, inputs, tokens, sharding))
        return {m: self._quantize(m, k, hessians["wo" if m == "wo" else "wi"]) for m, k in kernels.items()}

    def _quantize_in_turn(self, kernels, group, tokens, sharding) -> dict[str, Quantized]:
        """wi, and then wo with what the quantized wi gives it."""
        s = self.settings
        samples = statistics.weighted_tokens(
            tokens,
            [g[np.isin(t, own)] for g, t, own in zip(group.gates, group.tokens, tokens, strict=True)],
            self.sample[group.stack],
            router_weighted=s.router_weighted,
            shrinkage=s.shrinkage,
        )
        with self.stages("hessians"):
            H = statistics.input_hessians(group.inputs, samples, sharding)
            importance = statistics.hidden_importance(kernels, group.inputs, samples, sharding)
            jax.block_until_ready((H, importance))
        quantized = {m: self._quantize(m, k, H, importance=importance.get(m)) for m, k in kernels.items() if m != "wo"}
        wi = {m: q.Q.swapaxes(1, 2) for m, q in quantized.items()} if s.sequential else kernels
        with self.stages("hessians"):
            H, R = statistics.hidden_statistics(kernels, wi, group.inputs, samples, sharding, residuals=s.asymmetric)
            jax.block_until_ready((H, R))
        quantized["wo"] = self._quantize("wo", kernels["wo"], H, R=R)
        return {m: quantized[m] for m in kernels}

    def _quantize(self, matrix: str, kernel, H, *, R=None, importance=None) -> Quantized:
        """One matrix of all experts of the group.

        Args:
          matrix: its name.
          kernel: [experts, in, out].
          H: Hessians [experts, in, in].
          R: see `asymmetric`.
          importance: [experts, out], what an output's squared error counts; None: all equally.
        """
        s = self.settings
        with self.stages("quantization"):
            W = kernel.swapaxes(1, 2)  # [experts, out, in]: the quantizer's rows are outputs.
            if R is not None:
                W = match_outputs(W, H, R, damping=s.damping, block_size=s.block_size)
            if s.method == "rd":
                if importance is None:
                    importance = jax.device_put(jnp.ones(W.shape[:2]), expert_sharding(len(W)))
                lagrangian = s.lagrangian or self._find_lagrangian(matrix, W, H, importance)
                quantized = self._rate_distortion(W, H, lagrangian, importance)
            else:
                quantized = gptq(
                    W,
                    H,
                    bits=s.bits,
                    block_size=s.block_size,
                    damping=s.damping,
                    group_size=s.group_size,
                    activation_order=s.activation_order,
                )
                if s.refits:
                    quantized = refit_levels(W, H, quantized, damping=s.damping)
            return self._as_stored(jax.block_until_ready(quantized))

    def _find_lagrangian(self, matrix: str, W, H, importance) -> float:
        """Found once for all experts of the layer, by the process that has its first ones, from these."""
        if matrix not in self._lagrangians:
            found = self._try_lagrangians(matrix, W, H, importance) if self.processes.first else None
            self._lagrangians[matrix] = self.processes.from_first(found)
        return self._lagrangians[matrix]

    def _try_lagrangians(self, matrix: str, W, H, importance) -> float:
        few = trial_experts(self.num_experts, math.prod(W.shape[1:]))
        if len(W) < few:
            raise ValueError(
                f"The first group has {len(W)} experts, but {few} are tried for target_bits: make it larger."
            )
        W, H, importance = jax.device_put((W[:few], H[:few], importance[:few]), expert_sharding(few))
        mean_square = np.float64(_weighted_mean_square(W, H, importance))
        weights = self.num_experts * math.prod(W.shape[1:])
        # In place of all rows, the same few for each Lagrangian: shapes that `rate_distortion` is compiled for anyway.
        trials, rows = len(TRIAL), W.shape[1]
        tried = max(rows, trials * min(rows, TRIAL_ROWS))
        codes = np.arange(tried) * trials // tried
        counts, starts = np.bincount(codes), np.searchsorted(codes, np.arange(trials))
        taken = (np.arange(tried) - starts[codes]) * rows // counts[codes]  # those of one Lagrangian evenly spread
        W, importance = W[:, taken], importance[:, taken]

        def rates(lagrangians: Sequence[float]) -> list[float]:
            quantized = self._rate_distortion(W, H, np.array(lagrangians)[codes], importance, codes)
            return [self._rate(quantized, codes == i) for i in range(trials)]

        return self.control.find(matrix, weights, 0.3 * mean_square, rates)

    def _rate_distortion(self, W, H, lagrangian, importance, codes=None) -> Quantized:
        """With one Lagrangian, or one for each row; see `rate_distortion` for `codes`."""
        s = self.settings
        return rate_distortion(
            W,
            H,
            lagrangian / importance,
            codes=codes,
            refits=s.refits,
            level_bits=s.level_bits,
            block_size=s.block_size,
            damping=s.damping,
            activation_order=s.activation_order,
        )

    def _as_stored(self, quantized: Quantized) -> Quantized:
        return quantized if self.codec is None or self.settings.bits == TERNARY else _in_three_levels(quantized)

    def _rate(self, quantized: Quantized, rows: np.ndarray) -> float:
        """Bits as stored, per weight of these rows; without a codec the entropy of the symbols is all that counts."""
        symbols, levels = (np.asarray(a)[:, rows] for a in (quantized.symbols, quantized.levels))
        if self.codec is None:
            return float(np.mean([entropy(s) for s in symbols]))
        return 8 * CompressedExperts.from_symbols(symbols, levels, self.codec).nbytes / symbols.size

    def _finish_group(self, group, quantized: dict[str, Quantized], tokens: list[int], error: OutputError) -> _Group:
        symbols = {m: np.asarray(q.symbols) for m, q in quantized.items()}
        experts = {}
        if self.codec is not None:
            encode = functools.partial(CompressedExperts.from_symbols, codec=self.codec)
            experts = {m: encode(symbols[m], np.asarray(q.levels)) for m, q in quantized.items()}
        fallback = {}
        for i in range(group.stop - group.start):
            failed = [m for m, q in quantized.items() if bool(q.fallback[i])]
            if failed:
                unusable = f"the Hessian of {', '.join(failed)} is zero or its Cholesky factorisation failed"
                fallback[group.start + i] = "no calibration tokens" if tokens[i] == 0 else unusable
            elif tokens[i] == 0 and self.settings.calibrated:
                fallback[group.start + i] = "no calibration tokens; a sample of the layer's stood for them"
        return _Group(
            tokens=dict(zip(range(group.start, group.stop), tokens, strict=True)),
            fallback=fallback,
            overloaded={},
            zeros=sum(int((np.asarray(q.Q) == 0).sum()) for q in quantized.values()),
            weights=sum(s.size for s in symbols.values()),
            entropies={m: [entropy(s) for s in matrix] for m, matrix in symbols.items()},
            nbytes={m: e.nbytes for m, e in experts.items()},
            experts=experts,
            output_error=error,
        )

    def finish_layer(self, layer: str) -> None:
        """Writes it, and accounts for it, once every process has had all of its groups."""
        with self.stages("encoding"):
            self._finish_layer(layer)

    def _finish_layer(self, layer: str) -> None:
        own = self._groups.pop(layer)
        groups = _gather_groups(self.processes, own)
        seen = [e for g in groups for e in g.tokens]
        if seen != list(range(self.num_experts)):
            raise RuntimeError(f"{layer}: experts came as {seen}, expected each of {self.num_experts} once, in order.")
        if self.writer is not None:
            self.writer.write_layer(layer, {m: concatenate([g.experts[m] for g in own]) for m in own[0].experts})
        tokens = {e: n for g in groups for e, n in g.tokens.items()}
        nbytes = {m: sum(g.nbytes[m] for g in groups) for m in groups[0].nbytes}
        weights = sum(g.weights for g in groups)
        entropies = {m: [h for g in groups for h in g.entropies[m]] for m in groups[0].entropies}
        if self.control is not None and self.processes.first:
            for m, each in entropies.items():
                count = weights // len(entropies)  # wi and wo are of one size.
                self.control.spent(m, 8 * nbytes[m] / count if nbytes else float(np.mean(each)), count)
        self.accounts[layer] = LayerAccount(
            tokens=tokens,
            fallback={e: why for g in groups for e, why in g.fallback.items()},
            overloaded={e: n for g in groups for e, n in g.overloaded.items()},
            zeros=sum(g.zeros for g in groups) / weights,
            entropy=float(np.mean(list(entropies.values()))),
            weights=weights,
            stored_bytes=sum(nbytes.values()) if nbytes else None,
            output_error=OutputError(*map(np.concatenate, zip(*(g.output_error for g in groups), strict=True))),
        )


@jax.jit
def _in_three_levels(quantized: Quantized) -> Quantized:
    """2-bit experts as they are stored, and the weights that these stand for."""
    symbols, levels = grids.three_levels(quantized.symbols, Grid(*jnp.unstack(quantized.levels, axis=-1)))
    values = jnp.pad(levels.astype(jnp.float32), ((0, 0), (0, 0), (1, 0)))  # [experts, rows, 4]
    Q = jnp.take_along_axis(values, symbols.astype(jnp.int32), axis=-1)
    return quantized._replace(Q=Q, symbols=symbols, levels=levels)


@jax.jit
def _weighted_mean_square(W, H, importance) -> jax.Array:
    """What all experts lose if all their weights become zero, roughly, per weight."""
    return jnp.mean(importance[..., None] * jnp.diagonal(H, axis1=1, axis2=2)[:, None] * W**2)


def trial_experts(num_experts: int, weights: int) -> int:
    """How many of a layer's experts are tried for a target rate; each has so many weights in a matrix.

    They are a group, or part of one: a number that divides all experts, if one is near, makes all groups alike.
    """
    enough = min(num_experts, max(TRIAL_EXPERTS, -(-TRIAL_WEIGHTS // weights)))
    return next((n for n in range(enough, 2 * enough) if num_experts % n == 0), enough)


class _Group(NamedTuple):
    tokens: dict[int, int]
    fallback: dict[int, str]
    overloaded: dict[int, int]
    zeros: int
    weights: int
    entropies: dict[str, list[float]]  # by matrix name, of each expert
    nbytes: dict[str, int]  # by matrix name, as stored
    experts: dict[str, CompressedExperts]  # by matrix name
    output_error: OutputError


def _gather_groups(processes: Processes, groups: list[_Group]) -> list[_Group]:
    """Of all processes, in order; those of others without their experts."""

    def told(group):
        items = {name: list(getattr(group, name).items()) for name in ("tokens", "fallback", "overloaded")}
        return group._asdict() | items | {"experts": {}, "output_error": [a.tolist() for a in group.output_error]}

    def heard(fields):
        items = {name: dict(fields[name]) for name in ("tokens", "fallback", "overloaded")}
        return _Group(**fields | items | {"output_error": OutputError(*map(np.array, fields["output_error"]))})

    return [heard(fields) for own in processes.gather(list(map(told, groups))) for fields in own]


def expert_sharding(experts: int) -> NamedSharding:
    """Experts over local devices, as many on each and at least two: a mesh with the axis 'expert'.

    XLA computes an expert alone differently, to the bit, than several.
    """
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if experts % n == 0 and (n == 1 or experts // n > 1))
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
      tokens_per_chunk: tokens of each expert that are on the device at once; sums are to the bit the same only where
        this is.

    Returns:
      'wi' [experts, d_model, d_model] (of wi_0 and wi_1 too) and 'wo' [experts, d_ff, d_ff], float32.
    """
    experts, d_model = len(tokens), inputs.shape[1]
    d_ff = kernels["wo"].shape[1]
    most = max(map(len, tokens))

    def zeros(width):
        return jax.device_put(jnp.zeros((experts, width, width), jnp.float32), sharding)

    count = jax.device_put(jnp.zeros(experts, jnp.int32), sharding)
    state = (zeros(d_model), zeros(d_ff), count)
    for first in range(0, most, tokens_per_chunk):
        index = np.zeros((experts, tokens_per_chunk), np.int64)
        mask = np.zeros((experts, tokens_per_chunk), bool)
        for e, rows in enumerate(tokens):
            rows = rows[first : first + tokens_per_chunk]
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
    codec: str | None = "gap",
    output: str | None = None,
    provenance: dict[str, Any] | None = None,
    num_shards: int | None = None,
    resume: bool = True,
    keep_progress: bool = False,
    what: str = "compressing",
) -> dict[str, Any]:
    """Quantizes all experts and measures the loss of the result on the validation documents.

    With `output`, sparse layers are committed when they are done, as often as `memory.commit_share` allows (see
    `progress`). If the run ends before it is through, however it ends, the same call goes on after the last one that
    was committed, and gives the same bytes.

    Args:
      checkpoint: the model; its weights are rounded to bfloat16 first, as the paper's are.
      vocabulary: tells sentinels.
      calibration: documents whose tokens make the Hessians; None will do for 'rtn'.
      validation: documents whose loss is measured.
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
      ValueError: experts are to be stored that the codec doesn't hold; no calibration for 'gptq'; experts are
        compressed already; activations become NaN or Inf.
      OtherRunError: the interrupted run in `output` had other data or settings, or another checkpoint.
      CheckpointError: a weight can't be read, or is NaN or Inf; then no checkpoint is left behind, only what was
        committed.
    """
    config = checkpoint.config
    if codec is not None and (problem := why_not_stored(quantization, codec)):
        if output is not None:
            raise ValueError(problem)
        codec = None
    if not any(map(is_expert_kernel, checkpoint.specs)):
        raise ValueError(
            f"{checkpoint.path}: its experts are compressed already. Give the checkpoint it was made from."
        )
    if quantization.calibrated and calibration is None:
        raise ValueError(f"quantization.method {quantization.method!r} needs calibration documents.")
    stages, processes = reporting.Stages(), Processes()
    if processes.count > 1 and config.experts_choose is not None:
        raise ValueError("Experts that choose their tokens are compressed by one process: the sums depend on how many.")
    memory = memory._replace(round_weights=True)
    if quantization.target_bits is not None:
        few = trial_experts(config.num_experts, config.d_model * config.d_ff)
        memory = memory._replace(experts_per_group=max(memory.experts_per_group, few))
    pairs = [*calibration.pairs, *validation.pairs] if quantization.calibrated else validation.pairs
    num_calibration = len(pairs) - len(validation.pairs)
    masks = _calibration_masks(pairs, num_calibration, vocabulary, quantization.mask_special_tokens)
    measured = _validation_masks(pairs, num_calibration)

    control = None
    if quantization.target_bits is not None:
        control = RateControl(quantization.target_bits, _weights_by_matrix(checkpoint.specs))

    def run(writer=None, progress=None):
        own = processes.share(config.num_experts) if writer is None else writer.own
        if quantization.target_bits is not None and (found := processes.from_first(len(own))) < few:
            raise ValueError(
                f"quantization.target_bits: {few} experts of each layer are tried by the first process, which would "
                f"have {found}: take fewer processes."
            )
        hook = Quantizer(
            quantization,
            masks,
            measured,
            config.num_experts,
            codec,
            writer,
            stages,
            control,
            own=own,
            processes=processes,
        )

        def commit(stack, layers, arrays):
            if not progress.due(arrays):
                return
            state = {"stack": stack, "layers": layers, "kept": writer.layers, "quantizer": hook.state()}
            progress.commit(state, arrays)

        position = None
        if progress is not None and (committed := progress.committed):
            hook.restore(committed["quantizer"])
            position = streaming.Position(committed["stack"], committed["layers"], progress.fill)
        losses = streaming.run(
            checkpoint,
            pairs,
            memory,
            hook=hook,
            finish=hook.finish_layer,
            sample=hook.sample,
            processes=processes,
            experts=own,
            stages=stages,
            what=what,
            position=position,
            commit=None if progress is None else commit,
        )
        missing = set(config.sparse_layers) - set(hook.accounts)
        if missing:
            raise RuntimeError(f"Sparse layers {sorted(missing)} were not quantized.")
        if writer is not None:
            with stages("writing"):
                dense = [n for n in checkpoint.specs if not is_expert_kernel(n)] if processes.first else []
                writer.finish({n: checkpoint.read(n) for n in dense})
        return hook.accounts, losses

    if output is None:
        accounts, losses = run()
    else:
        settings = {
            "quantization": dataclasses.asdict(quantization),
            "codec": codec,
            "num_shards": num_shards,
            "model.dtype": str(jnp.dtype(memory.dtype)),
            "memory.tokens_per_batch": memory.tokens_per_batch,
            "memory.tokens_per_expert_call": memory.tokens_per_expert_call,
        }
        identity = fingerprint(checkpoint, pairs[:num_calibration], validation.pairs, settings)
        progress = Progress(output, identity, resume, processes, memory.commit_share)
        kept = progress.committed["kept"] if progress.committed else None
        if kept and processes.first:
            reporting.say(f"{output}: going on after {len(kept)} of {len(config.sparse_layers)} sparse layers")
        manifest = (config, dataclasses.asdict(quantization), codec, provenance or {}, num_shards)
        try:
            with CompressedWriter(output, *manifest, layers=kept, processes=processes) as writer:
                try:
                    accounts, losses = run(writer, progress)
                except BaseException:
                    writer.keep(progress.stored()["kept"] if progress.stored() else {})
                    raise
        except BaseException:
            stored = progress.stored()
            if stored and processes.first:
                reporting.say(
                    f"{output}: {len(stored['kept'])} of {len(config.sparse_layers)} sparse layers are committed; run "
                    "the same command to go on after them"
                )
            elif processes.first:
                progress.remove()
            raise
        if not keep_progress and processes.first:
            progress.remove()
    validation_losses = streaming.DocumentLosses(*(a[num_calibration:] for a in losses))
    dense_weights = sum(math.prod(s.shape) for n, s in checkpoint.specs.items() if not is_expert_kernel(n))
    return {
        **validation_losses.summary(),
        "method": quantization.method,
        "bits": quantization.bits,
        "target_bits": quantization.target_bits,
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
                "overloaded": {str(e): n for e, n in a.overloaded.items()},
                "output_error": a.output_error.total(),
                "output_error_per_expert": a.output_error.relative(),
            }
            for layer, a in accounts.items()
        },
        "seconds": stages.report(),
        "peak_rss_bytes": reporting.peak_rss_bytes(),
    }


def _weights_by_matrix(specs) -> dict[str, int]:
    """How many of the model's weights are in experts' matrices of each name (wi, wo, ...)."""
    weights: dict[str, int] = {}
    for name, spec in specs.items():
        if is_expert_kernel(name):
            matrix = name.split("/")[-2]
            weights[matrix] = weights.get(matrix, 0) + math.prod(spec.shape)
    return weights


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


def _validation_masks(pairs, num_calibration: int) -> dict[str, np.ndarray]:
    """Per stack, which tokens in the list buffers' order are of validation documents: bool [tokens]."""
    lengths = {"encoder": [len(e) for e, _ in pairs], "decoder": [len(d) - 1 for _, d in pairs]}
    return {stack: np.arange(sum(n)) >= sum(n[:num_calibration]) for stack, n in lengths.items()}
