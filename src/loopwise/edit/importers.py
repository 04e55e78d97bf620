"""Edits that other tools describe: mergekit's passthrough merges, RYS layer specs, stacking lists; and the way back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loopwise.edit.maps import DepthEdit
from loopwise.edit.operators import DepthOperator, Operator, copies_of, rearranged
from loopwise.edit.passthrough import Passthrough, read_mergekit, to_mergekit
from loopwise.edit.surgery import Order
from loopwise.edit.text import parse
from loopwise.loop.config import suggest
from loopwise.plan import Plan

__all__ = ["Passthrough", "Rys", "operator_from", "read_mergekit", "read_stacking_list", "to_mergekit", "to_rys"]

# What a stacking file of prts holds besides the list: names of its own checkpoint format.
_STACKING_KEYS = (
    "src_config_name",
    "trg_config_name",
    "src_init_path",
    "embd_name",
    "ln_name",
    "head_name",
    "layer_name",
)
_PAIR = re.compile(r"\(?\s*(\d+)\s*,\s*(\d+)\s*\)?")
_RYS_FORMS = 'write "(2,5)", "blocks:2,5;7,9" or "layers:0-4,2-9"'


@dataclass(frozen=True, kw_only=True)
class Rys(DepthOperator):
    """A layer spec of RYS (github.com/dnhkng/RYS): blocks of layers that run twice, or the list of visits.

    Attributes:
        spec: `(i,j)` is `0..j-1, i..L-1`, and `(0,0)` the model as it is; `blocks:i,j;k,l` puts the layers k..l-1 after
            the last visit of layer l-1, one block after the other; `layers:0,1,2` lists the visits, where a range such
            as `0-2`, both ends included, is an addition of ours.
    """

    kind: ClassVar[str | None] = "edit.rys"
    spec: str

    def __post_init__(self) -> None:
        """Check the spelling."""
        super().__post_init__()
        self._visits(None)

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """The visits of the spec; layers that it leaves out go."""
        visits = self._visits(num_layers)
        outside = [layer for layer in visits if layer >= num_layers]
        self.require(not outside, "spec", f"names layer {(outside or [0])[0]}, the model has 0 to {num_layers - 1}")
        kept = sorted(set(visits))
        new = Plan.from_layers([kept.index(layer) for layer in visits])
        return rearranged(self, plan, num_layers, new, copies_of(kept))

    def _visits(self, num_layers: int | None) -> list[int]:
        """The listed visits; with None instead of the number of layers the spelling is all that is checked."""
        kind, colon, rest = self.spec.strip().partition(":")
        if colon and kind.strip().lower() == "layers":
            return self._listed(rest)
        self.require(not colon or kind.strip().lower() == "blocks", "spec", f"is no layer spec: {_RYS_FORMS}")
        visits = list(range(num_layers)) if num_layers is not None else None
        for text in (rest if colon else self.spec).split(";"):
            pair = _PAIR.fullmatch(text.strip())
            self.require(pair is not None, "spec", f"is no layer spec: {_RYS_FORMS}")
            assert pair is not None
            first, end = int(pair[1]), int(pair[2])
            self.require(first < end or (first, end) == (0, 0), "spec", f"has the block {first},{end}, which is empty")
            if visits is None or end == 0:
                continue
            self.require(end <= len(set(visits)), "spec", f"has a block up to layer {end - 1} of {num_layers} layers")
            after = len(visits) - visits[::-1].index(end - 1)
            visits[after:after] = range(first, end)
        return visits or []

    def _listed(self, text: str) -> list[int]:
        visits: list[int] = []
        for item in text.split(","):
            ends = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
            self.require(ends is not None, "spec", f"has {item.strip()!r} where a layer or a range such as 3-5 goes")
            assert ends is not None
            first, last = int(ends[1]), int(ends[2] or ends[1])
            self.require(first <= last, "spec", f"has the range {first}-{last}, which is empty")
            visits.extend(range(first, last + 1))
        return visits


def operator_from(text: str, *, dtype: str | None = None) -> Operator:
    """The operator that a text names: `NAME(...)` as in `text.parse`, or what another tool has written.

    Args:
        text: `mergekit:FILE.yml` (passthrough merges of one model), `rys:SPEC` or `rys:FILE` (see `Rys`; a file holds
            one spec or RYS's JSON), `stacking:FILE.json` (a `stacking_list` of prts), or an operator.
        dtype: type of the checkpoint's tensors, such as "bfloat16". A mergekit file that asks for another is refused.

    Raises:
        ValueError: an unknown operator or form, a file that cannot be read, or what it asks for cannot be done.
    """
    form, colon, rest = text.strip().partition(":")
    if not colon or not form.isidentifier():
        return parse(text)
    if form == "mergekit":
        made = read_mergekit(rest)
        if made.dtype is not None and made.dtype != dtype:
            has = f"the checkpoint has {dtype}" if dtype else "which type the checkpoint has is not known here"
            raise ValueError(f"{rest}: asks for dtype {made.dtype}, {has}: edits keep it, remove the key")
        return made.operator
    if form == "stacking":
        return read_stacking_list(rest)
    if form == "rys":
        return Rys(spec=_rys_spec(Path(rest)) if os.path.isfile(rest) else rest)
    raise ValueError(f"operator {text!r}: unknown form {form!r}{suggest(form, ['mergekit', 'rys', 'stacking'])}")


def read_stacking_list(path: Path | str) -> Order:
    """The order that a stacking file of prts lists (G_stack, 2405.15319): `{"stacking_list": [0, 1, 0, 1], ...}`.

    Raises:
        ValueError: no such file, no JSON, no list, or keys that are not known.
    """
    data = _json(Path(path))
    unknown = [key for key in data if key not in (*_STACKING_KEYS, "stacking_list")]
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}{suggest(unknown[0], [*_STACKING_KEYS, 'stacking_list'])}")
    return Order(layers=_layer_list(data.get("stacking_list"), f"{path}: stacking_list"))


def to_rys(edit: DepthEdit) -> str:
    """The visits of an edit as RYS's canonical spec, such as `layers:0,1,2,1,2,3`.

    Raises:
        ValueError: the edit makes other tensors than copies, or adds something.
    """
    if not edit.is_copy:
        raise ValueError("a layer spec has copies only, and this edit makes new tensors or adds some")
    return "layers:" + ",".join(str(layer.sources[0]) for layer in edit.unrolled().layers)


def _rys_spec(path: Path) -> str:
    """The one spec of a file: RYS's JSON object, or a line of text."""
    text = _text(path).strip()
    if not text.startswith("{"):
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        if len(lines) != 1:
            raise ValueError(f"{path}: holds {len(lines)} specs, an edit needs one: name it as rys:SPEC")
        return lines[0]
    data = _json(path)
    for key in ("layers", "layer_indices"):
        if key in data:
            return "layers:" + ",".join(map(str, _layer_list(data[key], f"{path}: {key}")))
    for key in ("blocks", "key", "spec"):
        if isinstance(data.get(key), str | list):
            value = data[key] if isinstance(data[key], str) else ",".join(map(str, data[key]))
            return value if key != "blocks" or value.startswith("blocks:") else f"blocks:{value}"
    raise ValueError(f'{path}: has none of "layers", "blocks", "key" and "spec"')


def _layer_list(value: Any, where: str) -> tuple[int, ...]:
    good = isinstance(value, Sequence) and not isinstance(value, str)
    if not good or not value or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError(f"{where} must be a list of layer numbers")
    return tuple(value)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return data


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise ValueError(f"{path}: {reason}") from None
