"""Reachability against the transitive closure and a count of all paths."""

from __future__ import annotations

import numpy as np
import pytest

from loopwise.tasks.base import IGNORE, rows, text
from loopwise.tasks.reachability import Reachability

TASKS = [
    Reachability(),
    Reachability(steps=True),
    Reachability(num_nodes=10, num_symbols=10, min_hops=1, max_hops=2),
    Reachability(num_nodes=14, num_symbols=20, min_hops=2, max_hops=4, max_edges=18, steps=True),
]
every_task = pytest.mark.parametrize("task", TASKS, ids=["default", "steps", "small", "small steps"])


def parse(shown: str) -> tuple[list[tuple[str, str]], list[str], str, list[str]]:
    """Edges, the two that are asked for, the root, and what follows the colon."""
    graph, question = shown.split(" ; ? ")
    asked, answer = question.split(" :")
    a, b, root = asked.split()
    return [tuple(edge.split()) for edge in graph.split(" ; ")], [a, b], root, answer.split()


def closure(edges: list[tuple[str, str]]) -> tuple[dict[str, int], np.ndarray]:
    """Number of each node, and hops between all pairs (0: the same, -1: none) by powers of the adjacency matrix."""
    number = {node: index for index, node in enumerate(sorted({node for edge in edges for node in edge}))}
    adjacent = np.zeros((len(number), len(number)), bool)
    for a, b in edges:
        adjacent[number[a], number[b]] = True
    hops, power = np.where(np.eye(len(number), dtype=bool), 0, -1), np.eye(len(number), dtype=bool)
    for count in range(1, len(number)):
        power = power @ adjacent
        hops[power & (hops < 0)] = count
    assert not (power @ adjacent).any(), "no cycles"
    return number, hops


@every_task
def test_the_answer_is_the_reachable_one(task: Reachability) -> None:
    drawn = rows(task, seed=0, index=0, size=40)
    assert np.array_equal(drawn.tokens_BT, rows(task, seed=0, index=0, size=40).tokens_BT)
    for row in range(40):
        tokens_T, answer = drawn.tokens_BT[row], [task.vocabulary[token] for token in drawn.answer(row)]
        edges, asked, root, told = parse(text(task, tokens_T))
        assert len(set(edges)) == len(edges) <= task.num_edges
        number, hops = closure(edges)
        reached = [node for node in asked if hops[number[root], number[node]] > 0]
        assert len(reached) == 1
        distance = hops[number[root], number[reached[0]]]
        assert task.min_hops <= distance == drawn.keys["hops"][row] <= task.max_hops
        if task.steps:
            assert answer[-2:] == [reached[0], "."] and told == answer[:-1]
            assert len(answer) == distance + 1 and set(zip([root, *answer], answer[:-1], strict=False)) <= set(edges)
        else:
            assert answer == reached and told == []
        colon = next(place for place, token in enumerate(tokens_T) if task.vocabulary[token] == ":")
        assert np.flatnonzero(drawn.targets_BT[row] != IGNORE).tolist() == list(range(colon, colon + len(answer)))
        assert task.verify(tokens_T, drawn.answer(row)) and task.verify(tokens_T, task.solve(tokens_T))


def test_verify_follows_every_path_and_no_other() -> None:
    task = Reachability(num_nodes=8, num_symbols=8, min_hops=2, max_hops=3, steps=True)
    number = {symbol: token for token, symbol in enumerate(task.vocabulary)}

    def ids(words: str) -> np.ndarray:
        return np.array([number[word] for word in words.split()])

    tokens_T = ids("n1 n2 ; n2 n3 ; n1 n4 ; n4 n3 ; n5 n6 ; n6 n7 ; n4 n2 ; n3 n8 ; ? n7 n3 n1 :")
    for path in ("n2 n3 .", "n4 n3 .", "n4 n2 n3 ."):
        assert task.verify(tokens_T, ids(path))
    for path in ("n3 .", "n2 n3", "n2 .", "n4 n2 .", "n6 n7 .", "n2 n3 n8 .", "n2 n3 . .", "."):
        assert not task.verify(tokens_T, ids(path))
    assert not task.verify(tokens_T, [])
    direct = Reachability(num_nodes=8, num_symbols=8, min_hops=2, max_hops=3)
    assert direct.verify(tokens_T, ids("n3")) and not direct.verify(tokens_T, ids("n7"))


def test_neither_place_nor_depth_nor_degree_gives_the_answer_away() -> None:
    task = Reachability()
    drawn = task.draw(np.random.default_rng(0), 600)
    votes: dict[str, list[float]] = {"first": [], "more in": [], "more out": [], "deeper": [], "edge of root": []}
    for row in range(600):
        edges, asked, root, _ = parse(text(task, drawn.tokens_BT[row]))
        number, hops = closure(edges)
        right = task.vocabulary[drawn.answer(row)[0]]
        other = next(node for node in asked if node != right)
        measures = {
            "first": [-asked.index(node) for node in (right, other)],
            "more in": [sum(b == node for _, b in edges) for node in (right, other)],
            "more out": [sum(a == node for a, _ in edges) for node in (right, other)],
            "deeper": [hops[:, number[node]].max() for node in (right, other)],
        }
        for name, (mine, others) in measures.items():
            votes[name].append((np.sign(mine - others) + 1) / 2)
        votes["edge of root"] += [place / (len(edges) - 1) for place, (a, _) in enumerate(edges) if a == root]
    for name, shares in votes.items():
        assert np.mean(shares) == pytest.approx(0.5, abs=0.07), name


def test_hops_spread_as_published() -> None:
    hops_B = Reachability().draw(np.random.default_rng(0), 400).keys["hops"]
    # ProsQA's test set has 40, 43, 14 and 2 % of 3, 4, 5 and 6
    assert set(hops_B) == {3, 4, 5, 6} and 3.4 < hops_B.mean() < 4.2


def test_the_order_of_edges_makes_no_other_problem() -> None:
    task = Reachability(num_nodes=8, num_symbols=8, min_hops=1, max_hops=3)
    drawn = task.draw(np.random.default_rng(0), 20)
    shuffled_BT = drawn.tokens_BT.copy()
    for tokens_T in shuffled_BT:
        num = list(tokens_T).index(task.vocabulary.index("?")) // 3
        tokens_T[: 3 * num] = tokens_T[: 3 * num].reshape(num, 3)[::-1].ravel()
        tokens_T[3 * num + 1 : 3 * num + 3] = tokens_T[3 * num + 1 : 3 * num + 3][::-1].copy()
    assert not np.array_equal(shuffled_BT, drawn.tokens_BT)
    shuffled = type(drawn)(tokens_BT=shuffled_BT, targets_BT=drawn.targets_BT)
    assert np.array_equal(task.prompt(shuffled), task.prompt(drawn))
    assert len(np.unique(task.prompt(drawn), axis=0)) == 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reachability(num_nodes=3), "num_nodes=3 must be at least 4"),
        (lambda: Reachability(num_symbols=10), r"num_symbols=10 must be at least num_nodes \(23\)"),
        (lambda: Reachability(max_edges=10), "max_edges=10 must be at least half of num_nodes"),
        (lambda: Reachability(min_hops=7), r"min_hops=7 must be from 1 to 6 \(max_hops\)"),
        (lambda: Reachability(num_nodes=7), "min_hops=3 must leave two disjoint paths"),
        (
            lambda: Reachability(num_nodes=30, max_edges=15).draw(np.random.default_rng(0), 1),
            "choose a smaller min_hops or a larger num_nodes",
        ),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
