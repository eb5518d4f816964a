"""Quantization methods: each one object with its own settings, and one line in `METHODS`.

A method is a frozen dataclass whose fields are its settings, called with the weights of all experts of a group:

    method(W, H, importance) -> Quantized          W [experts, out, in], H [experts, in, in], importance [experts, out]

Pure, under `jit`, and without mixing experts. Fields that `Calibration` has too (`damping`, `block_size`) have one
value for both. Everything else of the project (flags, reports, plans, manifests) asks the object.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Protocol

import jax

from qmoe_jax.quantization.equal_steps import MOST_STEPS
from qmoe_jax.quantization.gptq import Quantized, gptq, round_to_nearest
from qmoe_jax.quantization.rate_distortion import rate_distortion, refit_levels

TERNARY = 1.5
LEVELS = {TERNARY: 2, 2: 3}  # beside zero
# Bits per weight: what the paper and this project's models came to, metadata included, and at most.
USUAL_BITS = {TERNARY: 0.8, 2: 1.6}
MOST_BITS = {TERNARY: 1.7, 2: 2.2}
DEFAULT_TARGET_BITS = 0.7
MOST_TARGET_BITS = 3.0
MOST_TERNARY_BITS = 1.8
LEAST_STEPPED_BITS = 0.8  # to aim at: below, two levels of each row's own lose less than equal steps (docs/beyond.md)
# Of an expert, so that levels within the extremes don't err on inputs like others' of its layer (docs/studies.md).
ENOUGH_TOKENS = 1024


class Needs(NamedTuple):
    """What a plan has to know of a method.

    Attributes:
      hessians, weights: temporaries while it runs, in units of its Hessians and of its weights, both float32 (XLA's
        memory analysis).
      bits: per weight to expect of experts as stored.
      most_bits: the same, at most.
    """

    hessians: float
    weights: float
    bits: float
    most_bits: float


class Method(Protocol):
    """See above.

    Attributes:
      title: for reports.
      calibrated: it needs Hessians, and so calibration documents.
      uses_importance: of what an output's squared error counts.
      defaults: fields of `Calibration` that aren't as in the paper, unless they are set.
      target_bits: per weight as stored, for which several Lagrangians are tried (`Priced`); None: it isn't tried.
      bits: nominal, for reports: 1.5 is the paper's name for ternary.
      levels: how many values a row has beside zero.
    """

    title: ClassVar[str]
    calibrated: ClassVar[bool]
    uses_importance: ClassVar[bool]
    defaults: ClassVar[dict[str, Any]]

    @property
    def bits(self) -> float: ...
    @property
    def levels(self) -> int: ...
    @property
    def target_bits(self) -> float | None: ...

    def needs(self) -> Needs: ...

    def __call__(self, W: jax.Array, H: jax.Array | None, importance: jax.Array | None) -> Quantized: ...


class Priced(Method, Protocol):
    """A method that trades error for bits at a price, its Lagrangian."""

    @property
    def lagrangian(self) -> float | None: ...

    def at(
        self,
        W: jax.Array,
        H: jax.Array,
        importance: jax.Array,
        lagrangian: Any,
        codes: Any = None,
        steps: int | None = None,
    ) -> Quantized:
        """With another Lagrangian, or one for each row; rows of the same `codes` share a code.

        `steps` is given only where the method has a field of that name, which is None: what trials chose for a layer.
        """
        ...


def _check_bits(bits: float) -> None:
    if bits not in LEVELS:
        raise ValueError(f"quantization.bits: found {bits!r}, expected 1.5 (ternary) or 2.")


def _check_whole(name: str, value: Any, most: float, expected: str) -> None:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"quantization.{name}: found {value!r}, expected {expected}.")


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Every weight to the nearest value of its row's grid."""

    title: ClassVar[str] = "round to nearest"
    calibrated: ClassVar[bool] = False
    uses_importance: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {}
    target_bits: ClassVar[float | None] = None

    bits: float = TERNARY

    def __post_init__(self):
        _check_bits(self.bits)

    @property
    def levels(self) -> int:
        return LEVELS[self.bits]

    def needs(self) -> Needs:
        return Needs(0.0, 3.0, USUAL_BITS[self.bits], MOST_BITS[self.bits])

    def __call__(self, W: jax.Array, H: jax.Array | None = None, importance: jax.Array | None = None) -> Quantized:
        return round_to_nearest(W, bits=self.bits)


@dataclasses.dataclass(frozen=True)
class Gptq:
    """The paper's: GPTQ to a grid from row minimum to row maximum.

    Attributes:
      bits: 1.5 (ternary) or 2.
      block_size: columns per block.
      damping: dampening, relative to H's mean diagonal.
      activation_order: columns are taken by falling diagonal of H.
      refits: 1: levels are fitted anew, once, for the symbols that were found.
    """

    title: ClassVar[str] = "GPTQ"
    calibrated: ClassVar[bool] = True
    uses_importance: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {}
    target_bits: ClassVar[float | None] = None

    bits: float = TERNARY
    block_size: int = 128
    damping: float = 0.1
    activation_order: bool = False
    refits: int = 0

    def __post_init__(self):
        _check_bits(self.bits)
        _check_whole("refits", self.refits, 1, "0 or more (gptq: 0 or 1)")
        if self.refits and self.bits != TERNARY:
            raise ValueError("quantization.refits: only ternary levels can be refitted.")

    @property
    def levels(self) -> int:
        return LEVELS[self.bits]

    def needs(self) -> Needs:
        return Needs(2.2, 2.7, USUAL_BITS[self.bits], MOST_BITS[self.bits])

    def __call__(self, W: jax.Array, H: jax.Array | None, importance: jax.Array | None = None) -> Quantized:
        assert H is not None
        quantized = gptq(
            W,
            H,
            bits=self.bits,
            block_size=self.block_size,
            damping=self.damping,
            activation_order=self.activation_order,
        )
        return refit_levels(W, H, quantized, damping=self.damping) if self.refits else quantized


@dataclasses.dataclass(frozen=True)
class RateDistortion:
    """GPTQ's column loop that pays for bits, with levels that are fitted (`rate_distortion`).

    Attributes:
      bits: 1.5, a name: how many levels there are is for `steps` and the rate to say.
      lagrangian: squared error of an expert's output that one bit is worth. None: found for `target_bits`.
      target_bits: per weight, as stored, of all experts together. None: see `lagrangian`.
      steps: levels at equal steps on either side of zero, 1 to 7 (`equal_steps`). 0: ternary, each row with two levels
        of its own, and no descent. None: 0 for `target_bits` below `LEAST_STEPPED_BITS`; else as many as the rate
        wants, told by trials for `target_bits`, or else 7.
      level_bits: bits of mantissa of a level.
      refits: rounds of rounding and fitting levels anew. None: 2, or 3 of levels at equal steps.
      share_power: an expert's squared error counts by its share of the layer's squared router probabilities, relative
        to the mean, to this power (`shares`). 0: all experts' count equally.
      descents: passes over all symbols in each of these, see `rate_distortion`.
      super_weight: what a squared error of a super expert (`super_experts`) counts, as a multiple of others': more
        bits are spent on it. Which they are, a pass of the unquantized model tells first. 1: as others'.
      block_size, damping, activation_order: as in `Gptq`.
    """

    title: ClassVar[str] = "rate-distortion GPTQ"
    calibrated: ClassVar[bool] = True
    uses_importance: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = dict(
        mask_special_tokens=False, router_weighted=True, sequential=True, asymmetric=True, min_tokens=ENOUGH_TOKENS
    )

    bits: float = TERNARY
    lagrangian: float | None = None
    target_bits: float | None = None
    steps: int | None = None
    level_bits: int = 3
    refits: int | None = None
    share_power: float = 0.5
    descents: int = 2
    super_weight: float = 1.0
    block_size: int = 128
    damping: float = 0.1
    activation_order: bool = True

    def __post_init__(self):
        _check_bits(self.bits)
        if self.bits != TERNARY:
            raise ValueError("quantization.method 'rd' has bits 1.5, a name: give target_bits or steps instead.")
        if self.lagrangian is not None and self.target_bits is not None:
            raise ValueError("quantization: give lagrangian or target_bits, not both.")
        if self.lagrangian is None and self.target_bits is None:
            object.__setattr__(self, "target_bits", DEFAULT_TARGET_BITS)
        if self.steps is None and self.target_bits is not None and self.target_bits < LEAST_STEPPED_BITS:
            object.__setattr__(self, "steps", 0)
        if self.refits is None:
            object.__setattr__(self, "refits", 2 if self.steps == 0 else 3)
        for name in ("lagrangian", "target_bits"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"quantization.{name}: found {value!r}, expected a finite number above 0.")
        most = MOST_TERNARY_BITS if self.steps == 0 else MOST_TARGET_BITS
        if self.target_bits is not None and not 0.05 <= self.target_bits <= most:
            raise ValueError(
                f"quantization.target_bits: found {self.target_bits!r}, expected 0.05 to {most:g} bits per weight"
                f"{', which is what ternary weights can carry' if self.steps == 0 else ''}."
            )
        if not 0 <= self.share_power <= 2:
            raise ValueError(f"quantization.share_power: found {self.share_power!r}, expected 0 to 2.")
        if not 0 < self.super_weight < math.inf:
            raise ValueError(
                f"quantization.super_weight: found {self.super_weight!r}, expected a finite number above 0."
            )
        _check_whole("level_bits", self.level_bits, 7, "0 to 7")
        _check_whole("refits", self.refits, 99, "0 or more (gptq: 0 or 1)")
        _check_whole("descents", self.descents, 99, "0 or more")
        if self.steps is not None:
            _check_whole("steps", self.steps, MOST_STEPS, f"0 (ternary) to {MOST_STEPS}")

    @property
    def levels(self) -> int:
        """At most."""
        return LEVELS[self.bits] if self.steps == 0 else 2 * (self.steps or MOST_STEPS)

    def needs(self) -> Needs:
        if self.steps == 0:
            return Needs(2.2, 12.5, self.target_bits or USUAL_BITS[self.bits], MOST_BITS[self.bits])
        return Needs(3.2, 15.0, self.target_bits or USUAL_BITS[2], max(2.2, 1.2 * (self.target_bits or 0)))

    def __call__(self, W: jax.Array, H: jax.Array | None, importance: jax.Array | None) -> Quantized:
        assert H is not None and importance is not None
        return self.at(W, H, importance, self.lagrangian)

    def at(
        self,
        W: jax.Array,
        H: jax.Array,
        importance: jax.Array,
        lagrangian: Any,
        codes: Any = None,
        steps: int | None = None,
    ) -> Quantized:
        assert self.refits is not None
        if steps is None:
            steps = MOST_STEPS if self.steps is None else self.steps
        return rate_distortion(
            W,
            H,
            lagrangian / importance,
            codes=codes,
            steps=steps or None,
            refits=self.refits,
            descents=self.descents,
            level_bits=self.level_bits,
            block_size=self.block_size,
            damping=self.damping,
            activation_order=self.activation_order,
        )


METHODS: dict[str, Any] = {
    "gptq": Gptq,
    "rtn": Nearest,
    "rd": RateDistortion,
}
