"""Where the loops of a plan begin, turn and end, as seen from its slots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from loopwise.plan.nodes import Loop, Node
from loopwise.plan.plans import Plan

SlotKey = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One iteration of one loop, at its first or last slot.

    Attributes:
        path: node position of the loop in the plan.
        loop: the loop node.
        iteration: number of the iteration, from 0.
    """

    path: tuple[int, ...]
    loop: Loop
    iteration: int

    @property
    def is_first(self) -> bool:
        """True for the loop's first iteration."""
        return self.iteration == 0

    @property
    def is_last(self) -> bool:
        """True for the loop's last iteration."""
        return self.iteration + 1 == self.loop.count


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Iterations that begin right before a slot (outermost first) and end right after it (innermost first)."""

    begin: tuple[Turn, ...] = ()
    end: tuple[Turn, ...] = ()


@lru_cache(maxsize=256)
def turns_of(plan: Plan) -> dict[SlotKey, Turns]:
    """For every slot key at which an iteration of a loop begins or ends, which; other slots are left out."""
    begin: dict[SlotKey, list[Turn]] = {}
    end: dict[SlotKey, list[Turn]] = {}
    for path, depth, loop in _loops(plan.nodes):
        runs: dict[tuple[int, ...], list[SlotKey]] = {}
        for slot in plan.slots:
            if slot.position[: len(path)] == path:
                runs.setdefault(slot.iterations[: depth + 1], []).append(slot.key)
        for iterations, keys in runs.items():
            turn = Turn(path=path, loop=loop, iteration=iterations[depth])
            begin.setdefault(keys[0], []).append(turn)
            end.setdefault(keys[-1], []).insert(0, turn)
    return {key: Turns(begin=tuple(begin.get(key, ())), end=tuple(end.get(key, ()))) for key in {*begin, *end}}


def _loops(
    nodes: tuple[Node, ...], path: tuple[int, ...] = (), depth: int = 0
) -> list[tuple[tuple[int, ...], int, Loop]]:
    """All loops with their path and the number of loops around them, outer loops before inner ones."""
    found = []
    for index, node in enumerate(nodes):
        if isinstance(node, Loop):
            here = (*path, index)
            found += [(here, depth, node), *_loops(node.body, here, depth + 1)]
    return found
