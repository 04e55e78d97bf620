"""Pointer chasing against a walk through the listed pairs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from loopwise.tasks.base import IGNORE, rows, text
from loopwise.tasks.pointer import Pointer


def oracle(row: str) -> list[str]:
    """What stands under the row: "_" everywhere but at hop counts."""
    table, queries = row.split(" ? ")
    pairs = table.split()
    function = {pairs[place]: pairs[place + 1] for place in range(0, len(pairs), 2)}
    assert len(function) == len(pairs) // 2, "every node is listed once"
    under, at = ["_"] * (len(pairs) + 1), ""
    for word in queries.split():
        if word.startswith("+"):
            node = at
            for _ in range(int(word[1:])):
                node = function[node]
            under.append(node)
        else:
            at = word
            under.append("_")
    return under


@pytest.mark.parametrize(
    "task",
    [
        Pointer(),
        Pointer(nodes=6, hops=(0, 2, 5), queries=3, bijective=False),
        Pointer(nodes=9, hops=(1, 4, 16), queries=4, dense=False),
        Pointer(nodes=2, hops=(1,), dense=False, bijective=False),
    ],
    ids=["default", "function", "sparse", "smallest"],
)
def test_targets_are_where_the_walk_leads(task: Pointer) -> None:
    drawn = rows(task, seed=0, index=0, size=60)
    for row in range(60):
        shown = text(task, drawn.tokens_BT[row])
        assert text(task, drawn.targets_BT[row]).split() == oracle(shown)
        hops = [int(word[1:]) for word in shown.split() if word.startswith("+")]
        assert drawn.keys["hops"][row] == max(hops)


def test_dense_rows_ask_different_starts_with_every_hop_count() -> None:
    task = Pointer(nodes=5, hops=(1, 3), queries=5)
    for tokens_T in rows(task, seed=0, index=0, size=20).tokens_BT:
        queries = text(task, tokens_T).split(" ? ")[1].split()
        assert sorted(queries[::3]) == [f"n{node}" for node in range(5)]
        assert queries[1::3] == ["+1"] * 5 and queries[2::3] == ["+3"] * 5


def test_a_permutation_hides_its_answers_better_than_a_function() -> None:
    """Where many hops lead to few nodes, guessing the node that most pairs name is better than chance."""

    def best_guess(task: Pointer) -> float:
        drawn = rows(task, seed=0, index=0, size=1500)
        listed_BN = drawn.tokens_BT[:, 1 : 2 * task.nodes : 2]
        guesses = [Counter(listed_N.tolist()).most_common(1)[0][0] for listed_N in listed_BN]
        return float(np.mean(drawn.targets_BT[:, -1] == guesses))

    hidden, open_ = (Pointer(nodes=8, hops=(4,), dense=False, bijective=bijective) for bijective in (True, False))
    assert best_guess(hidden) == pytest.approx(hidden.chance, abs=0.04)
    assert best_guess(open_) > 1.5 * open_.chance


def test_answers_are_not_part_of_the_row() -> None:
    task = Pointer(nodes=16, hops=(2, 3, 4))
    drawn = rows(task, seed=0, index=0, size=50)
    assert ((drawn.targets_BT != IGNORE).sum(axis=1) == 3).all()
    last_BT = drawn.tokens_BT[:, 2 * 16 + 2 :]
    assert (last_BT >= task.vocabulary.index("+2")).all(), "after the start there are hop counts only"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nodes": 1}, "nodes=1 must be at least 2"),
        ({"hops": (2, 1)}, r"hops=\(2, 1\) must increase"),
        ({"hops": ()}, "must be different, at least 0"),
        ({"hops": (-1, 1)}, "must be different, at least 0"),
        ({"queries": 0}, "queries=0 must be at least 1"),
        ({"queries": 17}, "queries=17 must be at most the number of nodes"),
    ],
)
def test_refused_sizes(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pointer(**fields)
