"""What became of experts: counted group by group, put together layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qmoe_jax.codecs.experts import CompressedExperts
from qmoe_jax.processes import Processes
from qmoe_jax.quantization.gptq import Quantized
from qmoe_jax.quantization.output_error import OutputError

_BY_EXPERT = ("tokens", "fallback", "overloaded", "starved", "peaks")


class LayerAccount(NamedTuple):
    """What became of a layer's experts.

    Attributes:
      tokens: calibration tokens in each expert's Hessian.
      fallback: why, for each expert that wasn't quantized by its own tokens: most are rounded to nearest.
      overloaded: how many calibration tokens were routed to each expert that had more than may be in its Hessian.
      starved: how many tokens of its own each expert had that got tokens of the layer's beside them (`min_tokens`).
      peaks: each expert's largest output, see `statistics.output_peaks`; empty without calibration.
      zeros: share of zero weights.
      entropy: empirical entropy of the symbols of all its matrices, in bits per weight (mean over matrices).
      weights: how many weights it has.
      stored_bytes: of its compressed form, None if that isn't made.
      output_error: what its outputs on validation tokens have lost.
    """

    tokens: dict[int, int]
    fallback: dict[int, str]
    overloaded: dict[int, int]
    starved: dict[int, int]
    peaks: dict[int, float]
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
        by_expert = {name: dict(fields[name]) for name in _BY_EXPERT}
        return cls(**fields | by_expert | {"output_error": error})


def entropy(symbols: np.ndarray) -> float:
    """Empirical entropy of symbols in bits."""
    p = np.bincount(symbols.reshape(-1)) / symbols.size
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


class GroupAccount(NamedTuple):
    """The same of a group of experts, with the experts themselves.

    Attributes:
      tokens, fallback, overloaded, starved, peaks: as in `LayerAccount`.
      zeros, weights: how many.
      entropies: by matrix name, of each expert.
      nbytes: by matrix name, as stored; empty if nothing is.
      experts: by matrix name; of another process's group none.
      output_error: of each expert.
    """

    tokens: dict[int, int]
    fallback: dict[int, str]
    overloaded: dict[int, int]
    starved: dict[int, int]
    peaks: dict[int, float]
    zeros: int
    weights: int
    entropies: dict[str, list[float]]
    nbytes: dict[str, int]
    experts: dict[str, CompressedExperts]
    output_error: OutputError


def group_account(
    quantized: Mapping[str, Quantized],
    tokens: dict[int, int],
    overloaded: dict[int, int],
    starved: dict[int, int],
    peaks: dict[int, float],
    error: OutputError,
    codec: str | None,
    calibrated: bool,
    classes: Mapping[str, int],
) -> GroupAccount:
    """Encodes experts, and counts what they came to.

    Args:
      quantized: by matrix name.
      tokens: how many calibrate each of them.
      overloaded, starved, peaks: as in `LayerAccount`.
      error: of each expert.
      codec: by name; None: nothing is stored.
      calibrated: experts should have tokens.
      classes: of columns, of the matrices that have more than one.
    """
    symbols = {m: np.asarray(q.symbols) for m, q in quantized.items()}
    experts = {}
    if codec is not None:
        experts = {
            m: CompressedExperts.from_symbols(symbols[m], np.asarray(q.levels), codec, classes.get(m, 1))
            for m, q in quantized.items()
        }
    fallback = {}
    for i, (e, count) in enumerate(tokens.items()):
        failed = [m for m, q in quantized.items() if bool(q.fallback[i])]
        if failed:
            unusable = f"the Hessian of {', '.join(failed)} is zero or its Cholesky factorisation failed"
            fallback[e] = "no calibration tokens" if count == 0 else unusable
        elif count == 0 and calibrated:
            fallback[e] = "no calibration tokens; a sample of the layer's stood for them"
    return GroupAccount(
        tokens=tokens,
        fallback=fallback,
        overloaded=overloaded,
        starved=starved,
        peaks=peaks,
        zeros=sum(int((np.asarray(q.Q) == 0).sum()) for q in quantized.values()),
        weights=sum(s.size for s in symbols.values()),
        entropies={m: [entropy(s) for s in matrix] for m, matrix in symbols.items()},
        nbytes={m: e.nbytes for m, e in experts.items()},
        experts=experts,
        output_error=error,
    )


def gather_groups(processes: Processes, groups: list[GroupAccount]) -> list[GroupAccount]:
    """Of all processes, in order; those of others without their experts."""

    def told(group):
        items = {name: list(getattr(group, name).items()) for name in _BY_EXPERT}
        return group._asdict() | items | {"experts": {}, "output_error": [a.tolist() for a in group.output_error]}

    def heard(fields):
        items = {name: dict(fields[name]) for name in _BY_EXPERT}
        return GroupAccount(**fields | items | {"output_error": OutputError(*map(np.array, fields["output_error"]))})

    return [heard(fields) for own in processes.gather(list(map(told, groups))) for fields in own]


def layer_account(groups: Sequence[GroupAccount]) -> LayerAccount:
    """All groups of a layer, together."""
    weights = sum(g.weights for g in groups)
    nbytes = [n for g in groups for n in g.nbytes.values()]
    entropies = {m: [h for g in groups for h in g.entropies[m]] for m in groups[0].entropies}
    return LayerAccount(
        tokens={e: n for g in groups for e, n in g.tokens.items()},
        fallback={e: why for g in groups for e, why in g.fallback.items()},
        overloaded={e: n for g in groups for e, n in g.overloaded.items()},
        starved={e: n for g in groups for e, n in g.starved.items()},
        peaks={e: p for g in groups for e, p in g.peaks.items()},
        zeros=sum(g.zeros for g in groups) / weights,
        entropy=float(np.mean(list(entropies.values()))),
        weights=weights,
        stored_bytes=sum(nbytes) if nbytes else None,
        output_error=OutputError(*map(np.concatenate, zip(*(g.output_error for g in groups), strict=True))),
    )
