"""The public surface: names, flags, and what is not imported before it is needed."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import loopwise

NAMES = [
    "Plan",
    "PlanError",
    "attach",
    "detach",
    "load",
    "load_tokenizer",
    "materialize",
    "plan_of",
    "save",
    "set_cache",
    "set_loops",
    "use_loops",
]
VERBS = [
    "tour",
    "train",
    "uptrain",
    "compare",
    "recipes",
    "tasks",
    "data",
    "inspect",
    "generate",
    "calibrate",
    "serve",
    "score",
    "propose",
    "edit",
    "export",
    "import",
    "families",
    "architectures",
    "compose",
]
FLAGS = Path(__file__).parent / "cli" / "flags.txt"
HEAVY = {"torch", "transformers", "numpy", "matplotlib", "safetensors"}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "10000"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, check=False)


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running the code."""
    done = python(f"{code}\nimport json, sys\nprint('\\n' + json.dumps(list(sys.modules)))", *arguments)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_names_are_pinned() -> None:
    assert sorted(loopwise.__all__) == NAMES
    assert set(NAMES) <= set(dir(loopwise))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_resolves_to_its_home(name: str) -> None:
    home = importlib.import_module(loopwise._HOME[name])
    assert getattr(loopwise, name) is getattr(home, name)
    assert callable(getattr(loopwise, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="attatch"):
        loopwise.attatch  # noqa: B018


def test_version_matches_the_project_file() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{loopwise.__version__}"' in project


def test_import_is_light() -> None:
    assert not HEAVY & loaded_after("import loopwise")


def test_the_plan_language_is_light() -> None:
    assert not HEAVY & loaded_after("import loopwise; loopwise.Plan.parse('0-1 core:(2-3)x2')")


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS), ["--version"]], ids=" ".join)
def test_help_is_light(arguments: list[str]) -> None:
    code = "import sys\nfrom loopwise.cli.main import main\nassert main(sys.argv[1:]) == 0"
    assert not HEAVY & loaded_after(code, *arguments)


def surface() -> str:
    """Every verb with its arguments and their defaults, one per line, read off --help."""
    lines = []
    for verb in VERBS:
        done = python("import sys; from loopwise.cli.main import main; sys.exit(main(sys.argv[1:]))", verb, "--help")
        assert done.returncode == 0, done.stderr
        lines.append(verb)
        # An argument starts at the left edge of its box; what is indented further describes it.
        boxed = "\n".join(line[2:].rstrip("│ ") for line in done.stdout.splitlines() if line.startswith("│"))
        for item in re.split(r"\n(?=\S)", boxed):
            name, note = re.split(r"\s{2,}", item, maxsplit=1)
            marks = re.findall(r"\(((?:default: .*|required|repeatable))\)$", note)
            lines.append("  " + "  ".join([name, *marks]))
    return "\n".join(lines) + "\n"


def test_flags_are_pinned() -> None:
    """A changed flag breaks scripts: change flags.txt together with the changelog."""
    assert surface() == FLAGS.read_text(encoding="utf-8")
