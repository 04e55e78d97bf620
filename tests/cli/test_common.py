"""Reading arguments and texts, writing results."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from loopwise import Plan
from loopwise.cli import common


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (None, None),
        ("4", 4),
        (" 4 ", 4),
        ("core=4", {"core": 4}),
        ("outer=2,inner=3", {"outer": 2, "inner": 3}),
        ("outer = 2, inner = 3", {"outer": 2, "inner": 3}),
    ],
)
def test_loops(text: str | None, counts: object) -> None:
    assert common.parse_loops(text) == counts


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "1.5", "x", "core=", "=4", "core=0", "a=1,a=2", "4,5", "a=1,4", "a=1,", "٣", "9" * 5000, "00"],
)
def test_bad_loops(text: str) -> None:
    with pytest.raises(ValueError, match="^--loops "):
        common.parse_loops(text)


def test_planned_sets_counts() -> None:
    assert common.planned("0 core:(1-2)x8 3", "2") == Plan.parse("0 core:(1-2)x2 3")
    assert common.planned("0 core:(1-2)x8 3", "core=3") == Plan.parse("0 core:(1-2)x3 3")
    assert common.planned(None, "3") is None


@pytest.mark.parametrize(("plan", "loops"), [("0 core:(1-2)x8", "cor=2"), ("0-3", "2"), ("0 (1-", None)])
def test_planned_refuses(plan: str, loops: str | None) -> None:
    with pytest.raises(ValueError):
        common.planned(plan, loops)


def test_read_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffgrün\r\n".encode())
    assert common.read_text(path) == "grün\r\n"


@pytest.mark.parametrize(("data", "message"), [(b"caf\xe9 au lait", "UTF-8"), (b"", "no text"), (b" \n", "no text")])
def test_read_text_refuses(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        common.read_text(path)


def test_json_is_written_whole_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    old = os.umask(0o022)
    try:
        common.write_json(path, {"a": [1, "ü"]})
    finally:
        os.umask(old)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, "ü"]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old", encoding="utf-8")

    def fail(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        common.write_whole(path, fail)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_check_writable(tmp_path: Path) -> None:
    common.check_writable(None)
    common.check_writable(tmp_path / "new.json")
    with pytest.raises(ValueError, match="is a folder"):
        common.check_writable(tmp_path)
    with pytest.raises(ValueError, match="create it first"):
        common.check_writable(tmp_path / "missing" / "new.json")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (134515008, "135 M"),
        (99960, "100 k"),
        (2.5e12, "2.50 T"),
        (1.5, "1.5"),
    ],
)
def test_amount(value: float, text: str) -> None:
    assert common.amount(value) == text


def test_amount_with_unit() -> None:
    assert common.amount(24576, "B") == "24.6 kB"
    assert common.amount(12, "B") == "12 B"


@pytest.mark.parametrize("name", ["warp", "cuda:99", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="--device"):
        common.pick_device(name)
