"""The command as a whole: exit codes, one-line errors, the process itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loopwise
from loopwise.cli.main import main, one_line
from tests.test_public import VERBS

Run = Callable[..., tuple[int, str, str]]


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"loopwise {loopwise.__version__}\n", "")


def test_help_names_every_verb(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    named = re.search(r"\{(.*?)\}", out, re.DOTALL)
    assert named is not None
    assert "".join(named[1].split()).split(",") == VERBS


@pytest.mark.parametrize("arguments", [[], ["inspct"], ["inspect"], ["inspect", "x", "--plaan", "0"]])
def test_a_wrong_command_line_is_exit_code_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_a_misspelt_flag_is_answered_with_the_right_one(run: Run) -> None:
    assert "--plan" in run("inspect", "x", "--plaan", "0")[2]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "weights.gguf"), "weights.gguf: No such file or directory"),
        (OSError("cannot read\n\nTry this and that."), "cannot read"),
        (ValueError("\n  first  \nsecond"), "first"),
        (ValueError(), "ValueError"),
    ],
)
def test_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


def test_an_interrupt_is_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> list[dict[str, str]]:
        raise KeyboardInterrupt

    monkeypatch.setattr("loopwise.cli.compose.composition", interrupt)
    assert run("compose") == (130, "", "interrupted\n")


def test_a_mistake_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[dict[str, str]]:
        raise KeyError("ours")

    monkeypatch.setattr("loopwise.cli.compose.composition", fail)
    with pytest.raises(KeyError, match="ours"):
        main(["compose"])


@given(plan=st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_no_plan_text_ends_in_a_traceback(plan: str) -> None:
    # Plans are read before the source is, so a source that does not exist keeps this fast.
    assert main(["generate", "no-such-folder", "--prompt", "x", f"--plan={plan}", "--loops=0"]) == 2


@pytest.mark.parametrize("module", ["loopwise", "loopwise.cli.main"])
def test_it_runs_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"loopwise {loopwise.__version__}\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from loopwise.cli.main import main; sys.exit(main(['compose']))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
