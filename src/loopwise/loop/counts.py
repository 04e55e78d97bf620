"""What a call says of how often a loop runs and which iterations carry a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from loopwise.loop.count import LoopCount, LoopCounts
from loopwise.loop.execute import Hook
from loopwise.loop.rows import RowDepths
from loopwise.loop.window import GradientWindow, Last
from loopwise.plan.plans import Plan

Loops: TypeAlias = int | Mapping[str, int] | LoopCount | LoopCounts | None
Window: TypeAlias = int | Mapping[str, Last] | None


def counted(plan: Plan, loops: Loops, window: Window) -> tuple[Plan, Window, RowDepths | None]:
    """The plan of a call, its gradient window, and the depths of its rows where they have their own.

    Raises:
        ValueError: a loop that the plan lacks, or a window beside counts that say how many iterations carry a gradient.
    """
    if not isinstance(loops, (LoopCount, LoopCounts)):
        return (plan if loops is None else plan.with_loops(loops)), window, None
    if window is not None:
        raise ValueError(f"window={window!r}: {type(loops).__name__} says itself what carries a gradient, leave it out")
    count = loops if isinstance(loops, LoopCount) else loops.batch
    plan = plan.with_loops(count.total)
    return plan, count.grad, RowDepths(plan, loops) if isinstance(loops, LoopCounts) else None


def hooks_of_call(plan: Plan, window: Window, rows: RowDepths | None) -> list[Hook]:
    """What carries these out where nothing else knows of loops."""
    hooks: list[Hook] = [] if window is None else [GradientWindow(plan, window)]
    return hooks if rows is None else [*hooks, rows]
