"""Other ways to few bits beside this project's, on the same model and tokens: `reproduce.py --study=methods`.

Every other method is in `other_ways.py`. All calibrated ones get what rate-distortion gets, too: Hessians weighted by
squared router probability, the last matrix's of what the quantized inner ones give it. For each point, rate-distortion
is run at as many stored bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax import streaming
from qmoe_jax.checkpoints.in_memory import InMemoryCheckpoint
from qmoe_jax.models.family import Expert
from qmoe_jax.quantization import statistics
from qmoe_jax.quantization.account import entropy
from qmoe_jax.quantization.rate_distortion import rate_distortion
from qmoe_jax.quantization.sharding import expert_sharding
from qmoe_jax.streaming.exchange import RoutedRows
from qmoe_jax.streaming.experts import ExpertGroup
from studies import other_ways
from studies.laboratory import Laboratory, Result

# bits a level of a row takes in the gap code, about: sign, exponent and three bits of mantissa, two levels a row
LEVEL_BITS = 8
TARGETS = (0.5, 1.0, 1.4)  # of the rotated, by rate-distortion's own rounding
LEVELS = (3, 4, 8)
Round = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float]]  # W [experts, out, in], H -> Q, bits in all


class Others:
    """Replaces each group's experts by what a method makes of them. See `streaming.Quantizer`.

    Args:
      lab: model and documents.
      quantize: the method, for all experts of a group at once.
      calibrates: by stream, which tokens calibrate.

    Attributes:
      bits, weights: of all experts so far.
    """

    def __init__(self, lab: Laboratory, quantize: Round, calibrates: Mapping[str, np.ndarray]):
        self.quantize, self.calibrates = quantize, calibrates
        self.own = range(lab.checkpoint.config.num_experts)
        self.sample = {s: statistics.sample_rows(np.flatnonzero(mask)) for s, mask in calibrates.items()}
        self.bits = self.weights = 0.0

    def begin(self, layer: str, rows: np.ndarray, routed: RoutedRows) -> None:
        pass

    def __call__(self, group: ExpertGroup) -> dict[str, Any]:
        sharding = expert_sharding(group.stop - group.start)
        kernels = {m: jax.device_put(jnp.asarray(k, jnp.float32), sharding) for m, k in group.kernels.items()}
        samples = self.samples(group)
        H = statistics.input_hessians(group.inputs, samples, sharding)
        now = dict(kernels)
        for m in group.expert.inner:
            now[m] = self.replace(kernels[m], H)
        H, _ = statistics.hidden_statistics(
            group.expert, kernels, now, group.inputs, samples, sharding, residuals=False
        )
        now[group.expert.last] = self.replace(kernels[group.expert.last], H)
        return group.kernels | {m: now[m] for m in group.expert.matrices}

    def samples(self, group: ExpertGroup) -> list[statistics.Samples]:
        calibrates = self.calibrates[group.stream]
        own = [calibrates[t] for t in group.tokens]
        return statistics.weighted_tokens(
            [t[mask] for t, mask in zip(group.tokens, own, strict=True)],
            [g[mask] for g, mask in zip(group.gates, own, strict=True)],
            self.sample[group.stream],
            router_weighted=True,
            shrinkage=0.0,
        )

    def replace(self, kernel: jax.Array, H: jax.Array) -> jax.Array:
        """kernel [experts, in, out], and so what is returned."""
        Q, bits = self.quantize(np.asarray(kernel, np.float64).swapaxes(1, 2), np.asarray(H, np.float64))
        self.bits, self.weights = self.bits + bits, self.weights + Q.size
        return jnp.asarray(Q.swapaxes(1, 2), jnp.float32)

    def finish(self, layer: str) -> None:
        pass


class _Scores(Others):
    """Leaves experts as they are, and scores them."""

    def __init__(self, lab: Laboratory, calibrates: Mapping[str, np.ndarray]):
        super().__init__(lab, lambda W, H: (W, 0.0), calibrates)
        self.scores: dict[str, list[float]] = {}

    def __call__(self, group: ExpertGroup) -> dict[str, Any]:
        calibrates = self.calibrates[group.stream]
        for e, (rows, gates) in enumerate(zip(group.tokens, group.gates, strict=True)):
            own = {m: k[e] for m, k in group.kernels.items()}
            mask = calibrates[rows]
            norms = np.linalg.norm(_outputs(group.expert, group.inputs[rows[mask]], own), axis=-1)
            self.scores.setdefault(group.layer, []).append(other_ways.reap(norms, gates[mask]))
        return group.kernels


def _outputs(expert: Expert, X: np.ndarray, kernels: Mapping[str, np.ndarray]) -> np.ndarray:
    def dot(x, kernel, bias=None):
        y = jnp.asarray(x, jnp.float32) @ jnp.asarray(kernel, jnp.float32)
        return y if bias is None else y + bias

    return np.asarray(expert(X, kernels, dot))


def one_by_one(quantize: Callable[[np.ndarray, np.ndarray], other_ways.Result]) -> Round:
    """A method for one matrix, for all of a group."""

    def every(W, H):
        found = [quantize(w, h) for w, h in zip(W, H, strict=True)]
        return np.stack([f.Q for f in found]), sum(f.bits for f in found)

    return every


def rate_distortion_at(target: float, incoherent: bool) -> Round:
    """Rate-distortion's rounding alone, every matrix of a group at one rate, in the rotated basis or as it is."""

    def every(W, H):
        turned = [other_ways.turned(w, h, seed) for seed, (w, h) in enumerate(zip(W, H, strict=True))]
        A, B = (np.stack([t.W for t in turned]), np.stack([t.H for t in turned])) if incoherent else (W, H)
        scale = np.mean(np.diagonal(B, axis1=1, axis2=2)[:, None] * A**2)
        low, high = -12.0, 4.0
        for _ in range(9):  # by bisection of the Lagrangian's logarithm
            middle = (low + high) / 2
            found = rate_distortion(A, B, np.full(A.shape[:2], scale * 2.0**middle))
            symbols = np.asarray(found.symbols)
            bits = sum(entropy(s) * s.size for s in symbols) + 2 * LEVEL_BITS * A.shape[0] * A.shape[1]
            low, high = (middle, high) if bits > target * A.size else (low, middle)
        Q = np.asarray(found.Q, np.float64)
        return (np.stack([t.back(q) for t, q in zip(turned, Q, strict=True)]) if incoherent else Q), bits

    return every


class Point(NamedTuple):
    """What a method lost at what it stored."""

    name: str
    setting: str
    bits_per_weight: float
    above_bfloat16: float


def methods(lab: Laboratory, **_) -> Result:
    """Loss above bfloat16 against bits a weight, by method; and rate-distortion at as many."""
    base = lab.bfloat16["loss"]
    examples = [*lab.calibration(1.0), *lab.validation]
    number = len(examples) - len(lab.validation)
    calibrates = {}
    for stream, lengths in lab.checkpoint.family.task.lengths(examples).items():
        calibrates[stream] = np.arange(lengths.sum()) < lengths[:number].sum()
    rounded = lab.memory._replace(round_weights=True)

    def run(quantizer: Others, what: str) -> float:
        losses = streaming.run(lab.checkpoint, examples, rounded, quantizer=quantizer, what=what)
        return streaming.DocumentLosses(*(a[number:] for a in losses)).summary()["loss"] - base

    points = []

    def measure(name: str, setting: str, quantize: Round) -> None:
        quantizer = Others(lab, quantize, calibrates)
        above = run(quantizer, f"{name}, {setting}")
        points.append(Point(name, setting, quantizer.bits / quantizer.weights, above))

    def compressed(name: str, setting: str, *args, share: float = 1.0, **settings) -> None:
        report = lab.compress(*args, what=f"{name}, {setting}", **settings)
        points.append(Point(name, setting, share * report["bits_per_weight"], report["loss"] - base))

    compressed("the paper's recipe", "ternary, dictionary", "gptq", codec="dictionary")
    compressed("the paper's recipe", "ternary, gap code", "gptq")
    compressed("the paper's recipe", "2 bits, gap code", "gptq", 2)
    for levels in LEVELS:
        measure("half-quadratic", f"{levels} values", one_by_one(lambda W, H, n=levels: _hqq(W, n)))
    for levels in LEVELS:
        measure(
            "groups and outliers",
            f"{levels} values",
            one_by_one(lambda W, H, n=levels: other_ways.sparse_outliers(W, H, n)),
        )
    for target in TARGETS:
        measure("rate-distortion's rounding alone", f"{target:g} bits", rate_distortion_at(target, incoherent=False))
        measure("the same, incoherent", f"{target:g} bits", rate_distortion_at(target, incoherent=True))
    scores = _Scores(lab, calibrates)
    run(scores, "scores of experts")
    experts, choices = lab.checkpoint.config.num_experts, getattr(lab.checkpoint.config, "top_k", 1)
    for part in (2, 4):
        kept = experts // part
        if kept < max(1, choices):
            continue
        pruned, share = without_experts(lab, scores.scores, kept), kept / experts
        loss = streaming.run(pruned, lab.validation, rounded, what=f"{kept} experts").summary()["loss"]
        points.append(Point("experts pruned", f"{kept} of {experts}, bfloat16", 16 * share, loss - base))
        compressed("experts pruned", f"{kept} of {experts}, 2 bits", "gptq", 2, checkpoint=pruned, share=share)
    return _result(lab, points)


def _hqq(W: np.ndarray, levels: int) -> other_ways.Result:
    return other_ways.half_quadratic(W, levels, group=64)


def without_experts(lab: Laboratory, scores: Mapping[str, list[float]], kept: int) -> InMemoryCheckpoint:
    """The model with the `kept` experts of every layer that score best; routers choose among these."""
    checkpoint = lab.checkpoint
    params = {name: np.asarray(checkpoint.read(name)) for name in checkpoint.specs}
    for layer, of in scores.items():
        best = np.sort(np.argsort(of)[::-1][:kept])
        for name in [n for n in params if n.startswith(f"{layer}/")]:
            if checkpoint.is_expert(name):
                params[name] = params[name][best]
            elif "/router/" in name:
                params[name] = params[name][..., best]
    return InMemoryCheckpoint(dataclasses.replace(checkpoint.config, num_experts=kept), params)


def _result(lab: Laboratory, points: list[Point]) -> Result:
    """With rate-distortion at the bits of each point that it can have."""
    ours: dict[float, float] = {}
    rows, data = [], []
    for p in points:
        target = round(p.bits_per_weight, 2)
        if target not in ours:
            ours[target] = _ours(lab, target)
        rows.append((p.name, p.setting, f"{p.bits_per_weight:.3f}", p.above_bfloat16, ours[target]))
        data.append(p._asdict() | {"ours": ours[target]})
    curve = [
        dict(name="this project's rate-distortion", bits_per_weight=bits, above_bfloat16=above)
        for bits, above in ours.items()
        if above is not None
    ]
    return Result(
        title="Loss above bfloat16 by method, at equal stored bits",
        header=("method", "how", "bits a weight", "above bfloat16", "rate-distortion at as many"),
        rows=rows,
        data=data,
        bars={},
        ylabel="loss above bfloat16",
        notes=[
            "Rate-distortion and the paper's recipe: bits as stored, all metadata included. Others: symbols by their "
            "entropy, as an ideal code would take them, and what they keep beside.",
            "Others are re-implementations from their papers (studies/other_ways.py), calibrated alike.",
        ],
        points=dict(points=curve + data, bfloat16=lab.bfloat16["loss"]),
    )


def _ours(lab: Laboratory, target: float) -> float | None:
    """Rate-distortion's loss above bfloat16 at so many stored bits; None: more than it can store."""
    try:
        report = lab.compress("rd", target_bits=target, what=f"rate-distortion, {target:g} bits")
    except ValueError:
        return None
    return report["loss"] - lab.bfloat16["loss"]
