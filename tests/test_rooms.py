"""The order of rooms (DESIGN section 5): a room imports only rooms above it, and few rooms touch the outside."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import loopwise

ROOMS = (
    "plan",
    "io",
    "plots",
    "loop",
    "cache",
    "models",
    "checkpoints",
    "edit",
    "measure",
    "tasks",
    "decode",
    "train",
    "study",
    "recipes",
    "cli",
)
RANK = {room: rank for rank, room in enumerate(ROOMS)}
PACKAGE = Path(loopwise.__file__).parent
# The facade names everything it exports, and `python -m loopwise` starts the last room.
FACADE = {"__init__.py", "__main__.py"}
HUB = Path("models/hub.py")


def transformers_submodules() -> frozenset[str]:
    """Names of the modules inside transformers, without importing it."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    packages = {path.name for path in folder.iterdir() if (path / "__init__.py").exists()}
    return frozenset(packages | {path.stem for path in folder.glob("*.py")})


SUBMODULES = transformers_submodules()


def absolute(node: ast.ImportFrom, module: tuple[str, ...], is_package: bool) -> str:
    """The absolute name that a `from ... import` reads, relative forms resolved."""
    if not node.level:
        return node.module or ""
    package = module if is_package else module[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join((*base, *([node.module] if node.module else [])))


def imported(source: str, module: tuple[str, ...], is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that the source imports, at any nesting, `importlib` by literal included.

    For `from a import b` the name is `a.b`: whether b is a module or an attribute, it lives in a.
    """
    tree = ast.parse(source)
    imports = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names = {alias.asname or alias.name: alias.name for alias in imports}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module, is_package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            # `transformers.models` and `loopwise.attach` reach further than the plain import says.
            if names.get(node.value.id) in ("loopwise", "transformers"):
                yield node.lineno, f"{names[node.value.id]}.{node.attr}"


def room_of(name: str) -> str | None:
    """The room that a dotted name of ours lives in; None for the package itself and for foreign names."""
    parts = name.split(".")
    if parts[0] != "loopwise" or len(parts) == 1:
        return None
    home = loopwise._HOME.get(parts[1])
    return home.split(".")[1] if home else (parts[1] if parts[1] in RANK else None)


def violations(source: str, path: Path) -> list[str]:
    """What the file at `path` (relative to the package) imports against the order of rooms."""
    is_package = path.name == "__init__.py"
    module = ("loopwise", *path.parent.parts) if is_package else ("loopwise", *path.with_suffix("").parts)
    own = path.parts[0]
    found = []
    for line, name in imported(source, module, is_package):
        where = f"{path}:{line} imports {name}"
        target = room_of(name)
        if target is not None and RANK[target] > RANK[own]:
            found.append(f"{where}: room {own} stands above {target}")
        parts = name.split(".")
        if parts[0] == "transformers" and len(parts) > 1 and parts[1] in SUBMODULES and path != HUB:
            found.append(f"{where}: only {HUB} reaches into transformers")
        if own == "plan" and target != "plan" and parts[0] not in sys.stdlib_module_names:
            found.append(f"{where}: plan is pure Python")
    return found


def files() -> list[Path]:
    paths = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
    return [path for path in paths if str(path) not in FACADE]


def test_every_file_is_in_a_known_room() -> None:
    strangers = [str(path) for path in files() if path.parts[0] not in RANK or len(path.parts) == 1]
    assert strangers == []


@pytest.mark.parametrize("path", files(), ids=str)
def test_a_room_imports_only_rooms_above_it(path: Path) -> None:
    assert violations((PACKAGE / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("plan/nodes.py", "import torch"),
        ("plan/nodes.py", "from loopwise.loop import execute"),
        ("plan/nodes.py", "from ..io import atomic"),
        ("loop/execute.py", "def f():\n    from loopwise.models import hub"),
        ("loop/execute.py", "from loopwise import attach"),
        ("loop/execute.py", "import loopwise\nloopwise.attach"),
        ("loop/execute.py", "import loopwise as lw\nlw.cache"),
        ("loop/execute.py", "import importlib\nimportlib.import_module('loopwise.models.hub')"),
        ("loop/__init__.py", "from ..cache import policies"),
        ("models/attach.py", "from transformers.cache_utils import DynamicCache"),
        ("models/attach.py", "from transformers import cache_utils"),
        ("models/attach.py", "import transformers.models.llama.modeling_llama"),
        ("models/attach.py", "import transformers\nx = transformers.models.llama"),
        ("recipes/demo.py", "from loopwise.cli.main import main"),
    ],
)
def test_the_check_catches(path: str, source: str) -> None:
    assert violations(source, Path(path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("plan/nodes.py", "import re\nfrom loopwise.plan.slots import Slot\nfrom . import grammar"),
        ("loop/__init__.py", "from .execute import Visit"),
        ("cache/depth.py", "from loopwise import Plan"),
        ("cache/depth.py", "import loopwise\nloopwise.__version__, loopwise.Plan"),
        ("models/hub.py", "from transformers.cache_utils import DynamicCache"),
        ("models/attach.py", "from transformers import PreTrainedModel\nfrom loopwise.loop.execute import Visit"),
        ("cli/score.py", "import loopwise\nimport transformers\nx = transformers.AutoConfig"),
    ],
)
def test_the_check_allows(path: str, source: str) -> None:
    assert violations(source, Path(path)) == []
