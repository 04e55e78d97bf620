"""A depth of its own for every row of a batch (`LoopCounts`), at work in one forward.

A row that takes no part in an iteration keeps its state and costs nothing: visits are narrowed to the rows that run.
What a row computes is what it would compute alone, with its own numbers of iterations without and with a gradient.

Shapes: B batch rows, T tokens, D width, b rows of a visit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loopwise.loop.boundary import Turn
from loopwise.loop.count import LoopCounts
from loopwise.loop.execute import Visit
from loopwise.loop.routing import is_routed
from loopwise.loop.window import main_loop
from loopwise.plan.plans import Plan


class RowDepths:
    """Executor hook, and what the loop components ask about rows that start or end besides the others.

    Args:
        plan: the plan that is played; its main loop (`main_loop`) runs as often as the deepest row.
        counts: one count per row.

    Raises:
        ValueError: the plan has no main loop.
    """

    def __init__(self, plan: Plan, counts: LoopCounts):
        self._path, self._loop = main_loop(plan)
        self._depth = sum(1 for end in range(1, len(self._path)) if _is_loop(plan, self._path[:end]))
        self._counts, self._batch = counts, counts.batch
        # By iteration, the rows that take part: on the CPU, and where the state is (None for all).
        self._rows: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def before(self, visit: Visit, state_BTD: torch.Tensor) -> Visit:
        """The visit of the rows that take part.

        Raises:
            ValueError: there are more or fewer rows than counts, or the visit leaves others out besides.
        """
        if visit.slot.position[: len(self._path)] != self._path:
            return visit
        num_counts = len(self._counts.no_grad_B)
        if num_counts != len(state_BTD):
            raise ValueError(f"loop counts are given for {num_counts} rows, the batch has {len(state_BTD)}")
        _, rows = self._active(visit.slot.iterations[self._depth], state_BTD.device)
        if rows is None:
            return visit
        if visit.is_partial:
            raise ValueError("depths per sequence narrow visits to rows, and another hook has narrowed them: use one")
        return replace(visit, rows=rows)

    def after(self, visit: Visit, before_BTD: torch.Tensor, state_BTD: torch.Tensor) -> torch.Tensor:
        """The state as it is."""
        return state_BTD

    def iterations(self, turn: Turn, visit: Visit) -> torch.Tensor | None:
        """Which of its own iterations each row of a visit is in, int64 `[b]` from 0; None for other loops."""
        if turn.path != self._path:
            return None
        own_B = torch.full_like(self._counts.no_grad_B, turn.iteration)
        if turn.iteration >= self._batch.no_grad:
            own_B = self._counts.no_grad_B + (turn.iteration - self._batch.no_grad)
        return self._of_visit(own_B, turn.iteration, visit)

    def starting(self, turn: Turn, visit: Visit) -> torch.Tensor | None:
        """Rows of a visit (their place in it) that are in their first iteration; None for other loops."""
        own_b = self.iterations(turn, visit)
        return None if own_b is None else (own_b == 0).nonzero()[:, 0]

    def ending(self, turn: Turn, visit: Visit) -> torch.Tensor | None:
        """Rows of a visit (their place in it) that are in their last iteration; None for other loops."""
        own_b = self.iterations(turn, visit)
        if own_b is None:
            return None
        return (own_b + 1 == self._of_visit(self._counts.total_B, turn.iteration, visit)).nonzero()[:, 0]

    def signal(
        self, turn: Turn, signal: nn.Module, visit: Visit, part_btD: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """What a signal adds to a part of the state, `[b, t, D]`: each row is in an iteration of its own."""
        own_b = self.iterations(turn, visit)
        if own_b is None:
            return signal(part_btD, turn.iteration, positions)
        added_btD = torch.zeros_like(part_btD)
        for iteration in own_b.unique().tolist():
            index = (own_b == iteration).nonzero()[:, 0].to(part_btD.device)
            at = positions if len(positions) == 1 else positions[index]
            one_btD = signal(part_btD[index], iteration, at).expand(len(index), -1, -1)
            added_btD = added_btD.index_put((index,), one_btD.to(added_btD.dtype))
        return added_btD

    def leave(self, turn: Turn, exit: nn.Module, visit: Visit, part_btD: torch.Tensor) -> torch.Tensor:
        """A part of the state, `[b, t, D]`, after the exit of the rows that are in their last iteration."""
        index = self.ending(turn, visit)
        if index is None:
            return exit(part_btD) if turn.is_last else part_btD
        if len(index) in (0, len(part_btD)):
            return exit(part_btD) if len(index) else part_btD
        index = index.to(part_btD.device)
        return part_btD.index_put((index,), exit(part_btD[index]).to(part_btD.dtype))

    def _of_visit(self, values_B: torch.Tensor, iteration: int, visit: Visit) -> torch.Tensor:
        """Those of some values, `[B]` on the CPU, that belong to the rows of a visit."""
        if visit.rows is None:
            return values_B
        on_cpu, rows = self._active(iteration, visit.rows.device)
        return values_B[on_cpu if visit.rows is rows else visit.rows.cpu()]  # what is known need not wait for a device

    def _active(self, iteration: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        if iteration not in self._rows:
            active_B = self._counts.active(iteration)
            index = active_B.nonzero()[:, 0]
            self._rows[iteration] = index, None if bool(active_B.all()) else index.to(device)
        return self._rows[iteration]


def refuse_rows(modules: Mapping[str, Any], collect: str | None, halting: Any) -> None:
    """Name what has no meaning where every row has a depth of its own.

    Args:
        modules: the components of loops (`LoopModule`) by loop name.
        collect: name of the loop whose iterations are read.
        halting: a rule for all loops with a gate.

    Raises:
        ValueError: there is such a thing.
    """
    for name, module in modules.items():
        reason = None
        if is_routed(module):
            reason = "routers"
        elif module.conditioner is not None:
            reason = "a conditioner, which tells all rows the same time"
        elif module.gate is not None and (halting or module.halting or name == collect):
            reason = "an exit gate at work"
        if reason:
            raise ValueError(f"loop {name!r} has {reason}: use one depth for the batch (per='batch')")


def _is_loop(plan: Plan, position: tuple[int, ...]) -> bool:
    return hasattr(plan.node(position), "count")
