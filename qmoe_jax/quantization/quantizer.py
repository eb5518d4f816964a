"""QMoE's quantizer (section 3): each group of experts, with the tokens that the router sends them.

    H       = 2/n X'X              X: the experts' inputs, calibration tokens only
    H_last  = 2/n A'A              A: their hidden units, of the unquantized inner matrices or of the quantized ones
    Q       = method(W, H)         every matrix of the group at once, sharded over devices
    symbols, levels -> codec -> checkpoint

It is what a streamed pass (`streaming.run`) calls for each group, and all tokens then go through the quantized experts,
so that later layers see what they will see in use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax import resources
from qmoe_jax.codecs.experts import CompressedExperts, concatenate
from qmoe_jax.processes import Processes
from qmoe_jax.quantization import grids, shares, statistics
from qmoe_jax.quantization.account import GroupAccount, LayerAccount, gather_groups, group_account, layer_account
from qmoe_jax.quantization.asymmetric import match_outputs
from qmoe_jax.quantization.gptq import Quantized
from qmoe_jax.quantization.hidden_units import classes_of_columns, in_order_of_use
from qmoe_jax.quantization.methods import Priced
from qmoe_jax.quantization.output_error import OutputError, output_error
from qmoe_jax.quantization.rate_control import RateControl
from qmoe_jax.quantization.settings import QuantizationSettings
from qmoe_jax.quantization.sharding import expert_sharding
from qmoe_jax.quantization.trials import trial, trial_experts
from qmoe_jax.streaming.exchange import RoutedRows
from qmoe_jax.streaming.experts import ExpertGroup


class LayerWriter(Protocol):
    """Where compressed layers go."""

    def write_layer(self, layer: str, experts: Mapping[str, CompressedExperts]) -> None: ...


class Quantizer:
    """Quantizes each group of experts, keeps account, and writes each layer in `finish`. See `streaming.Quantizer`.

    Args:
      settings: how.
      calibration: per stream, bool [tokens] in the list buffers' order: which tokens calibrate.
      validation: likewise, which are measured on.
      num_experts: experts per layer.
      codec: codec by name; None stores nothing.
      writer: where compressed layers go, None: nowhere.
      stages: where seconds are counted.
      control: finds the Lagrangian for a target rate.
      own: the experts of every layer that this process quantizes, None: all.
      super_experts: by layer; see the method's `super_weight`.
      processes: which together quantize all of them.

    Attributes:
      accounts: of the layers so far, by name.
    """

    def __init__(
        self,
        settings: QuantizationSettings,
        calibration: Mapping[str, np.ndarray],
        validation: Mapping[str, np.ndarray],
        num_experts: int,
        codec: str | None,
        writer: LayerWriter | None,
        stages: resources.Stages,
        control: RateControl | None = None,
        own: range | None = None,
        processes: Processes | None = None,
        super_experts: Mapping[str, Sequence[int]] | None = None,
    ):
        self.settings, self.num_experts = settings, num_experts
        self.method, self.how = settings.rounding, settings.calibration
        self.min_tokens = self.how.min_tokens or 0
        self.calibration, self.validation = calibration, validation
        self.codec, self.writer, self.stages = codec, writer, stages
        self.control = control
        self.own, self.processes = own or range(num_experts), processes or Processes()
        self.super_experts = super_experts or {}
        sample = max(statistics.SAMPLE, self.min_tokens)
        self.sample: Mapping[str, np.ndarray] = {
            stream: statistics.sample_rows(np.flatnonzero(mask), sample) for stream, mask in calibration.items()
        }
        self.accounts: dict[str, LayerAccount] = {}
        self._groups: dict[str, list[GroupAccount]] = {}  # by layer
        self._found: dict[str, tuple[float, int | None]] = {}  # Lagrangian and steps of this layer, by matrix name
        self._classes: dict[str, int] = {}  # of columns, by matrix name; of those that may have several
        self._weights: np.ndarray | None = None  # of this layer's experts; None: all count equally

    def begin(self, layer: str, rows: np.ndarray, routed: RoutedRows) -> None:
        """Finds what each of the layer's experts counts, from all calibration tokens of all processes."""
        self._weights = None
        weights = np.ones(self.num_experts, np.float32)
        if power := getattr(self.method, "share_power", 0.0):
            own = self.calibration[routed.stream][rows]
            sums = shares.squared_gates(routed.expert[own], routed.gate[own], self.num_experts)
            weights = shares.weights(np.sum(self.processes.gather(sums.tolist()), axis=0), power)
        weights[list(self.super_experts.get(layer, ()))] *= getattr(self.method, "super_weight", 1.0)
        if (weights != 1).any():
            self._weights = weights

    def __call__(self, group: ExpertGroup) -> dict[str, Any]:
        if group.start == self.own.start:
            self._found = {}
        d_ff, d_model = group.kernels[group.expert.last].shape[1:]
        self._classes = {group.expert.last: classes_of_columns(group.expert, self.codec, d_model, d_ff)}
        tokens = [t[self.calibration[group.stream][t]] for t in group.tokens]
        overloaded: dict[int, int] = {}
        if self.method.calibrated:
            cap = math.ceil(self.how.token_cap * self.calibration[group.stream].sum() / self.num_experts)
            cap = max(cap, self.min_tokens)
            overloaded = {e: len(t) for e, t in enumerate(tokens, group.start) if len(t) > cap}
            tokens = [t[:cap] for t in tokens]
        quantized, peaks = self._quantize_group(group, tokens)
        if self._classes[group.expert.last] > 1:
            quantized = in_order_of_use(group.expert, quantized)
        replacement = group.kernels | {m: q.Q.swapaxes(1, 2) for m, q in quantized.items()}
        with self.stages("output error"):
            error = self._output_error(group, replacement)
        with self.stages("encoding"):
            counts = dict(enumerate(map(len, tokens), group.start))
            starved = {e: n for e, n in counts.items() if self.method.calibrated and n < self.min_tokens}
            largest = dict(zip(counts, peaks, strict=True)) if peaks else {}
            account = group_account(
                quantized,
                counts,
                overloaded,
                starved,
                largest,
                error,
                self.codec,
                self.method.calibrated,
                self._classes,
            )
            self._groups.setdefault(group.layer, []).append(account)
        return replacement

    def finish(self, layer: str) -> None:
        """Writes it, and accounts for it, once every process has had all of its groups."""
        with self.stages("encoding"):
            own = self._groups.pop(layer)
            groups = gather_groups(self.processes, own)
            seen = [e for g in groups for e in g.tokens]
            if seen != list(range(self.num_experts)):
                raise RuntimeError(
                    f"{layer}: experts came as {seen}, expected each of {self.num_experts} once, in order."
                )
            if self.writer is not None:
                self.writer.write_layer(layer, {m: concatenate([g.experts[m] for g in own]) for m in own[0].experts})
            if self.control is not None and self.processes.first:
                self._tell_control(self.control, groups)
            self.accounts[layer] = layer_account(groups)

    def state(self) -> dict[str, Any]:
        """What it has to know, between two layers, to go on: JSON values."""
        control = None if self.control is None else self.control.state()
        return {"accounts": {layer: a.to_json() for layer, a in self.accounts.items()}, "control": control}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self.accounts = {layer: LayerAccount.from_json(a) for layer, a in state["accounts"].items()}
        if self.control is not None:
            self.control.restore(state["control"])

    # --- One group ----------------------------------------------------------------------------------------------------

    def _quantize_group(self, group: ExpertGroup, tokens: list[np.ndarray]) -> tuple[dict[str, Quantized], list[float]]:
        """By matrix name; and each expert's largest output, where there is calibration."""
        count = group.stop - group.start
        if count == 1:  # XLA computes one alone differently than several.
            twice = {m: np.repeat(k, 2, axis=0) for m, k in group.kernels.items()}
            group = group._replace(kernels=twice, tokens=2 * list(group.tokens), gates=2 * list(group.gates))
            tokens = 2 * tokens
        sharding = expert_sharding(len(tokens))
        kernels = {m: jax.device_put(jnp.asarray(k, jnp.float32), sharding) for m, k in group.kernels.items()}
        peaks: list[float] = []
        if self.method.calibrated:
            quantized, peaks = self._calibrated(group, kernels, tokens, sharding)
        else:
            with self.stages("quantization"):
                quantized = {m: self._round(m, kernels[m].swapaxes(1, 2), None, None) for m in group.expert.matrices}
        return (quantized if count > 1 else jax.tree.map(lambda a: a[:1], quantized)), peaks[:count]

    def _calibrated(self, group: ExpertGroup, kernels, tokens, sharding) -> tuple[dict[str, Quantized], list[float]]:
        """The inner matrices, and then the last one with what these give it."""
        how, expert = self.how, group.expert
        with self.stages("super experts"):
            own = [statistics.Samples(rows, np.ones(len(rows), np.float32)) for rows in tokens]
            peaks = statistics.output_peaks(expert, kernels, group.inputs, own, sharding).tolist()
        samples = statistics.weighted_tokens(
            tokens,
            [g[np.isin(t, own)] for g, t, own in zip(group.gates, group.tokens, tokens, strict=True)],
            self.sample[group.stream],
            router_weighted=how.router_weighted,
            shrinkage=how.shrinkage,
            sample_starved=how.sample_starved,
            min_tokens=self.min_tokens,
        )
        importance, weight = {}, self._weight(group)
        with self.stages("hessians"):
            H = statistics.input_hessians(group.inputs, samples, sharding)
            if self.method.uses_importance:
                importance = statistics.hidden_importance(expert, kernels, group.inputs, samples, sharding)
            jax.block_until_ready((H, importance))
        quantized = {m: self._quantize(m, kernels[m], H, importance.get(m), weight=weight) for m in expert.inner}
        now = kernels
        if how.sequential:
            now = kernels | {m: q.Q.swapaxes(1, 2) for m, q in quantized.items()}
        with self.stages("hessians"):
            H, R = statistics.hidden_statistics(
                expert, kernels, now, group.inputs, samples, sharding, residuals=how.asymmetric
            )
            jax.block_until_ready((H, R))
        quantized[expert.last] = self._quantize(expert.last, kernels[expert.last], H, R=R, weight=weight)
        return quantized, peaks

    def _weight(self, group: ExpertGroup) -> np.ndarray | None:
        """What each expert's squared error counts, float32 [experts]; None: all equally."""
        if self._weights is None:
            return None
        return np.resize(self._weights[group.start : group.stop], len(group.tokens))

    def _quantize(self, matrix: str, kernel, H, importance=None, *, R=None, weight=None) -> Quantized:
        """One matrix of all experts of the group.

        Args:
          matrix: its name.
          kernel: [experts, in, out].
          H: Hessians [experts, in, in].
          importance: [experts, out], what an output's squared error counts; None: all equally.
          R: see `asymmetric`.
          weight: see `_weight`.
        """
        with self.stages("quantization"):
            W = kernel.swapaxes(1, 2)  # [experts, out, in]: the quantizer's rows are outputs.
            if R is not None:
                W = match_outputs(W, H, R, damping=self.how.damping, block_size=self.how.block_size)
            if importance is None and self.method.uses_importance:
                importance = jax.device_put(jnp.ones(W.shape[:2]), expert_sharding(len(W)))
            return self._round(matrix, W, H, importance, weight)

    def _round(self, matrix: str, W, H, importance, weight=None) -> Quantized:
        """The method itself; weights are those that the stored symbols and levels stand for."""
        weighted = importance if weight is None else importance * weight[:, None]
        if self.method.target_bits is None:
            quantized = self.method(W, H, weighted)
        else:
            lagrangian, steps = self._find_lagrangian(matrix, W, H, importance)
            wanted = {} if steps is None else {"steps": steps}
            quantized = cast(Priced, self.method).at(W, H, weighted, lagrangian, **wanted)
        return jax.block_until_ready(_as_stored(quantized))

    def _output_error(self, group: ExpertGroup, replacement) -> OutputError:
        measured = [self.validation[group.stream][t] for t in group.tokens]
        tokens, gates = ([a[m] for a, m in zip(of, measured, strict=True)] for of in (group.tokens, group.gates))
        sharding = expert_sharding(group.stop - group.start)
        return output_error(group.expert, group.kernels, replacement, group.inputs, tokens, gates, sharding)

    # --- A target rate ------------------------------------------------------------------------------------------------

    def _find_lagrangian(self, matrix: str, W, H, importance) -> tuple[float, int | None]:
        """That, and steps (see `trial`): once for all experts of the layer, by the process that has its first ones."""
        if matrix not in self._found:
            found = None
            if self.processes.first:
                assert self.control is not None
                few = trial_experts(self.num_experts, math.prod(W.shape[1:]))
                if self._weights is not None:
                    tried = np.resize(shares.of_strata(self._weights, few), len(W))
                    importance = importance * tried[:, None]
                guess, rates, steps = trial(
                    cast(Priced, self.method), W, H, importance, few, self.codec, self._classes.get(matrix, 1)
                )
                lagrangian = self.control.find(matrix, self.num_experts * math.prod(W.shape[1:]), guess, rates)
                found = lagrangian, steps(lagrangian)
            lagrangian, number = self.processes.from_first(found)
            self._found[matrix] = lagrangian, number
        return self._found[matrix]

    @staticmethod
    def _tell_control(control: RateControl, groups: Sequence[GroupAccount]) -> None:
        """What a layer's matrices came to."""
        weights, matrices = sum(g.weights for g in groups), list(groups[0].entropies)
        count = weights // len(matrices)  # All matrices of an expert are of one size.
        for m in matrices:
            stored = 8 * sum(g.nbytes[m] for g in groups) / count if groups[0].nbytes else None
            control.spent(
                m, float(np.mean([h for g in groups for h in g.entropies[m]])) if stored is None else stored, count
            )


@jax.jit
def _as_stored(quantized: Quantized) -> Quantized:
    """Levels are kept in bfloat16; what is computed with them from here on is what a reader will have."""
    levels = grids.without_unused(quantized.symbols, quantized.levels.astype(jnp.bfloat16))
    return quantized._replace(Q=grids.dequantize(quantized.symbols, levels), levels=levels)
