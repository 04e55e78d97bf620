"""Induction copy against the induction rule and against what stands in the row."""

from __future__ import annotations

import pytest

from loopwise.tasks.base import rows, text
from loopwise.tasks.induction import Induction


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("symbols", [16, 30])
def test_the_sequence_is_repeated(symbols: int, distinct: bool) -> None:
    task = Induction(symbols=symbols, sizes=(1, 4, 16), distinct=distinct)
    drawn = rows(task, seed=0, index=0, size=100)
    for row in range(100):
        sequence, again = (part.split() for part in text(task, drawn.tokens_BT[row]).split("|"))
        assert len(sequence) == drawn.keys["size"][row]
        assert again == sequence[:-1]
        used = text(task, drawn.targets_BT[row, : 2 * len(sequence)]).split()
        assert used == ["_"] * len(sequence) + sequence
        assert (drawn.targets_BT[row, 2 * len(sequence) :] < 0).all()


def test_an_induction_head_solves_distinct_rows_and_not_the_others() -> None:
    """Saying what followed the previous occurrence is right wherever no symbol repeats."""

    def right(task: Induction) -> float:
        hits: list[bool] = []
        drawn = rows(task, seed=0, index=0, size=60)
        for row in range(60):
            tokens, targets = drawn.tokens_BT[row].tolist(), drawn.targets_BT[row].tolist()
            for place in range(9, 16):
                before = max(other for other in range(place) if tokens[other] == tokens[place])
                hits.append(tokens[before + 1] == targets[place])
        return sum(hits) / len(hits)

    assert right(Induction(symbols=10, sizes=(8,), distinct=True)) == 1
    assert right(Induction(symbols=4, sizes=(8,))) < 0.9


def test_what_stands_in_the_place_of_the_answer_is_not_looked_at() -> None:
    task = Induction(sizes=(3, 5))
    drawn = rows(task, seed=0, index=0, size=30)
    for row, prompt_T in enumerate(task.prompt(drawn)):
        assert text(task, prompt_T).endswith("|")
        assert task.verify(prompt_T, drawn.answer(row))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"symbols": 1}, "symbols=1 must be at least 2"),
        ({"sizes": ()}, "must be different, at least 1"),
        ({"sizes": (0,)}, "must be different, at least 1"),
        ({"symbols": 4, "sizes": (5,), "distinct": True}, "must be different, 1 to 4"),
    ],
)
def test_refused_sizes(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Induction(**fields)
