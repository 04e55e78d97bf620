"""The display of a run: plain lines where nobody can see a panel, a panel that cleans up after itself where one can."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import loopwise
from loopwise.io.amounts import amount, duration
from loopwise.train.panel import LiveProgress, PlainProgress, Progress, progress, sparkline

SOURCE = str(Path(loopwise.__file__).parent.parent)
SPEED = {"tokens_per_second": 12345.0, "flops_per_second": 1.5e9}
VALUES = {"step": 3, "loss": 0.5, "lr": 3e-4, "iterations": 4.0, "time": SPEED, "grad_norm": 1.0}


def plain() -> tuple[PlainProgress, io.StringIO]:
    out = io.StringIO()
    shown = progress("demo", console=Console(file=out))
    assert isinstance(shown, PlainProgress)
    return shown, out


def live(encoding: str = "utf-8") -> tuple[LiveProgress, io.TextIOWrapper]:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    shown = progress("demo", console=Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"}))
    assert isinstance(shown, LiveProgress)
    return shown, out


def written(out: io.TextIOWrapper) -> str:
    return out.buffer.getvalue().decode(out.encoding)  # type: ignore[attr-defined]


def test_plain_lines_say_everything_and_hold_no_control_characters():
    shown, out = plain()
    with shown:
        shown.update(3, 10, VALUES)
        shown.update(4, 10, VALUES, log=False)
        shown.update(5, 10, VALUES | {"eval/exact": 0.25}, log=False)
        shown.update(10, 10, VALUES, log=False)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 3/10, loss 0.5, lr 0.0003, iterations 4, 12.3 k tokens/s, 1.50 GFLOP/s")
    assert "left " not in lines[0] and re.search(r", left \d+ s", lines[1]) and "left " not in lines[2]
    assert lines[1].endswith(", exact 0.25") and "exact" not in lines[2]
    assert re.fullmatch(r"[ -~\n]*", out.getvalue())


def test_values_that_are_absent_or_not_finite_do_no_harm():
    shown, out = plain()
    shown.update(1, 2, {"loss": math.nan, "time": {"tokens_per_second": math.inf}})
    assert out.getvalue().startswith("step 1/2, loss nan")
    drawn, _ = live()
    with drawn:
        drawn.update(1, 2, {})
        drawn.update(2, 2, {"loss": math.nan})


def test_time_left_follows_the_recent_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("loopwise.train.panel.time.monotonic", lambda: clock[0])
    shown, out = plain()
    with shown:
        for step in range(1, 101):
            clock[0] += 2.0
            shown.update(step, 200, VALUES)
    assert "left " not in out.getvalue().splitlines()[0]
    assert out.getvalue().splitlines()[-1].endswith("left 3 min 20 s")


def test_nothing_is_shown_when_not_enabled(capsys):
    with progress("demo", enabled=False) as shown:
        shown.update(1, 2, VALUES)
    assert type(shown) is Progress
    assert capsys.readouterr() == ("", "")


def test_standard_output_that_is_no_terminal_gets_plain_lines(capsys):
    with progress("demo") as shown:
        shown.update(1, 2, VALUES)
    assert capsys.readouterr().out.startswith("step 1/2, loss 0.5")


def test_the_panel_ends_with_the_newest_step_and_keeps_scores():
    shown, out = live()
    with shown:
        for step in range(1, 50):
            shown.update(step, 60, VALUES | {"loss": 1 / step} | ({"eval/exact@8": 0.125} if step == 7 else {}))
    last = written(out)[written(out).rindex("demo: step") :]
    assert last.startswith("demo: step 49 of 60")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last)
    for part in ("0.02041", "0.0003", "12.3 k", "1.50 GFLOP/s", "exact@8", "0.125", "left", "▁"):
        assert part in text, part
    assert not any("loss" in line and line.count("━") for line in text.splitlines()), "the bar has a line of its own"


def test_an_encoding_without_blocks_gets_ascii_curves():
    shown, out = live("ascii")
    with shown:
        shown.update(1, 2, {"loss": 2.0})
        shown.update(2, 2, {"loss": 1.0})
    assert "#_" in written(out)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_gives_the_cursor_back(error):
    shown, out = live()
    with pytest.raises(error), shown:
        shown.update(1, 2, VALUES)
        raise error
    assert written(out).rindex("\x1b[?25h") > written(out).rindex("\x1b[?25l")


SCRIPT = """
import os, signal
from loopwise.train.panel import progress
try:
    with progress("demo") as shown:
        for step in range(1, 4):
            shown.update(step, 9, {"loss": 1.0 / step})
        os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_on_a_real_terminal_the_panel_is_live_and_ctrl_c_is_clean():
    ours, theirs = pty.openpty()
    env = os.environ | {"PYTHONPATH": SOURCE, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    data = b""
    try:
        while piece := os.read(ours, 4096):
            data += piece
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(ours)
    assert child.wait(60) == 0
    text = data.decode()
    assert "demo: step 3 of 9" in text
    assert text.rstrip().endswith("interrupted") and text.rindex("\x1b[?25h") > text.rindex("demo: step 3")


def test_sparkline_spans_the_blocks_and_averages():
    assert sparkline([0.0, 1.0, 2.0], 10, "abc") == "abc"
    assert sparkline([0.0, 0.0, 4.0, 4.0], 2, "abc") == "ac"
    assert sparkline([5.0] * 7, 3, "abc") == "aaa"
    assert sparkline([1.0, math.nan, 3.0], 3, "abc") == "a!c"
    assert sparkline([math.inf], 3, "abc") == "!"
    assert len(sparkline([float(i % 17) for i in range(1000)], 40)) == 40


def test_amounts_and_durations_are_short():
    assert [amount(value, "B") for value in (0, 12.345, 999.6, 134515008, 2e12)] == [
        "0 B",
        "12.35 B",
        "1.00 kB",
        "135 MB",
        "2.00 TB",
    ]
    assert [duration(value) for value in (0.4, 59.6, 200, 7500, 273600)] == [
        "0 s",
        "1 min",
        "3 min 20 s",
        "2 h 5 min",
        "3 d 4 h",
    ]
