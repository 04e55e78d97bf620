"""`loopwise tasks`: the reasoning tasks that models are trained on, and rows of one of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from loopwise.cli import common

if TYPE_CHECKING:
    import numpy as np

    from loopwise.loop.config import Component
    from loopwise.tasks.base import Rows, Task
    from loopwise.tasks.regression import RegressionTask

_SHOWN_POINTS = 3


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Arguments of `loopwise tasks`.

    Examples: `loopwise tasks`, `loopwise tasks sudoku size=4`, `loopwise tasks p_hop --show 5 --seed 1`.
    """

    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None
    """a task; without one all are listed"""
    overrides: Positional[Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE")]] = ()
    """sizes of the task, such as size=4"""
    show: Annotated[int, arg(metavar="N")] = 2
    """how many rows to print"""
    seed: int = 0
    """seed of the rows"""
    split: Literal["train", "valid", "test"] = "train"
    """which rows"""

    def run(self) -> None:
        """Print the list, or what a task is and some of its rows."""
        if self.show < 0:
            raise ValueError(f"--show {self.show}: at least 0")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: at least 0")
        if self.name is None:
            _print_list()
            return
        task = make(self.name, self.overrides)
        print("\n".join(describe(task)))
        for number in range(self.show):
            print()
            print("\n".join(sample(task, seed=self.seed, index=number, split=self.split)))


def tasks() -> dict[str, type[Component]]:
    """Every task by name, sorted: those over tokens and those over points."""
    from loopwise.loop.config import kinds
    from loopwise.tasks.base import names

    names()  # imports them
    return {kind.removeprefix("task."): found for kind, found in kinds().items() if kind.startswith("task.")}


def make(name: str, words: Sequence[str] = ()) -> Component:
    """The task of this name with the fields that words such as `size=4` give; values are JSON, or else text.

    Raises:
        ValueError: an unknown name or field (the nearest is suggested), a word without "=", or a refused value.
    """
    from loopwise.loop.config import from_dict, suggest

    short, known = name.removeprefix("task."), tasks()
    if short not in known:
        raise ValueError(f"unknown task {name!r}{suggest(short, known)}")
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{word!r} is no value of a field: write field=value, such as size=4")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return from_dict({**values, "kind": f"task.{short}"}, axis="task")


def describe(task: Component) -> list[str]:
    """What a task is, its fields, and its sizes, as lines."""
    from loopwise.tasks.regression import RegressionTask

    about = [_first_line(type(task)), " ".join(f"{item.name}={getattr(task, item.name)!r}" for item in fields(task))]
    if isinstance(task, RegressionTask):
        sizes = f"{task.num_points} points of {task.inputs} numbers"
        return [*about, f"{sizes}; squared error of predicting 0: {task.variance:.4g}"]
    token_task: Any = task
    sizes = f"{token_task.length} tokens per row, vocabulary of {len(token_task.vocabulary)}"
    return [*about, f"{sizes}; exact answers by chance: {token_task.chance:.3g}"]


def sample(task: Component, *, seed: int, index: int, split: str) -> list[str]:
    """One row of a task with its answer, as lines.

    Raises:
        ValueError: the split of the task is empty, or its library is missing.
    """
    from loopwise.tasks.base import rows
    from loopwise.tasks.regression import RegressionTask

    if isinstance(task, RegressionTask):
        return _points_lines(task, seed=seed, index=index, split=split)
    token_task: Any = task
    return _row_lines(token_task, rows(token_task, seed=seed, index=index, size=1, split=split))


def _row_lines(task: Task, row: Rows) -> list[str]:
    from loopwise.tasks.base import text

    keys = ", ".join(f"{name} {key_B[0]}" for name, key_B in row.keys.items())
    board = _board_size(task)
    if board:
        shown = [*_board_lines(task, row.tokens_BT[0], board), "", *_board_lines(task, row.answer(0), board)]
    else:
        shown = [text(task, row.tokens_BT[0]), f"answer: {text(task, row.answer(0))}"]
    return [*shown, *([f"({keys})"] if keys else [])]


def _board_size(task: Task) -> int | None:
    """The side of the board that a task is about, None for one that is about text."""
    from loopwise.tasks.maze import Maze
    from loopwise.tasks.sudoku import Sudoku

    return task.size if isinstance(task, Maze | Sudoku) else None


def _board_lines(task: Task, tokens_T: np.ndarray, size: int) -> list[str]:
    from loopwise.tasks.base import text

    return [text(task, tokens_T[start : start + size]) for start in range(0, size**2, size)]


def _points_lines(task: RegressionTask, *, seed: int, index: int, split: str) -> list[str]:
    from loopwise.tasks.regression import least_squares, points, squared_error

    prompt = points(task, seed=seed, index=index, size=1, split=split)
    shown = []
    for x_I, y in list(zip(prompt.xs_BNI[0], prompt.ys_BN[0], strict=True))[:_SHOWN_POINTS]:
        numbers = " ".join(f"{value:+.2f}" for value in x_I[:4]) + (" ..." if len(x_I) > 4 else "")
        shown.append(f"x = {numbers}  y = {y:+.3f}")
    error = squared_error(prompt, least_squares(prompt))[-1]
    return [*shown, f"answer: y of the last of {task.num_points} points; least squares errs by {error:.3g} (squared)"]


def _first_line(task: type[Component]) -> str:
    return (task.__doc__ or "").strip().splitlines()[0].rstrip(".")


def _print_list() -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, task in tasks().items():
        table.add_row(name, Text(_first_line(task)))
    out = common.console()
    out.print(table)
    out.print("\nloopwise tasks NAME prints rows of a task with their answers", markup=False)
