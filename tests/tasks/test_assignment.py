"""Variable assignment: the text is executed by Python, and names are counted on the way."""

from __future__ import annotations

import contextlib
import io
from collections import Counter

import numpy as np
import pytest

from loopwise.tasks.assignment import Assignment
from loopwise.tasks.base import rows, text


def chain(statements: list[str], name: str) -> int:
    """How many other names stand between a name and its number."""
    given = dict(statement.split(" = ") for statement in statements)
    hops = 0
    while not given[name].isdigit():
        name, hops = given[name], hops + 1
    return hops


@pytest.mark.parametrize("shots", [0, 3])
def test_maths_rows_say_what_the_name_stands_for(shots: int) -> None:
    task = Assignment(shots=shots)
    drawn = rows(task, seed=0, index=0, size=100)
    for row in range(100):
        depth, variables = drawn.keys["depth"][row], drawn.keys["variables"][row]
        *examples, last = text(task, drawn.tokens_BT[row]).split(" | ")
        assert len(examples) == shots
        solved = [example.split(" = ? ") for example in examples]
        for shown, answer in [*solved, [last.removesuffix(" = ?"), text(task, drawn.answer(row))]]:
            *statements, asked = shown.split(" , ")
            scope: dict[str, int] = {}
            exec("\n".join(statements), {"__builtins__": {}}, scope)
            assert answer == str(scope[asked])
            assert chain(statements, asked) == depth
            assert len(scope) == len(statements), "names are different"
        assert len(statements) == variables * (depth + 1)


def test_code_rows_print_the_answer_when_run() -> None:
    task = Assignment(surface="code")
    drawn = rows(task, seed=0, index=0, size=60)
    for row in range(60):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(text(task, drawn.tokens_BT[row]), {})
        assert printed.getvalue().strip() == text(task, drawn.answer(row))


def test_depths_are_as_likely_and_answers_are_at_chance() -> None:
    task = Assignment(variables=(5,))
    drawn = rows(task, seed=0, index=0, size=1500)
    assert np.bincount(drawn.keys["depth"]) / 1500 == pytest.approx([1 / 3] * 3, abs=0.05)
    answers = drawn.targets_BT.max(axis=1)
    # The first number on display (third token) is right as often as a guess; a number by itself says little.
    assert (answers == drawn.tokens_BT[:, 2]).mean() == pytest.approx(task.chance, abs=0.04)
    assert max(Counter(answers.tolist()).values()) / 1500 < 0.08


def test_only_the_last_answer_is_scored() -> None:
    drawn = rows(Assignment(shots=2), seed=0, index=0, size=20)
    assert ((drawn.targets_BT >= 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (3,)}, "must be different, 0 to 2"),
        ({"depths": ()}, "must be different, 0 to 2"),
        ({"variables": (9,)}, "must be different, 2 to 8"),
        ({"variables": (1,)}, "must be different, 2 to 8"),
        ({"depths": (0,), "variables": (26,)}, "values=25 must be at least the most variables"),
        ({"shots": -1}, "shots=-1 must be at least 0"),
        ({"surface": "poem"}, "surface='poem' must be one of 'maths', 'code'"),
    ],
)
def test_refused_sizes(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Assignment(**fields)
