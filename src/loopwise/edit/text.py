"""Operators as text, such as `llama_pro(every=4)`."""

from __future__ import annotations

import ast
import importlib
from dataclasses import fields
from typing import Any

from loopwise.edit.operators import Operator
from loopwise.loop.config import suggest

# Imported on the first look-up, so that every operator is known.
_HOMES = ("operators", "surgery", "importers", "width")


def operators() -> dict[str, type[Operator]]:
    """Every known operator by its name, sorted."""
    for home in _HOMES:
        importlib.import_module(f"loopwise.edit.{home}")
    found: dict[str, type[Operator]] = {}
    todo: list[type[Operator]] = [Operator]
    while todo:
        known = todo.pop()
        todo += known.__subclasses__()
        kind = known.__dict__.get("kind")
        if kind is not None:
            found[kind.removeprefix("edit.")] = known
    return dict(sorted(found.items()))


def parse(text: str) -> Operator:
    """The operator that a text such as `stack(2)`, `prune([3, 4])` or `recursive(3, init="average")` names.

    Values are in the order of the fields or by name; a name alone has no values.

    Raises:
        ValueError: no such text, an unknown operator or field (the nearest is suggested), or a refused value.
    """
    how = "write NAME(VALUE, FIELD=VALUE), such as llama_pro(every=4)"
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"operator {text!r}: {how}") from None
    if isinstance(call, ast.Name):
        call = ast.Call(func=call, args=[], keywords=[])
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError(f"operator {text!r}: {how}")
    name, known = call.func.id, operators()
    if name not in known:
        raise ValueError(f"operator {name!r} is unknown{suggest(name, known)}")
    declared = [item.name for item in fields(known[name])]
    if len(call.args) > len(declared):
        raise ValueError(f"operator {name} takes {', '.join(declared) or 'no value'}, got {len(call.args)} values")
    values: dict[str, Any] = {}
    for field, node in [*zip(declared, call.args, strict=False), *((item.arg, item.value) for item in call.keywords)]:
        if field not in declared:
            raise ValueError(f"operator {name} has no field {field!r}{suggest(str(field), declared)}")
        if field in values:
            raise ValueError(f"operator {name}: {field} is given twice")
        values[field] = _literal(node, text)
    try:
        return known[name](**values)
    except TypeError:
        missing = [item for item in declared if item not in values]
        raise ValueError(f"operator {name} needs {', '.join(missing)}, such as {name}({missing[0]}=...)") from None


def _literal(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):  # a bare word, as shells eat quotes
        return node.id
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"operator {text!r}: values are numbers, texts and lists of them") from None
    return tuple(value) if isinstance(value, list) else value
