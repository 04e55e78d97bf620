"""Checks and JSON form shared by the component configs of this room.

A component config is a frozen, keyword-only dataclass whose fields are JSON values or further component configs. A
class that stands beside others in the same field (a mixer) names itself by a class variable `kind`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any, NoReturn, TypeVar

Config = TypeVar("Config")
_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", dict: "a dict"}
_NAMES |= {types.NoneType: "None"}


def refuse(config: Any, field: str, fix: str) -> NoReturn:
    """Raise `ValueError` for a field of a config: its name, its value, and what to do."""
    raise ValueError(f"{type(config).__name__}.{field} is {getattr(config, field)!r}: {fix}")


def check_choice(config: Any, field: str, options: Collection[str]) -> None:
    """Raise `ValueError` unless a field holds one of the options; suggests the nearest."""
    value = getattr(config, field)
    if value not in options:
        refuse(config, field, f"use one of {', '.join(options)}{_nearest(str(value), options)}")


def check_counts(config: Any, *fields: str) -> None:
    """Raise `ValueError` unless every field is at least 1; None passes where the type allows it (`check_types`)."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and value < 1:
            refuse(config, field, "use a whole number of at least 1")


def check_probability(config: Any, *fields: str) -> None:
    """Raise `ValueError` unless every field is a dropout probability, at least 0 and below 1."""
    for field in fields:
        if not 0 <= getattr(config, field) < 1:
            refuse(config, field, "use a probability of at least 0 and below 1")


def check_types(config: Any) -> None:
    """Raise `ValueError` for the first field whose value is not of its declared type; numbers must be finite."""
    for field, choices in _choices(type(config)).items():
        if not any(_fits(getattr(config, field), choice) for choice in choices):
            refuse(config, field, f"use {' or '.join(_NAMES.get(choice, choice.__name__) for choice in choices)}")


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a component config: nested configs become dicts, `kind` is stored where a class has one."""
    data = {"kind": config.kind} if hasattr(config, "kind") else {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        data[item.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return data


def from_dict(cls: type[Config], data: dict[str, Any]) -> Config:
    """The config that `to_dict` described.

    Raises:
        ValueError: an unknown field or kind (with the nearest known one), a missing field, or a value that the config
            refuses.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__} is made from a dict, not from {type(data).__name__}")
    known = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name == "kind" and name not in known:
            continue
        if name not in known:
            raise ValueError(f"{cls.__name__} has no field {name!r}{_nearest(name, known)}")
        choices = _component_fields(cls).get(name)
        values[name] = from_dict(_pick(cls, name, choices, value), value) if choices and value is not None else value
    missing = [name for name, item in known.items() if name not in values and _is_required(item)]
    if missing:
        raise ValueError(f"{cls.__name__} needs the field {missing[0]!r}")
    return cls(**values)


def _pick(cls: type, field: str, choices: tuple[type, ...], data: Any) -> type:
    """The class among `choices` that a dict describes, by its `kind` where there are several."""
    if len(choices) == 1:
        return choices[0]
    kinds = {getattr(choice, "kind", choice.__name__): choice for choice in choices}
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        options = f"one of {', '.join(kinds)}{_nearest(str(kind), kinds)}"
        raise ValueError(f"{cls.__name__}.{field} has kind {kind!r}: use {options}")
    return kinds[kind]


def _component_fields(cls: type) -> dict[str, tuple[type, ...]]:
    """For every field that takes component configs, their classes."""
    found = {
        name: tuple(choice for choice in choices if dataclasses.is_dataclass(choice))
        for name, choices in _choices(cls).items()
    }
    return {name: choices for name, choices in found.items() if choices}


def _choices(cls: type) -> dict[str, tuple[type, ...]]:
    """For every field, the types that its values may have."""
    hints, found = typing.get_type_hints(cls), {}
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[item.name] = tuple(typing.get_origin(part) or part for part in parts)
    return found


def _fits(value: Any, choice: type) -> bool:
    if choice in (int, float):
        number = isinstance(value, int if choice is int else (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, choice)


def _is_required(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _nearest(name: str, options: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(options), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
