"""The families of models there are: a folder, and a line here, each."""

from __future__ import annotations

import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from qmoe_jax.errors import CheckpointError, listed
from qmoe_jax.models import deepseek_v3, gpt_oss, mixtral, olmoe, qwen3_moe, switch
from qmoe_jax.models.family import Family
from qmoe_jax.models.names import Shape

FAMILIES: dict[str, Family] = {
    "switch": switch.FAMILY,
    "olmoe": olmoe.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
}


def family_of(config: Any) -> Family:
    """The family that an architecture, or a model that has one, belongs to. Raises TypeError for anything else."""
    config = getattr(config, "config", config)
    for family in FAMILIES.values():
        if isinstance(config, family.Config):
            return family
    kinds = ", ".join(family.Config.__name__ for family in FAMILIES.values())
    raise TypeError(f"{type(config).__name__}: expected an architecture, one of {kinds}.")


def untold() -> dict[str, tuple[type, str]]:
    """What a user may give where a checkpoint doesn't tell, of all families: type, and what it is, by field."""
    found: dict[str, tuple[type, str]] = {}
    for family in FAMILIES.values():
        hints = typing.get_type_hints(family.Config)
        for field, what in family.UNTOLD.items():
            kinds = [kind for kind in typing.get_args(hints[field]) or (hints[field],) if kind is not types.NoneType]
            found.setdefault(field, (kinds[0], what))
    return found


def family_of_type(model_type: Any, layout: str) -> Family:
    """The family of Hugging Face's 'model_type', if a layout can hold it. Raises CheckpointError with those it can."""
    known = {kind: f for f in FAMILIES.values() if layout in f.names for kind in f.model_types}
    if not isinstance(model_type, str) or model_type not in known:
        raise CheckpointError(f"model_type {reprlib.repr(model_type)}, expected {', '.join(map(repr, known))}.")
    return known[model_type]


def family_of_parameters(shapes: Mapping[str, Shape], layout: str) -> Family:
    """The family that parameters belong to, in a layout where nothing but they tell.

    Raises CheckpointError that says of each family what doesn't fit.
    """
    candidates, problems = [f for f in FAMILIES.values() if layout in f.names], []
    for family in candidates:
        try:
            family.infer(shapes)
            return family
        except CheckpointError as e:
            problems.append(str(e))
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    raise CheckpointError(listed("These parameters are of no model that is known.", problems))


def infer_config(shapes: Mapping[str, Shape], **overrides: Any) -> Any:
    """The architecture that a T5X parameter tree belongs to; see `Family.infer`."""
    return family_of_parameters(shapes, "t5x").infer(shapes, **overrides)


def param_shapes(config: Any) -> dict[str, Shape]:
    """Shapes of all parameters of a model, by '/'-joined name; see `Family.param_shapes`."""
    return family_of(config).param_shapes(config)


# Published architectures, of all families.
PRESETS: dict[str, Any] = {name: config for family in FAMILIES.values() for name, config in family.PRESETS.items()}


def preset(name: str) -> Any:
    """The published architecture of that name. Raises ValueError that lists the names there are."""
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}. Known presets: {', '.join(PRESETS)}.")
    return PRESETS[name]


def mismatches(found: Any, expected: Any) -> list[str]:
    """Fields in which two architectures of a family differ, as lines 'field: found X, expected Y'.

    Only what parameters tell is compared; all else is the caller's choice.
    """
    if type(found) is not type(expected):
        return [f"family: found {family_of(found).name}, expected {family_of(expected).name}"]
    told = family_of(found).told
    pairs = [(n, getattr(found, n), getattr(expected, n)) for n in told]
    return [f"{n}: found {a}, expected {b}" for n, a, b in pairs if a != b]


def check_preset(config: Any, name: str) -> None:
    """Compares an architecture with a published one.

    Raises:
      CheckpointError: they differ; all differences are listed.
      ValueError: there is no published model of that name.
    """
    problems = mismatches(config, preset(name))
    if problems:
        raise CheckpointError(listed(f"The checkpoint isn't {name!r}:", problems))
