"""Addition against Python's own, on the text of the rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from loopwise.tasks.addition import Addition
from loopwise.tasks.base import IGNORE, rows, text


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("digits", [1, 3])
def test_the_answer_is_the_sum(digits: int, reverse: bool) -> None:
    task = Addition(operands=(1, 2, 3, 12), digits=digits, reverse=reverse)
    drawn = rows(task, seed=0, index=0, size=200)
    turn = slice(None, None, -1) if reverse else slice(None)
    for row in range(200):
        problem, told = text(task, drawn.tokens_BT[row]).split("=")
        operands = problem.split("+")
        assert len(operands) == drawn.keys["operands"][row]
        assert all(len(operand) == digits for operand in operands)
        answer = str(sum(int(operand[turn]) for operand in operands))[turn]
        assert told == answer
        scored = np.flatnonzero(drawn.targets_BT[row] != IGNORE)
        # From "=", which predicts the first digit, to the last digit, which predicts the end.
        assert scored.tolist() == list(range(len(problem), len(problem) + 1 + len(answer)))
        assert text(task, drawn.answer(row)) == answer + "<end>"


def test_the_smallest_sum_has_one_digit() -> None:
    task = Addition(operands=(2,), digits=1)
    drawn = task.draw(np.random.default_rng(0), 400)
    shown = {text(task, tokens_T) for tokens_T in drawn.tokens_BT}
    assert "0+0=0" in shown and "9+9=18" in shown


def test_every_number_of_operands_is_as_likely() -> None:
    counts = Counter(rows(Addition(), seed=0, index=0, size=2000).keys["operands"].tolist())
    assert {num: count / 2000 for num, count in counts.items()} == pytest.approx(
        {num: 0.2 for num in (2, 4, 8, 16, 32)}, abs=0.04
    )


def test_chance_is_the_share_of_the_likeliest_sum() -> None:
    task = Addition(operands=(2,), digits=1)
    pairs = Counter(one + other for one in range(10) for other in range(10))
    assert max(pairs.values()) / 100 == pytest.approx(task.chance)


def test_what_stands_in_the_place_of_the_answer_is_not_looked_at() -> None:
    task = Addition(operands=(2, 4))
    drawn = rows(task, seed=0, index=0, size=30)
    for prompt_T, row in zip(task.prompt(drawn), range(30), strict=True):
        assert text(task, prompt_T).endswith("=")
        assert task.verify(prompt_T, drawn.answer(row))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operands": ()}, r"operands=\(\) must be different, 1 to 10000"),
        ({"operands": (2, 2)}, "must be different"),
        ({"operands": (0,)}, "must be different, 1 to 10000"),
        ({"digits": 0}, "digits=0 must be 1 to 9"),
        ({"digits": 10}, "digits=10 must be 1 to 9"),
    ],
)
def test_refused_sizes(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Addition(**fields)
