"""Fields of architectures, whoever gives them: a file, or a caller."""

from __future__ import annotations

import dataclasses
import functools
import reprlib
import types
import typing
from collections.abc import Hashable, Mapping
from typing import Any, cast

MOST = 2**31 - 1  # of any whole number: no size that is computed from two of them overflows 64 bits
MOST_FLOAT = 1e30  # of any other, so that float32 has it
MOST_LAYERS = 10_000
MOST_EXPERTS = 1_000_000


def problems_of_fields(config: Any) -> list[str]:
    """Fields of a dataclass whose values aren't of their type, or are beyond any model's, in words."""
    found = []
    for name, kind in _kinds(cast(Hashable, type(config))).items():
        value = getattr(config, name)
        if not _fits(value, kind):
            found.append(f"{name}: found {reprlib.repr(value)}, expected {_words(kind)}")
    return found


def problems_of_values(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[str]:
    """JSON values that are there, aren't null, and aren't of their kind, in words. Lists are JSON's."""
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not None}
    return [
        f"{name}: found {reprlib.repr(values[name])}, expected {_words(kind)}"
        for name, kind in kinds.items()
        if name in given and not _fits(given[name], kind)
    ]


def problems_of_counts(layers: Mapping[str, int], num_experts: int) -> list[str]:
    """Numbers of layers, by field, and of experts that are beyond any model's: what is made for each would not end."""
    limits = [(name, found, MOST_LAYERS) for name, found in layers.items()]
    limits.append(("num_experts", num_experts, MOST_EXPERTS))
    return [f"{name}: found {found}, expected at most {most}" for name, found, most in limits if found > most]


def from_dict(cls: Any, fields: Any, what: str) -> Any:
    """A frozen dataclass from JSON values. Raises ValueError that names all unknown or missing fields."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{what}: found {reprlib.repr(fields)}, expected fields.")
    known = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
    unknown = sorted(map(str, set(fields) - set(known)))
    missing = sorted(n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields)
    if unknown or missing:
        raise ValueError(f"{what}: unknown fields {reprlib.repr(unknown)}, missing fields {missing}.")
    return cls(**fields)


@functools.cache
def _kinds(cls: Hashable) -> dict[str, Any]:
    kind = cast(Any, cls)
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(_fits(value, k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        element, _ = typing.get_args(kind)
        return isinstance(value, tuple) and all(_fits(v, element) for v in value)
    if kind is float:
        return abs(value) <= MOST_FLOAT if type(value) is float else type(value) is int and abs(value) <= MOST
    if kind is int:
        return type(value) is int and 0 <= value <= MOST
    if kind is dict:
        return isinstance(value, Mapping)
    return type(value) is kind


def _words(kind: Any) -> str:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(map(_words, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"a list, each {_words(typing.get_args(kind)[0])}"
    words = {
        int: f"a whole number up to {MOST}",
        dict: "an object",
        float: "a finite number",
        str: "text",
        bool: "true or false",
    }
    return words.get(kind, "nothing" if kind is types.NoneType else kind.__name__)
