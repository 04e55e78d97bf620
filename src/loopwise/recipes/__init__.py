"""Runs as Python functions: each returns one whole config; `loopwise train NAME field=value` trains it.

A recipe is a public function of a module of this room, without arguments that must be given, whose docstring's first
line says what it trains. Recipes of your own go into any Python file: `loopwise train FILE.py`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loopwise.train.config import RunConfig

_HOMES = ("quickstart", "reasoning", "language", "regression", "growth", "refine")


def recipes() -> dict[str, Callable[..., RunConfig]]:
    """Every recipe of the package by name, sorted."""
    found: dict[str, Callable[..., RunConfig]] = {}
    for home in _HOMES:
        module = importlib.import_module(f"loopwise.recipes.{home}")
        found |= _functions(vars(module), module.__name__)
    return dict(sorted(found.items()))


def described() -> dict[str, str]:
    """First line of the docstring of every recipe, by name."""
    return {name: (inspect.getdoc(recipe) or "").partition("\n")[0] for name, recipe in recipes().items()}


def find(target: str) -> RunConfig:
    """The config of a recipe by its name, or of a function in a Python file: `FILE.py` or `FILE.py:FUNCTION`.

    Raises:
        ValueError: an unknown name (the nearest is suggested), or a file that has no recipe or several.
    """
    file, _, function = target.partition(":")
    if file.endswith(".py"):
        return _from_file(Path(file), function)
    known = recipes()
    if target not in known:
        nearest = difflib.get_close_matches(target, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
        if Path(target).is_dir():
            raise ValueError(f"{target} is a folder, but not of a run: name a recipe or a run folder")
        raise ValueError(f"{target!r} is neither a recipe nor a run folder; {hint}")
    return known[target]()


def _from_file(file: Path, function: str) -> RunConfig:
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    try:
        module = runpy.run_path(str(file))
    except Exception as error:  # whatever a file of a user raises
        raise ValueError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    known = _functions(module, None)
    if function:
        if function not in known:
            raise ValueError(f"{file} has no function {function!r} that returns a RunConfig; it has {_listed(known)}")
        return _made(known[function], file)
    if not known:
        raise ValueError(f"{file} has no recipe: define a function `def name() -> RunConfig` in it")
    if len(known) != 1:
        raise ValueError(f"{file} has {len(known)} recipes ({_listed(known)}): name one as {file}:FUNCTION")
    return _made(next(iter(known.values())), file)


def _made(recipe: Callable[..., Any], file: Path) -> RunConfig:
    config = recipe()
    if not isinstance(config, RunConfig):
        raise ValueError(f"{file}: the recipe returned {type(config).__name__}, not a RunConfig")
    return config


def _functions(names: Mapping[str, Any], module: str | None) -> dict[str, Callable[..., RunConfig]]:
    """Public functions that were defined there and say that they return a RunConfig."""
    found = {}
    for name, value in names.items():
        if name.startswith("_") or not inspect.isfunction(value):
            continue
        at_home = (
            value.__module__ == module if module else value.__globals__ is names or value.__module__ == "<run_path>"
        )
        returns = value.__annotations__.get("return")
        arguments = inspect.signature(value).parameters.values()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needs = any(item.default is item.empty and item.kind not in variadic for item in arguments)
        if at_home and not needs and returns in (RunConfig, "RunConfig"):
            found[name] = value
    return found


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"
