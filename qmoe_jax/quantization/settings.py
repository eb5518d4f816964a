"""How experts are quantized: a method with its own settings, and what it is calibrated on."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from qmoe_jax import codecs
from qmoe_jax.quantization.methods import LEVELS, METHODS, Method


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What Hessians are made from, and how; the defaults are the paper's.

    Attributes:
      block_size: columns per block of a factorisation.
      damping: dampening, relative to H's mean diagonal.
      token_cap: most tokens in an expert's H, relative to calibration tokens / experts; the first ones are taken.
      mask_special_tokens: leave out of H what the family's task calls special (section 3.3). Levels within the extremes
        would otherwise err most along the inputs that H doesn't know, so 'rd' needs them in.
      router_weighted: weight tokens by the square of the gate by which the router multiplies their output.
      sequential: the last matrix' Hessian is of the outputs of the quantized ones before it.
      asymmetric: the last matrix is first fitted to give, on those, the outputs that it gave before; `sequential` too.
      shrinkage: weight, in tokens, of a sample of the layer's tokens that joins every expert's Hessians.
      min_tokens: an expert with fewer gets tokens of the layer's for those that it lacks. None: as many as the
        method or, by the paper's recipe, the family of models wants.
    """

    block_size: int = 128
    damping: float = 0.1
    token_cap: float = 4.0
    mask_special_tokens: bool = True
    router_weighted: bool = False
    sequential: bool = False
    asymmetric: bool = False
    shrinkage: float = 0.0
    min_tokens: int | None = None

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"quantization.block_size: found {self.block_size!r}, expected at least 1 column.")
        for name in ("damping", "shrinkage"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"quantization.{name}: found {getattr(self, name)!r}, expected a finite number, at least 0."
                )
        if self.min_tokens is not None and (type(self.min_tokens) is not int or self.min_tokens < 0):
            raise ValueError(f"quantization.min_tokens: found {self.min_tokens!r}, expected a number of tokens, or 0.")
        if not 0 < self.token_cap < math.inf:
            raise ValueError(f"quantization.token_cap: found {self.token_cap!r}, expected a finite number above 0.")
        if self.asymmetric and not self.sequential:
            raise ValueError("quantization.asymmetric: needs quantization.sequential=true.")

    @property
    def sample_starved(self) -> bool:
        """Whether an expert without tokens gets a sample of the layer's; by the paper's recipe it is rounded."""
        return self.router_weighted or self.sequential or self.shrinkage > 0


class QuantizationSettings:
    """A method and its calibration, from the names that the flags have too; fields of both are attributes.

    Args:
      method: a name in `METHODS`.
      **fields: of the method's class, and of `Calibration`. None is what the method wants.

    Attributes:
      method: its name.
      rounding: the method as an object.
      calibration: see `Calibration`.

    Raises:
      ValueError: an unknown method, a field that it hasn't, or a value out of range.
    """

    method: str
    rounding: Method
    calibration: Calibration

    def __init__(self, method: str = "gptq", **fields: Any):
        if method not in METHODS:
            raise ValueError(f"quantization.method: found {method!r}, expected one of {', '.join(METHODS)}.")
        kind, given = METHODS[method], {name: value for name, value in fields.items() if value is not None}
        own, shared = _names(kind), _names(Calibration)
        for name, value in given.items():
            if name not in own and name not in shared:
                _refuse(method, name, value)
        self.method = method
        self.calibration = Calibration(**kind.defaults | {n: v for n, v in given.items() if n in shared})
        self.rounding = kind(**{n: v for n, v in given.items() if n in own})

    def __getattr__(self, name: str) -> Any:
        for part in ("rounding", "calibration"):
            if part in self.__dict__ and hasattr(self.__dict__[part], name):
                return getattr(self.__dict__[part], name)
        if any(name in _names(kind) for kind in METHODS.values()):
            return None  # Another method's.
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantizationSettings) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"QuantizationSettings({', '.join(f'{n}={v!r}' for n, v in self.to_dict().items())})"

    @property
    def calibrated(self) -> bool:
        """Whether calibration documents are needed."""
        return self.rounding.calibrated

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as JSON values."""
        return {
            "method": self.method,
            **dataclasses.asdict(self.calibration),
            **dataclasses.asdict(typing.cast(Any, self.rounding)),
        }

    def replace(self, **fields: Any) -> QuantizationSettings:
        """The same with other fields."""
        return QuantizationSettings(**self.to_dict() | fields)


def _names(kind: Any) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(kind)}


def _refuse(method: str, name: str, value: Any) -> None:
    """Raises ValueError for a field that the method hasn't, unless it is as others have it by default."""
    others = [m for m, kind in METHODS.items() if name in _names(kind)]
    if not others:
        raise ValueError(f"quantization.{name}: there is no such setting.")
    if any(_names(METHODS[m])[name].default == value for m in others):
        return
    whose = f"only method{'' if len(others) == 1 else 's'} {', '.join(map(repr, others))}"
    raise ValueError(f"quantization.{name}: found {value!r}, but {whose} has such a setting, not {method!r}.")


def fields() -> dict[str, tuple[type, Any]]:
    """Type and default of every field that a method or the calibration has, for flags.

    The default is None where it depends on the method.
    """
    found: dict[str, tuple[type, Any]] = {"method": (str, "gptq")}
    kinds = [Calibration, *METHODS.values()]
    for kind in kinds:
        for name, hint in typing.get_type_hints(kind).items():
            if name in _names(kind):
                alternatives = [t for t in typing.get_args(hint) or (hint,) if t is not types.NoneType]
                defaults = {_names(k)[name].default for k in kinds if name in _names(k)}
                defaults |= {m.defaults[name] for m in METHODS.values() if name in m.defaults}
                found[name] = (alternatives[0], defaults.pop() if len(defaults) == 1 else None)
    return found


def why_not_stored(quantization: QuantizationSettings, codec: str) -> str | None:
    """Why the codec can't hold such experts, and what to do; None if it can. Raises ValueError for an unknown codec."""
    levels = quantization.rounding.levels
    if levels in codecs.get(codec).LEVELS:
        return None
    others = [name for name, other in codecs.CODECS.items() if levels in other.LEVELS]
    instead = f"Use the codec {' or '.join(map(repr, others))}, or measure" if others else "Measure"
    few = levels == LEVELS.get(quantization.rounding.bits)
    what = f"{quantization.rounding.bits:g}-bit experts" if few else f"Experts with up to {levels} levels a row"
    return f"{what} can't be stored by the codec {codec!r}. {instead} without saving."
