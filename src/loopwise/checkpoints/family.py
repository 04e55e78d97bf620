"""A family of foreign checkpoints: how to recognise it, what it is in our components, and where its tensors go."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loopwise.checkpoints.tensors import Rule, Tensors

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Attributes:
        name: its name in commands and tables.
        source: paper id and repository.
        matches: (config.json as a dictionary, tensor names) -> whether a checkpoint is of this family.
        build: (config.json, tensor names) -> a model of ours with fresh weights.
        rules: (config.json, tensor names) -> the tensor map, see `Rule`.
        differs: what differs between the paper and the published code, and which we follow.
        untied: the family of its checkpoints in which tensors that it shares differ; None refuses them.
    """

    name: str
    source: str
    matches: Callable[[Config, frozenset[str]], bool]
    build: Callable[[Config, frozenset[str]], Any]
    rules: Callable[[Config, frozenset[str]], list[Rule]]
    differs: str = ""
    untied: Family | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """The object in a folder's config.json; `ValueError` when it is absent or not an object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object")
    return values


def tensor_names(folder: Path) -> frozenset[str]:
    """Names of the tensors in a folder's safetensors files, read off index or header; none where there are no files."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            return frozenset(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        with open(single, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size)) if size <= single.stat().st_size else {}
        return frozenset(header) - {"__metadata__"}
    except (OSError, struct.error, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        return frozenset()  # whoever loads the tensors says what is wrong with them


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder's safetensors files; `ValueError` when there are none or one is broken."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}")
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is broken: {error}") from None
    return tensors


def require(config: Config, field: str, *allowed: Any) -> Any:
    """A field's value; `ValueError` when it is missing, or not among the allowed ones."""
    if field not in config:
        raise ValueError(f"config.json lacks the field {field}")
    value = config[field]
    if allowed and value not in allowed:
        raise ValueError(f"config.json has {field}={value!r}: supported is {', '.join(map(repr, allowed))}")
    return value


def count(config: Config, field: str, *, least: int = 1) -> int:
    """A field that holds a whole number of at least `least`; `ValueError` names it otherwise."""
    value = require(config, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"config.json has {field}={value!r}: use a whole number of at least {least}")
    return value
