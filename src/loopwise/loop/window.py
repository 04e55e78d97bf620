"""Which iterations of a loop carry a gradient: only its last ones (truncated backpropagation, one-step gradients).

A window gives named loops a number n: a visit carries a gradient if every such loop around it is in its last n
iterations. HRM (2506.21734) has `{"cycle": 1, "low": 1}`: the last call of each of its two stacks. TRM (2510.04871) has
`{"cycle": 1}`: the whole last cycle. A sequence in the place of n gives one number per iteration of the loop around it,
as HRM-Text (2605.20613) does for its lower stack.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeAlias

import torch

from loopwise.loop.boundary import SlotKey
from loopwise.loop.execute import Visit
from loopwise.plan.nodes import Loop, Node, Slot
from loopwise.plan.plans import Plan

Last: TypeAlias = int | Sequence[int]


class GradientWindow:
    """Executor hook that switches the gradient of earlier iterations off; values stay what they are.

    Args:
        plan: the plan that is played.
        last: by loop name, how many of its last iterations carry a gradient, at least 0; a sequence of numbers is read
            from its end, one per iteration of the loop around it, and its first number also holds for earlier ones. A
            bare number is meant for the main loop, see `main_loop`.

    Raises:
        ValueError: a loop that the plan lacks, a number that is not a whole one of at least 0, or a sequence for a
            loop with none around it.
    """

    def __init__(self, plan: Plan, last: int | Mapping[str, Last]):
        named = by_name(plan, last)
        checked = tuple((name, check_last(name, value)) for name, value in named.items())
        for name, _ in checked:
            if name not in plan.loops and (name or main_loop(plan)[1].name is not None):
                raise ValueError(f"gradient window: the plan has no loop {name!r}; named are {', '.join(plan.loops)}")
        self._without = _without_gradient(plan, checked)

    def before(self, visit: Visit, state_BTD: torch.Tensor) -> Visit:
        """The visit, without its gradient where it lies outside the window."""
        return replace(visit, with_grad=False) if visit.slot.key in self._without else visit

    def after(self, visit: Visit, before_BTD: torch.Tensor, state_BTD: torch.Tensor) -> torch.Tensor:
        """The state as it is."""
        return state_BTD


def main_loop(plan: Plan) -> tuple[tuple[int, ...], Loop]:
    """The loop that a bare number of iterations is meant for: the only one of a plan, or else the one named core.

    Returns:
        Its node position in the plan, and the node.

    Raises:
        ValueError: the plan has no loop, or several and none is named core.
    """
    found = list(_loops_within(plan.nodes))
    chosen = found if len(found) == 1 else [item for item in found if item[1].name == "core"]
    if not chosen:
        many = "has no loop" if not found else f"has {len(found)} loops and none is named core"
        raise ValueError(f"the plan {plan} {many}: name one, such as 0-1 core:(2-5)x4 6-7")
    return chosen[0]


def by_name(plan: Plan, last: int | Mapping[str, Last]) -> dict[str, Last]:
    """A window by loop name; a bare number is that of the main loop, whose name is "" where it has none."""
    if isinstance(last, Mapping):
        return dict(last)
    return {main_loop(plan)[1].name or "": last}


def _loops_within(nodes: tuple[Node, ...], path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Loop]]:
    for index, node in enumerate(nodes):
        if isinstance(node, Loop):
            yield (*path, index), node
            yield from _loops_within(node.body, (*path, index))


def check_last(name: str, last: Any) -> int | tuple[int, ...]:
    """How many last iterations of a loop carry a gradient, in hashable form.

    Raises:
        ValueError: not a whole number of at least 0, nor a sequence of such.
    """
    if isinstance(last, Sequence) and not isinstance(last, str) and last:
        return tuple(_check_count(name, item) for item in last)
    return _check_count(name, last)


def _check_count(name: str, count: Any) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"gradient window of loop {name!r} is {count!r}: use whole numbers of at least 0")
    return count


@lru_cache(maxsize=256)
def _without_gradient(plan: Plan, last: tuple[tuple[str, int | tuple[int, ...]], ...]) -> frozenset[SlotKey]:
    """Keys of the slots outside the window."""
    counts = dict(last)
    return frozenset(slot.key for slot in plan.slots if not _carries_gradient(plan, slot, counts))


def _carries_gradient(plan: Plan, slot: Slot, last: Mapping[str, int | tuple[int, ...]]) -> bool:
    around = [plan.node(slot.position[:depth]) for depth in range(1, len(slot.position))]
    loops = [node for node in around if isinstance(node, Loop)]
    for depth, (loop, iteration) in enumerate(zip(loops, slot.iterations, strict=True)):
        count = last.get(loop.name or "")
        if isinstance(count, tuple):
            if depth == 0:
                raise ValueError(f"gradient window of loop {loop.name!r}: there is no loop around it, give one number")
            from_end = loops[depth - 1].count - slot.iterations[depth - 1]
            count = count[max(0, len(count) - from_end)]
        if count is not None and iteration < loop.count - count:
            return False
    return True
