"""Activation checkpointing of loops: keep one state per iteration, and run its visits again in the backward pass.

    forward:   s_1 = f(s_0), s_2 = f(s_1), ...        only s_0, s_1, ... are kept, where f is one iteration
    backward:  for r = R, ..., 1: run f(s_{r-1}) again, with what it keeps; go backward through it

An iteration is what lies between two turns of a loop: its visits and what the loop adds around them (update, signals,
norms, gate). All of that is run again on a *fork* of the running forward, so that nothing it notes on the way (states,
gates, streams) is noted twice. Hooks of others cannot be forked: where there are any, or routers, or tokens that leave,
the layer of each visit is checkpointed alone and the hooks run once.

Iterations outside the gradient window keep nothing and are not run again. Dropout draws what it drew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from loopwise.loop.execute import Hook, Visit, execute
from loopwise.loop.rows import RowDepths
from loopwise.loop.window import GradientWindow
from loopwise.plan.nodes import Loop, Slot
from loopwise.plan.plans import Plan

if TYPE_CHECKING:
    from loopwise.models.playing import Frame

_NARROWING = (GradientWindow, RowDepths)  # hooks that narrow visits whatever the state is, and do nothing else


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """What is run again.

    Attributes:
        loop: name of the loop of which each iteration is checkpointed; None takes the outermost loops.
    """

    loop: str | None = None


def play_recomputed(frame: Frame, hooks: Sequence[Hook], recompute: Recompute) -> torch.Tensor:
    """Visit the slots of a frame's plan like `execute` and return the last state `[B, T, D]`; bit for bit the same."""
    if not all(isinstance(hook, _NARROWING) for hook in hooks) or not _can_fork(frame.passes):
        frame.recompute_layers = True
        return execute(frame.hidden, (Visit(slot=slot) for slot in frame.plan.slots), frame.run, hooks)
    state_BTD = frame.hidden
    for is_iteration, visits in _spans(frame, hooks, recompute.loop):
        if is_iteration:
            state_BTD = checkpoint(_Iteration(frame, visits), state_BTD, use_reentrant=False)
        else:
            state_BTD = execute(state_BTD, visits, frame.run)
    return state_BTD


def run_recomputed(layer: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The output of one layer, which is run again in the backward pass; plain where no gradient is recorded."""
    if not torch.is_grad_enabled():
        return layer(*args, **kwargs)
    return checkpoint(partial(layer, **kwargs), *args, use_reentrant=False)


class _Iteration:
    """The visits of one iteration as a function of the state: on the frame the first time, then on forks of it."""

    def __init__(self, frame: Frame, visits: list[Visit]):
        self.frame: Frame | None = frame
        self.visits = visits
        self.before = frame.fork()
        generator = _generator(frame)
        self.drawn = None if generator is None else generator.get_state()

    def __call__(self, state_BTD: torch.Tensor) -> torch.Tensor:
        frame, self.frame = self.frame, None
        if frame is not None:
            return execute(state_BTD, self.visits, frame.run)
        fork = self.before.fork()  # a graph that is retained may come here again
        with _rewound(_generator(fork), self.drawn):
            return execute(state_BTD, self.visits, fork.run)


def _spans(frame: Frame, hooks: Sequence[Hook], loop: str | None) -> Iterator[tuple[bool, list[Visit]]]:
    """Consecutive visits that belong together, and whether they are (the part with a gradient of) an iteration."""
    depth, prefix = _where(frame.plan, loop)
    visits = []
    for slot in frame.plan.slots:
        visit: Visit | None = Visit(slot=slot)
        for hook in hooks:
            visit = visit and hook.before(visit, frame.hidden)
        if visit is not None:
            visits.append(visit)

    def group(visit: Visit) -> tuple[bool, Any]:
        inside = _is_inside(visit.slot, depth, prefix) and visit.with_grad
        return inside, (visit.slot.position[:depth], visit.slot.iterations[:depth]) if inside else None

    for (is_iteration, _), span in groupby(visits, key=group):
        yield is_iteration, list(span)


def _where(plan: Plan, loop: str | None) -> tuple[int, tuple[int, ...]]:
    """(number of loops from the outermost to this one, node position of it); the outermost loops are (1, ())."""
    if loop is None:
        return 1, ()
    for slot in plan.slots:
        for depth in range(1, len(slot.position)):
            node = plan.node(slot.position[:depth])
            if isinstance(node, Loop) and node.name == loop:
                return depth, slot.position[:depth]
    return 1, (-1,)  # the plan of this call has no such loop: nothing is checkpointed


def _is_inside(slot: Slot, depth: int, prefix: tuple[int, ...]) -> bool:
    return len(slot.iterations) >= depth and slot.position[: len(prefix)] == prefix


def _can_fork(passes: Any) -> bool:
    return passes is None or (hasattr(passes, "fork") and passes.routing is None and not passes.skips)


def _generator(frame: Frame) -> torch.Generator | None:
    return getattr(frame.passes, "generator", None)


@contextmanager
def _rewound(generator: torch.Generator | None, state: torch.Tensor | None) -> Iterator[None]:
    """A generator as it was, and afterwards as it is."""
    if generator is None or state is None:
        yield
        return
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)
