"""Mano against an evaluation that rewrites the prefix form, and the published split of operations."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from loopwise.tasks.base import rows, text
from loopwise.tasks.mano import Mano


def oracle(words: list[str], modulus: int) -> int:
    """Reduce any `op a b` of two numbers to a number until one is left."""
    words = list(words)
    while len(words) > 1:
        place = next(p for p in range(len(words)) if words[p] in "+-*" and (words[p + 1] + words[p + 2]).isdigit())
        operator, left, right = words[place : place + 3]
        value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[operator]
        words[place : place + 3] = [str(value % modulus)]
    return int(words[0])


@pytest.mark.parametrize("task", [Mano(), Mano(operations=(1, 2, 16)), Mano(operations=(3,), modulus=7)])
def test_the_answer_is_the_value(task: Mano) -> None:
    drawn = rows(task, seed=0, index=0, size=150)
    for row in range(150):
        start, count, *expression, end = text(task, drawn.tokens_BT[row]).split()
        assert (start, count, end) == ("<bos>", f"<{drawn.keys['operations'][row]}>", "=")
        assert sum(word in "+-*" for word in expression) == drawn.keys["operations"][row]
        assert text(task, drawn.answer(row)) == str(oracle(expression, task.modulus))
        assert (drawn.targets_BT[row] >= 0).sum() == 1
        assert drawn.targets_BT[row, len(expression) + 2] >= 0


def test_by_hand() -> None:
    task = Mano(operations=(2,))
    tokens = [task.vocabulary.index(word) for word in "<bos> <2> - 3 * 5 6 =".split()]
    assert task.solve(np.array(tokens)) == (task.vocabulary.index("19"),)  # 3 - 30 = -27 = 19 modulo 23


def test_operations_are_divided_uniformly() -> None:
    """With l = 3 the left side has 0, 1 or 2 of the other two operations, each as often."""
    task = Mano(operations=(3,))
    drawn = rows(task, seed=0, index=0, size=1500)
    left: Counter[int] = Counter()
    for tokens_T in drawn.tokens_BT:
        words = text(task, tokens_T).split()[3:]
        open_, operations = 1, 0
        for word in words:
            operations += word in "+-*"
            open_ += 1 if word in "+-*" else -1
            if not open_:
                break
        left[operations] += 1
    assert [left[count] / 1500 for count in range(3)] == pytest.approx([1 / 3] * 3, abs=0.05)


def test_operators_numbers_and_answers_are_spread() -> None:
    task = Mano(operations=(10,))
    drawn = rows(task, seed=0, index=0, size=2000)
    operators = np.bincount(drawn.tokens_BT.ravel())[3:6]
    assert operators / operators.sum() == pytest.approx([1 / 3] * 3, abs=0.02)
    commonest = max(Counter(drawn.targets_BT.max(axis=1).tolist()).values()) / 2000
    assert task.chance < commonest < 4 * task.chance


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operations": ()}, "must be different, at least 1"),
        ({"operations": (0,)}, "must be different, at least 1"),
        ({"modulus": 1}, "modulus=1 must be at least 2"),
    ],
)
def test_refused_sizes(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mano(**fields)
