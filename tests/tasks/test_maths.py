"""Pre-school maths against Python's own evaluation of the text."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from loopwise.tasks.base import rows, text
from loopwise.tasks.maths import Maths


@pytest.mark.parametrize(
    "task", [Maths(), Maths(operands=(1,), variables=1, limit=2), Maths(operands=(2, 5), variables=9, limit=30)]
)
def test_the_answer_is_what_python_makes_of_the_text(task: Maths) -> None:
    drawn = rows(task, seed=0, index=0, size=200)
    for row in range(200):
        *statements, question = text(task, drawn.tokens_BT[row]).split(" , ")
        assert len(statements) == task.variables + 1
        scope: dict[str, int] = {}
        for statement in statements:
            exec(statement, {"__builtins__": {}}, scope)
        asked = question.removesuffix(" = ?")
        assert len(scope) == task.variables + 1, "names are different"
        assert asked == statements[-1].split()[0]
        assert text(task, drawn.answer(row)) == str(scope[asked])
        named = re.findall("[a-z]", statements[-1])[1:]
        assert len(named) == len(set(named)) == drawn.keys["operands"][row]


def test_every_number_that_can_occur_has_a_token() -> None:
    assert {str(value) for value in range(-18, 19)} <= set(Maths().vocabulary)
    task = Maths(operands=(1, 2), variables=2, limit=2)
    found = {text(task, rows(task, seed=0, index=0, size=200).answer(row)) for row in range(200)}
    assert found == {"-2", "-1", "0", "1", "2"}


def test_chance_is_the_share_of_the_commonest_answer() -> None:
    task = Maths(operands=(1,))
    drawn = rows(task, seed=0, index=0, size=3000)
    commonest = Counter(text(task, drawn.answer(row)) for row in range(3000)).most_common(1)[0]
    assert commonest[0] == "0"
    assert commonest[1] / 3000 == pytest.approx(task.chance, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variables": 0}, "variables=0 must be 1 to 25"),
        ({"variables": 26}, "variables=26 must be 1 to 25"),
        ({"operands": (4,)}, "must be different, 1 to 3"),
        ({"operands": ()}, "must be different, 1 to 3"),
        ({"limit": 1}, "limit=1 must be at least 2"),
    ],
)
def test_refused_sizes(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Maths(**fields)
