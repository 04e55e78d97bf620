"""`loopwise tasks`: the list, rows as text, refusals."""

from __future__ import annotations

import sys

import pytest

from loopwise.cli.tasks import Tasks, describe, make, sample, tasks
from loopwise.tasks.base import Task, names
from loopwise.tasks.regression import RegressionTask
from loopwise.tasks.sudoku import Sudoku


def printed(capsys: pytest.CaptureFixture[str], **arguments) -> str:
    capsys.readouterr()
    Tasks(**arguments).run()
    return capsys.readouterr().out


def test_every_task_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys)
    for name, task in tasks().items():
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 4 and issubclass(task, Task | RegressionTask)
    assert set(names()) < set(tasks()) and "linear_regression" in tasks()


@pytest.mark.parametrize("name", sorted(set(tasks()) - {"gym"}))
def test_every_task_shows_rows(capsys: pytest.CaptureFixture[str], name: str) -> None:
    out = printed(capsys, name=name, show=2)
    first, second = (printed(capsys, name=name, show=count) for count in (0, 1))
    assert out.startswith(second) and second.startswith(first), "more rows follow the same ones"
    assert len(out) > len(second) > len(first) > 0
    assert out == printed(capsys, name=name, show=2) != printed(capsys, name=name, show=2, seed=1)


def test_a_board_is_shown_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, name="sudoku", overrides=("size=4", "form=grid", "min_blanks=9"), show=1)
    about, puzzle, solution = out.split("\n\n")
    assert "size=4" in about and "16 tokens per row, vocabulary of 6" in about
    puzzle_lines, solution_lines = puzzle.splitlines(), solution.splitlines()[:4]
    assert [len(line.split()) for line in (*puzzle_lines, *solution_lines)] == [4] * 8
    for shown, right in zip(" ".join(puzzle_lines).split(), " ".join(solution_lines).split(), strict=True):
        assert shown in (".", right)
    assert all(sorted(line.split()) == ["1", "2", "3", "4"] for line in solution_lines)
    assert "blanks" in solution.splitlines()[4]


def test_overrides_are_json_or_text() -> None:
    assert make("task.sudoku", ["size=4", "form=grid", "max_dead_ends=null"]) == Sudoku(size=4, form="grid")
    assert describe(make("linear_regression", ["active=3"]))[-1].endswith("squared error of predicting 0: 3")


def test_splits_show_different_rows() -> None:
    task = make("group_word", ["group=Z2"])
    shown = {split: sample(task, seed=0, index=0, split=split)[0] for split in ("train", "valid", "test")}
    assert len(set(shown.values())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sudko"}, "unknown task 'sudko'; did you mean 'sudoku'?"),
        ({"name": "sudoku", "overrides": ("siz=4",)}, "unknown field 'siz'; did you mean 'size'?"),
        ({"name": "sudoku", "overrides": ("size=5",)}, "size=5 must be one of 4, 6, 9"),
        ({"name": "sudoku", "overrides": ("size",)}, "'size' is no value of a field: write field=value"),
        ({"name": "sudoku", "overrides": ("=4",)}, "'=4' is no value of a field"),
        ({"name": "gym"}, "field 'dataset' is missing"),
        ({"name": "sudoku", "show": -1}, "--show -1: at least 0"),
        ({"name": "sudoku", "seed": -1}, "--seed -1: at least 0"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Tasks(**arguments).run()
    assert message in str(error.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="loopwise"):
        Tasks(name="gym", overrides=("dataset=chain_sum",)).run()
