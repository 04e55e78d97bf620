"""`loopwise tour`: what a newcomer sees."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Main = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


def test_the_tour_shows_an_answer_that_forms_and_writes_it_down(run: Main, tmp_path: Path) -> None:
    code, out, err = run(
        "tour", "--row", 3, "--iterations", 5, "--png", tmp_path / "a.png", "--json", tmp_path / "a.json"
    )
    assert (code, err) == (0, "")
    data = json.loads((tmp_path / "a.json").read_text())
    asked = data["question"]
    walk = [asked["walk"][0]]
    for _ in range(asked["steps"]):
        walk.append(asked["successors"][walk[-1]])
    letters = [chr(ord("a") + node) for node in walk]
    assert f"Start at {letters[0]} and follow {asked['steps']} arrows" in out
    assert "the walk   " + " > ".join(letters) in out
    said = re.findall(r"^ +(\d+) +(\S) +[\d.]+  [\d.]+ ", out, re.MULTILINE)
    assert [int(number) for number, _ in said] == [1, 2, 3, 4, 5] and said[-1][1] == letters[-1]
    assert out.count("  right\n") == sum(item["steps"] == asked["steps"] for item in data["answers"]) >= 1
    assert set(data["accuracy"]) == {"1", "2", "3", "4", "5", "10"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert out.isascii() and max(map(len, out.splitlines())) <= 120


def test_other_rows_are_other_questions(run: Main) -> None:
    shown = {run("tour", "--row", row, "--iterations", 1)[1].split("\n\n")[1] for row in (0, 1)}
    assert len(shown) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--row", -1), "--row -1: use 0 to 9999"),
        (("--iterations", 0), "--iterations 0: use 1 to 64"),
        (("--png", "nowhere/a.png"), "nowhere is not a folder, create it first"),
    ],
)
def test_bad_input(refused: Refused, arguments: tuple[object, ...], message: str) -> None:
    assert refused("tour", *arguments) == message
