"""A plan as a ladder: what runs before depth can end, the rungs after each of which it may end, what comes last.

For a plan with a loop a rung is one iteration of its main loop, for any other plan one visit or several. Early exit
from a plain model (CALM, LayerSkip) and from a loop are then the same thing; what differs is whether rungs share
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loopwise.loop.window import main_loop
from loopwise.plan.nodes import Loop, Slot
from loopwise.plan.plans import Plan


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The visits of a plan, in the parts between which a decoder may stop.

    Attributes:
        plan: the plan.
        head: visits that every token runs first.
        rungs: groups of visits; depth may end after any of them.
        tail: visits that every token runs last, from whatever rung it left.
        loop: the loop whose iterations are the rungs; None where rungs are other visits.
    """

    plan: Plan
    head: tuple[Slot, ...]
    rungs: tuple[tuple[Slot, ...], ...]
    tail: tuple[Slot, ...]
    loop: Loop | None = None

    @classmethod
    def of(cls, plan: Plan, exits: Sequence[int] | None = None) -> Ladder:
        """The ladder of a plan.

        Args:
            plan: the plan. With one loop, or one named core, the iterations of that loop are the rungs.
            exits: numbers of visits after which depth may end, ascending; the end of the plan is added. None takes the
                iterations of the main loop, or every visit where the plan has no loop.

        Raises:
            ValueError: the main loop is inside another, or exits are not ascending numbers of visits of the plan.
        """
        slots = plan.slots
        if exits is None and any(isinstance(node, Loop) for node in plan.nodes):
            path, loop = main_loop(plan)
            if len(path) > 1:
                raise ValueError(f"the main loop of {plan} is inside another loop: depth ends at an outer loop only")
            first: int = next(iter(path))
            inside = tuple(slot for slot in slots if slot.position[0] == first)
            size = len(inside) // loop.count
            return cls(
                plan=plan,
                head=tuple(slot for slot in slots if slot.position[0] < first),
                rungs=tuple(inside[start : start + size] for start in range(0, len(inside), size)),
                tail=tuple(slot for slot in slots if slot.position[0] > first),
                loop=loop,
            )
        ends = list(range(1, len(slots) + 1)) if exits is None else list(exits)
        if ends[-1:] != [len(slots)]:
            ends.append(len(slots))
        if ends != sorted(set(ends)) or ends[0] < 1:
            raise ValueError(f"exits {ends[:-1]}: ascending numbers of visits from 1 to {len(slots)} are needed")
        starts = [0, *ends[:-1]]
        return cls(
            plan=plan,
            head=(),
            rungs=tuple(slots[start:end] for start, end in zip(starts, ends, strict=True)),
            tail=(),
        )

    @property
    def is_shared(self) -> bool:
        """True when all rungs are iterations of one loop, so that they have the same weights."""
        return self.loop is not None

    @property
    def num_rungs(self) -> int:
        """How many rungs there are."""
        return len(self.rungs)

    def visits(self, rungs: int) -> int:
        """Number of visits of a token that leaves after so many rungs."""
        return len(self.head) + sum(map(len, self.rungs[:rungs])) + len(self.tail)
