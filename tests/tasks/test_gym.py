"""The reasoning-gym adapter: with the library where it is installed, its refusals everywhere."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from loopwise.loop.config import from_dict, to_dict
from loopwise.tasks.base import IGNORE, named, rows, text
from loopwise.tasks.gym import Gym

installed = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym")


def encoded(task: Gym, answer: str) -> list[int]:
    """An answer as the task writes it, byte by byte."""
    return [byte + 3 for byte in answer.encode()] + [task.vocabulary.index("<end>")]


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"task.gym needs the reasoning-gym library: pip install 'loopwise\[gym\]'"):
        Gym(dataset="chain_sum").draw(np.random.default_rng(0), 1)


def test_the_config_needs_no_library() -> None:
    task = named("gym", dataset="chain_sum", config={"min_terms": 2}, num_tokens=64)
    assert from_dict(to_dict(task)) == task and task.length == 64
    assert len(task.vocabulary) == len(set(task.vocabulary)) == 259


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_tokens": 3}, "num_tokens=3 must be at least 4"),
        ({"config": {"seed": 3}}, "must not hold 'seed': rows choose it"),
        ({"config": {"size": 3}}, "must not hold 'size': rows choose it"),
    ],
)
def test_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gym(dataset="chain_sum", **values)


@installed
def test_a_row_is_question_mark_answer_end() -> None:
    task = Gym(dataset="chain_sum", num_tokens=128)
    drawn = rows(task, seed=0, index=0, size=20)
    assert np.array_equal(drawn.tokens_BT, rows(task, seed=0, index=0, size=20).tokens_BT)
    for row in range(20):
        question, answer = text(task, drawn.tokens_BT[row]).removesuffix("<end>").split("<answer>")
        terms = question.split(":")[1].split("=")[0]
        assert eval(terms) == int(answer)
        assert drawn.answer(row).tolist() == encoded(task, answer) == list(task.solve(drawn.tokens_BT[row]))
        assert np.flatnonzero(drawn.targets_BT[row] != IGNORE)[0] == len(question)
        assert task.verify(drawn.tokens_BT[row], encoded(task, answer))
        assert not task.verify(drawn.tokens_BT[row], encoded(task, str(int(answer) + 1)))
        # contained, and worth a part of the score to the library's own scorer
        assert not task.verify(drawn.tokens_BT[row], encoded(task, f"it is {answer}, I think"))
        assert not task.verify(drawn.tokens_BT[row], encoded(task, answer)[:-1])
        assert not task.verify(drawn.tokens_BT[row], [0, *encoded(task, answer)])


@installed
def test_splits_are_disjoint_and_settings_reach_the_generator() -> None:
    task = Gym(dataset="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2})
    seen = [
        {tuple(row) for row in rows(task, seed=0, index=0, size=60, split=name).tokens_BT} for name in ("train", "test")
    ]
    assert not seen[0] & seen[1]
    shown = text(task, rows(task, seed=0, index=0, size=1).tokens_BT[0])
    assert shown.count(" + ") + shown.count(" - ") == 1


@installed
def test_several_right_answers_are_left_to_the_scorer() -> None:
    task = Gym(dataset="countdown", num_tokens=1024)
    drawn = task.draw(np.random.default_rng(0), 5)
    for row in range(5):
        answer = bytes(token - 3 for token in drawn.answer(row)[:-1]).decode()
        assert task.verify(drawn.tokens_BT[row], encoded(task, answer))
        assert task.verify(drawn.tokens_BT[row], encoded(task, f"({answer})"))
        assert not task.verify(drawn.tokens_BT[row], encoded(task, f"{answer} + 1"))


@installed
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Gym(dataset="chain_summ"), "unknown dataset 'chain_summ'; did you mean 'chain_sum'"),
        (Gym(dataset="chain_sum", config={"min_termz": 2}), "'chain_sum' refuses config="),
        (Gym(dataset="chain_sum", num_tokens=8), "only 0 of 1 items of 'chain_sum' fit num_tokens=8"),
        (Gym(dataset="rubiks_cube", num_tokens=2048), "only 0 of 1 items of 'rubiks_cube' fit"),
    ],
    ids=["dataset", "config", "length", "no answer"],
)
def test_refused_by_or_for_the_library(task: Gym, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.draw(np.random.default_rng(0), 1)


@installed
def test_a_row_that_was_not_drawn_here_cannot_be_scored() -> None:
    task = Gym(dataset="chain_sum")
    tokens_T = np.zeros(512, np.int64)
    tokens_T[:9] = [*(byte + 3 for byte in b"1 + 1 ="), 2, 1]
    with pytest.raises(ValueError, match="was not drawn lately in this process"):
        task.verify(tokens_T, encoded(task, "2"))
