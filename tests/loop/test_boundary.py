"""Where loops begin and end, against a naive walk over the nodes."""

from __future__ import annotations

import pytest

from loopwise.loop.boundary import turns_of
from loopwise.plan import Loop, Plan


def naive(plan):
    """The same events by walking the tree and counting slots."""
    begin, end, slots = {}, {}, iter(plan.slots)

    def walk(nodes, path):
        last = None
        for index, node in enumerate(nodes):
            here = (*path, index)
            if not isinstance(node, Loop):
                for _ in range(node.num_slots):
                    last = next(slots).key
                    for turn in waiting:
                        begin.setdefault(last, []).append(turn)
                    waiting.clear()
                continue
            for iteration in range(node.count):
                waiting.append((here, iteration))
                last = walk(node.body, here)
                end.setdefault(last, []).append((here, iteration))
        return last

    waiting = []
    walk(plan.nodes, ())
    return begin, end


@pytest.mark.parametrize(
    "text", ["0-3", "0 core:(1-2)x3 3", "a:(0 b:(1 2)x2 3)x2", "((0)x2)x3 4", "0-9 5-14", "(0-1)x2 (0-1)x2"]
)
def test_turns_equal_a_walk_over_the_nodes(text):
    plan = Plan.parse(text)
    begin, end = naive(plan)
    turns = turns_of(plan)
    assert {
        key: [(turn.path, turn.iteration) for turn in value.begin] for key, value in turns.items() if value.begin
    } == begin
    assert {
        key: [(turn.path, turn.iteration) for turn in value.end] for key, value in turns.items() if value.end
    } == end


def test_first_and_last_iterations():
    turns = turns_of(Plan.parse("0 core:(1-2)x2"))
    flags = [(turn.is_first, turn.is_last) for value in turns.values() for turn in value.begin]
    assert sorted(flags) == [(False, True), (True, False)]
