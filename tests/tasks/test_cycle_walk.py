"""Walking around a cycle against a walk by names."""

from __future__ import annotations

import numpy as np
import pytest

from loopwise.tasks.base import rows, text
from loopwise.tasks.cycle_walk import CycleWalk


@pytest.mark.parametrize("task", [CycleWalk(), CycleWalk(nodes=5, hops=(0, 3, 11)), CycleWalk(nodes=12, hops=(7,))])
def test_targets_are_where_the_walk_leads(task: CycleWalk) -> None:
    drawn = rows(task, seed=0, index=0, size=80)
    for row in range(80):
        count, *words = text(task, drawn.tokens_BT[row]).split()
        successors, starts = words[: task.nodes], words[task.nodes :]
        assert sorted(starts) == sorted(successors) == sorted(f"n{node}" for node in range(task.nodes))
        expected, node, seen = [], "n0", set()
        for start in starts:
            node = start
            for _ in range(int(count[1:])):
                node = successors[int(node[1:])]
            expected.append(node)
        assert text(task, drawn.targets_BT[row]).split() == ["_"] * (1 + task.nodes) + expected
        assert drawn.keys["hops"][row] == int(count[1:])
        while node not in seen:
            seen.add(node)
            node = successors[int(node[1:])]
        assert len(seen) == task.nodes, "one cycle through every node"


def test_every_step_count_is_drawn() -> None:
    hops_B = rows(CycleWalk(), seed=1, index=0, size=400).keys["hops"]
    assert np.bincount(hops_B, minlength=5)[1:].min() > 60


@pytest.mark.parametrize(
    ("values", "field"), [({"nodes": 1}, "nodes"), ({"hops": ()}, "hops"), ({"hops": (-1,)}, "hops")]
)
def test_sizes_out_of_range_are_refused(values: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        CycleWalk(**values)
