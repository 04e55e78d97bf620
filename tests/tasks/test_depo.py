"""Depo against a walk over the edges read from the text."""

from __future__ import annotations

import re

import numpy as np
import pytest

from loopwise.tasks.base import rows, text
from loopwise.tasks.depo import Depo

TASKS = (
    Depo(nodes=9, hops=5, queries=4, pieces=4, name_sizes=(1, 2, 3)),
    Depo(nodes=20, hops=8, pieces=50, name_sizes=(1, 2)),
    Depo(nodes=12, published_test=True),
)


def parse(row: str) -> tuple[list[tuple[str, str]], list[tuple[int, str, str]]]:
    """Edges, and (hops, start, answer) of the queries; a name ends at its full stop."""
    table, *queries = re.split(r"(?=<\d+>)", row.removeprefix("<bos> "))
    names = [name.strip() for name in re.findall(r"[\d ]*\d\.", table)]
    asked = [re.fullmatch(r"<(\d+)> (.*?) =(.*)", query) for query in queries]
    found = [(int(query[1]), query[2], query[3].strip()) for query in asked if query]
    assert len(found) == len(queries)
    return list(zip(names[::2], names[1::2], strict=True)), found


@pytest.mark.parametrize("task", TASKS, ids=["pieces", "depo1", "depo2"])
def test_answers_are_where_the_edges_lead(task: Depo) -> None:
    drawn = rows(task, seed=0, index=0, size=40)
    for row in range(40):
        edges, queries = parse(text(task, drawn.tokens_BT[row]))
        after = dict(edges)
        nodes = drawn.keys["nodes"][row]
        assert len(edges) == len(after) == nodes
        answers: list[str] = []
        for hops, node, told in queries:
            for _ in range(hops):
                node = after[node]
            # The last piece of the last name is only a target.
            assert node.startswith(told)
            answers.append(node)
        assert text(task, drawn.answer(row)) == " ".join(answers)
        assert len({start for _, start, _ in queries}) == len(queries) == min(task.queries, nodes)
        assert drawn.keys["hops"][row] == max(hops for hops, *_ in queries)


@pytest.mark.parametrize("task", TASKS, ids=["pieces", "depo1", "depo2"])
def test_the_edges_form_one_cycle_in_random_order(task: Depo) -> None:
    drawn = rows(task, seed=1, index=0, size=30)
    in_order = 0
    for row in range(30):
        edges, _ = parse(text(task, drawn.tokens_BT[row]))
        after = dict(edges)
        seen, node = [], edges[0][0]
        while node not in seen:
            seen.append(node)
            node = after[node]
        assert len(seen) == len(edges) and node == edges[0][0]
        in_order += [start for start, _ in edges] == seen
    assert in_order < 10


def test_names_have_the_lengths_asked_for_and_end_by_themselves() -> None:
    task = Depo(nodes=30, name_sizes=(5, 7))
    lengths: list[int] = []
    for tokens_T in rows(task, seed=0, index=0, size=30).tokens_BT:
        edges, _ = parse(text(task, tokens_T))
        lengths += [len(start.split()) for start, _ in edges]
        assert all(name.count(".") == 1 and name.endswith(".") for edge in edges for name in edge)
    assert set(lengths) == {5, 7}
    assert np.mean(np.array(lengths) == 5) == pytest.approx(0.5, abs=0.1)


def test_sizes_of_training_follow_the_published_weights() -> None:
    task = Depo(nodes=16)
    nodes_B = task.draw(np.random.default_rng(0), 3000).keys["nodes"]
    weights = {nodes: 1 / (nodes + 4) for nodes in range(3, 17)}
    for nodes, weight in weights.items():
        assert (nodes_B == nodes).mean() == pytest.approx(weight / sum(weights.values()), abs=0.03)


def test_the_published_test_asks_powers_of_two_of_full_cycles() -> None:
    task = Depo(nodes=10, hops=12, published_test=True)
    drawn = rows(task, seed=0, index=0, size=60)
    assert (drawn.keys["nodes"] == 10).all()
    asked = {hops for tokens_T in drawn.tokens_BT for hops, *_ in parse(text(task, tokens_T))[1]}
    assert asked == {1, 2, 4, 8, 12}
    usual = rows(Depo(nodes=10, hops=12), seed=0, index=0, size=60)
    asked = {hops for tokens_T in usual.tokens_BT for hops, *_ in parse(text(task, tokens_T))[1]}
    assert asked == set(range(1, 13))


def test_what_stands_in_the_place_of_the_answers_is_not_looked_at() -> None:
    task = TASKS[0]
    drawn = rows(task, seed=0, index=0, size=30)
    prompt_BT = task.prompt(drawn)
    assert (prompt_BT != drawn.tokens_BT).any(axis=1).all()
    assert all(task.verify(prompt_BT[row], drawn.answer(row)) for row in range(30))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nodes": 2}, "nodes=2 must be at least 3"),
        ({"hops": 0}, "hops=0 must be at least 1"),
        ({"queries": 0}, "queries=0 must be at least 1"),
        ({"pieces": 0}, "pieces=0 must be at least 1"),
        ({"name_sizes": (0,)}, "must be different, 1 to 12"),
        ({"pieces": 3, "name_sizes": (1, 2), "nodes": 7}, "nodes=7 must be at most half of the 12 possible names"),
    ],
)
def test_refused_sizes(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Depo(**fields)
