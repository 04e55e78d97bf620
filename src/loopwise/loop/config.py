"""Configs of loop components: checked when made, and written to and read from plain JSON values.

A component is a frozen dataclass with a `kind` such as "update.concat": the axis of the loop and the choice on it.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Literal, Union

# Imported on the first look-up, so that every component of this room is known without importing them all here.
_HOMES = (
    "state",
    "update",
    "depth",
    "halting",
    "act",
    "criteria",
    "objective",
    "delta",
    "route",
    "conditioning",
    "signals",
    "carry",
)


@dataclass(frozen=True, kw_only=True)
class Component:
    """Base of every config of a loop component.

    Fields hold JSON values only: bool, int, float, str, None, tuples of them, other components, and, where a field is
    hinted `dict`, a JSON object that is kept as it is. The type and finiteness of each field is checked when the
    config is made; a subclass that checks ranges calls `super().__post_init__()` first.

    Attributes:
        kind: "axis.choice", unique among all components; None on classes that only share code.

    Raises:
        ValueError: a field has the wrong type, is not finite, or is not among the choices.
    """

    kind: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        """Check the type of every field."""
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            self.require(_fits(value, hint), field.name, f"must be {_describe(hint)}")

    def require(self, holds: bool, field: str, rule: str) -> None:
        """Raise a ValueError that names the component, the field, its value and the rule, unless the rule holds."""
        if not holds:
            raise ValueError(f"{self.kind or type(self).__name__}: {field}={getattr(self, field)!r} {rule}")


def to_dict(config: Component) -> dict[str, Any]:
    """A component as plain JSON values with a "kind" tag; nested components become nested dicts.

    Raises:
        ValueError: the component has no kind.
    """
    if config.kind is None:
        raise ValueError(f"{type(config).__name__} has no kind: only a concrete component can be written")
    return {"kind": config.kind} | {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def from_dict(data: Mapping[str, Any], *, axis: str | None = None) -> Component:
    """The component that `to_dict` wrote; `from_dict(to_dict(c)) == c`.

    Args:
        data: a mapping with a "kind" and the fields of that kind; fields with a default may be absent.
        axis: what to read a kind without a dot as a choice of: `{"kind": "concat"}` with axis "update" is
            "update.concat". A kind of another axis is an error.

    Raises:
        ValueError: no kind, an unknown kind or field (the nearest known name is suggested), a missing field, or a
            value that the component refuses.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise ValueError(f'a component needs a mapping with a "kind", got {data!r}')
    kind: str = data["kind"]
    if axis is not None and "." not in kind:
        kind = f"{axis}.{kind}"
    known = {name: found for name, found in kinds().items() if axis is None or name.startswith(f"{axis}.")}
    if kind not in known:
        raise ValueError(f"unknown component {kind!r}{suggest(kind, known)}")
    component = known[kind]
    declared = {field.name: field for field in fields(component)}
    for name in data:
        if name not in declared and name != "kind":
            raise ValueError(f"{kind}: unknown field {name!r}{suggest(name, declared)}")
    hints = typing.get_type_hints(component)
    values = {name: _rich(value, hints[name]) for name, value in data.items() if name != "kind"}
    for name, field in declared.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{kind}: field {name!r} is missing and has no default")
    return component(**values)


def kinds() -> dict[str, type[Component]]:
    """Every known component by its kind, sorted: those of this room, and those of any module imported so far."""
    for home in _HOMES:
        importlib.import_module(f"loopwise.loop.{home}")
    found: dict[str, type[Component]] = {}
    for component in _descendants(Component):
        # `kind` inherited from a concrete parent would hide the parent
        kind = component.__dict__.get("kind")
        if kind is None:
            continue
        assert kind not in found, f"two components are called {kind}"
        found[kind] = component
    return dict(sorted(found.items()))


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(names) or 'none'}"


def _descendants(component: type[Component]) -> Iterator[type[Component]]:
    for child in component.__subclasses__():
        yield child
        yield from _descendants(child)


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return to_dict(value)
    if isinstance(value, dict):
        return copy.deepcopy(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _rich(value: Any, hint: Any) -> Any:
    if isinstance(value, Mapping):
        return copy.deepcopy(dict(value)) if _is_object(hint) else from_dict(value)
    return tuple(_rich(item, None) for item in value) if isinstance(value, list | tuple) else value


def _is_object(hint: Any) -> bool:
    """Whether a field of this type holds a JSON object as it is, and no component."""
    return hint is dict or any(arg is dict for arg in typing.get_args(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin is tuple:
        return f"a tuple of items, each {_describe(args[0])}"
    if hint is type(None):
        return "None"
    if isinstance(hint, type) and issubclass(hint, Component):
        return "a component" if hint is Component else f"a component of type {hint.__name__}"
    return {float: "a finite number", int: "an integer", bool: "true or false", str: "a text", dict: "an object"}.get(
        hint, str(hint)
    )
