"""Symbolic i-GSM against Python's own evaluation of the statements, in an order found by trying."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from loopwise.tasks.base import rows, text
from loopwise.tasks.igsm import Igsm

TASKS = (Igsm(), Igsm(variables=(2, 20), levels=3, entities=8, terms=5, modulus=11), Igsm(terms=1))


def definitions(row: str) -> tuple[dict[str, str], str]:
    """Expressions by name, and the name asked for; names become identifiers such as A_E."""
    *statements, question = row.replace(" # ", "_").split(" . ")
    return dict(statement.split(" := ") for statement in statements), question.removesuffix(" ?")


def evaluate(expressions: dict[str, str], modulus: int) -> dict[str, int]:
    """Execute whatever can be executed until everything is known."""
    known: dict[str, int] = {}
    while len(known) < len(expressions):
        before = len(known)
        for name, expression in expressions.items():
            try:
                known[name] = eval(expression, {"__builtins__": {}}, known) % modulus
            except NameError:
                continue
        assert len(known) > before, "the definitions must not be circular"
    return known


def needed_by(name: str, expressions: dict[str, str]) -> set[str]:
    used = {word for word in expressions[name].split() if "_" in word}
    return {name}.union(*(needed_by(other, expressions) for other in used))


def chain_below(name: str, expressions: dict[str, str]) -> int:
    return max((1 + chain_below(word, expressions) for word in expressions[name].split() if "_" in word), default=0)


@pytest.mark.parametrize("task", TASKS, ids=["default", "large", "one term"])
def test_the_answer_is_the_value_of_the_variable_asked_for(task: Igsm) -> None:
    drawn = rows(task, seed=0, index=0, size=80)
    for row in range(80):
        expressions, asked = definitions(text(task, drawn.tokens_BT[row]))
        assert len(expressions) == drawn.keys["variables"][row]
        assert text(task, drawn.answer(row)) == str(evaluate(expressions, task.modulus)[asked])
        assert len(needed_by(asked, expressions)) == drawn.keys["needed"][row]
        assert chain_below(asked, expressions) == drawn.keys["depth"][row]


@pytest.mark.parametrize("task", TASKS, ids=["default", "large", "one term"])
def test_variables_join_neighbouring_levels(task: Igsm) -> None:
    for tokens_T in rows(task, seed=1, index=0, size=40).tokens_BT:
        for name in definitions(text(task, tokens_T))[0]:
            upper, lower = ((ord(letter) - ord("A")) // task.entities for letter in name.split("_"))
            assert lower == upper + 1 < task.levels


def test_definitions_have_distinct_terms_and_one_is_a_number() -> None:
    for tokens_T in rows(Igsm(), seed=2, index=0, size=60).tokens_BT:
        expressions, _ = definitions(text(Igsm(), tokens_T))
        terms = [[word for word in expression.split() if "_" in word] for expression in expressions.values()]
        assert all(len(set(of)) == len(of) <= 3 for of in terms)
        assert sum(not of for of in terms) == 1


def test_statements_are_shuffled() -> None:
    """The number would stand first, and the variable asked for last."""
    drawn = rows(Igsm(variables=(10,)), seed=0, index=0, size=400)
    number_first = asked_last = 0
    for tokens_T in drawn.tokens_BT:
        expressions, asked = definitions(text(Igsm(), tokens_T))
        number_first += next(iter(expressions.values())).isdigit()
        asked_last += list(expressions)[-1] == asked
    assert number_first / 400 == pytest.approx(0.1, abs=0.05)
    assert asked_last / 400 == pytest.approx(0.1, abs=0.05)


def test_answers_are_near_chance_and_most_of_the_graph_matters() -> None:
    task = Igsm()
    drawn = rows(task, seed=0, index=0, size=3000)
    commonest = max(Counter(drawn.targets_BT.max(axis=1).tolist()).values()) / 3000
    assert commonest == pytest.approx(task.chance, abs=0.03)
    assert np.mean(drawn.keys["needed"]) > 4 and np.mean(drawn.keys["depth"]) > 2


def test_by_hand() -> None:
    task = Igsm()
    row = "K # N := 2 * E # I - J # O . E # I := 4 . J # O := E # I + E # J . E # J := 6 * E # I . K # N ?"
    tokens_T = np.array([task.vocabulary.index(word) for word in row.split()])
    # E#J = 24 = 3, J#O = 7 = 0, K#N = 8 - 0 = 1 modulo 7.
    assert task.solve(tokens_T) == (task.vocabulary.index("1"),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": 1}, "levels=1 must be at least 2"),
        ({"levels": 14}, "entities=4 must be 1 to 1"),
        ({"entities": 7}, "entities=7 must be 1 to 6"),
        ({"variables": (49,)}, "must be different, 2 to 48"),
        ({"variables": ()}, "must be different, 2 to 48"),
        ({"terms": 0}, "terms=0 must be at least 1"),
        ({"modulus": 2}, "modulus=2 must be at least 3"),
    ],
)
def test_refused_sizes(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Igsm(**fields)
