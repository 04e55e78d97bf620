"""Striding around a cycle against a walk by names."""

from __future__ import annotations

import numpy as np
import pytest

from loopwise.tasks.base import rows, text
from loopwise.tasks.orbit import Orbit


@pytest.mark.parametrize("task", [Orbit(), Orbit(nodes=5, hops=(3,), stops=2), Orbit(nodes=12, hops=(5, 19), stops=11)])
def test_targets_are_the_stops_of_the_walk(task: Orbit) -> None:
    drawn = rows(task, seed=0, index=0, size=80)
    for row in range(80):
        count, *words = text(task, drawn.tokens_BT[row]).split()
        successors, told = words[: task.nodes], words[task.nodes :]
        assert sorted(successors) == sorted(f"n{node}" for node in range(task.nodes))
        node, walk = told[0], [told[0]]
        for _ in range(task.stops):
            for _ in range(int(count[1:])):
                node = successors[int(node[1:])]
            walk.append(node)
        assert text(task, drawn.targets_BT[row]).split() == ["_"] * (1 + task.nodes) + walk[1:]
        assert told == walk[:-1]
        assert len(set(walk)) == len(walk), "no stop can be copied from an earlier one"
        assert drawn.keys["hops"][row] == int(count[1:])


def test_every_step_count_is_drawn() -> None:
    hops_B = rows(Orbit(), seed=1, index=0, size=400).keys["hops"]
    assert np.bincount(hops_B, minlength=5)[1:].min() > 60


def test_the_answer_is_no_part_of_the_prompt() -> None:
    drawn = rows(Orbit(), seed=0, index=0, size=4)
    assert (Orbit().prompt(drawn)[:, 15:] == 0).all() and (drawn.tokens_BT[:, 15:] > 0).all()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"nodes": 1}, "nodes"),
        ({"hops": ()}, "hops"),
        ({"hops": (0,)}, "hops"),
        ({"stops": 0}, "stops"),
        ({"stops": 13}, "stops"),
        ({"nodes": 12, "stops": 11}, "stops"),
    ],
)
def test_sizes_out_of_range_are_refused(values: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Orbit(**values)
