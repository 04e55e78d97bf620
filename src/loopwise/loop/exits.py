"""Tokens that leave a loop: the gate and the halting rule at work during one run of the loop.

Shapes: B batch rows, T tokens, D width, b selected rows, t selected tokens.

A rule says after which iteration a token leaves. What then happens is the caller's choice:

* "select": every iteration runs for every token, and each token's result is read where it left. This is what published
  early-exit code does: it saves nothing.
* "skip": a token that has left is not visited again, and keeps the state with which it left.
"""

# ruff: noqa: N802 -- shape suffixes in the names of properties

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from loopwise.loop.act import ActHalting, ActState
from loopwise.loop.config import Component
from loopwise.loop.execute import Visit, gather, scatter
from loopwise.loop.halting import FixedHalting, HaltingConfig, HaltState
from loopwise.plan.nodes import Slot

ON_EXIT = ("skip", "select")


class Exits:
    """One run of a loop with a gate.

    Args:
        gate: state `[..., D]` -> logits `[...]` of the probability to leave. It reads the state after an iteration; for
            adaptive computation time the state that enters one.
        rule: when a token leaves; None never, and the gate is only noted.
        skips: tokens that have left are not visited.
        generator: source of the draws of a random rule.

    Attributes:
        gate_logits: of every iteration so far, floating `[B, T]`; not a number for tokens that did not run it.
        state: what the rule remembers of each token, None before the first iteration is over.
    """

    def __init__(
        self, gate: nn.Module, rule: Component | None, *, skips: bool = False, generator: torch.Generator | None = None
    ):
        if rule is not None and not isinstance(rule, HaltingConfig | ActHalting):
            raise ValueError(f"{rule.kind} is not driven by a gate: use halting.hazard, halting.ponder or halting.act")
        self.gate = gate
        self.rule = rule or FixedHalting()
        self.skips = skips and rule is not None
        self.gate_logits: list[torch.Tensor] = []
        self.state: HaltState | ActState | None = None
        self._generator = generator
        self._read_at: Any = None
        self._chosen: torch.Tensor | None = None

    @property
    def running_BT(self) -> torch.Tensor | None:
        """Tokens that go on, bool; None before the first iteration is over."""
        return None if self.state is None else ~self.state.halted_BT

    def enter(self, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int) -> None:
        """An iteration begins with this part of the state."""
        if isinstance(self.rule, ActHalting):
            self._read(visit, part_btD, num_rows, num_tokens)

    def leave(
        self, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int, *, last: bool, exit: nn.Module
    ) -> torch.Tensor:
        """An iteration ends with this part of the state; returns what goes on.

        Args:
            visit: the last visit of the iteration.
            part_btD: the state after it, floating `[b, t, D]`.
            num_rows: B.
            num_tokens: T.
            last: it was the last iteration.
            exit: applied to every token once, as it leaves the loop.
        """
        if not isinstance(self.rule, ActHalting):
            self._read(visit, part_btD, num_rows, num_tokens)
        logits_bt = gather(self.gate_logits[-1], visit)
        if self.state is None:
            like_BTD = part_btD.new_zeros(num_rows, num_tokens, part_btD.shape[-1])
            start = like_BTD if isinstance(self.rule, ActHalting) else like_BTD[..., 0]
            self.state = self.rule.start(start)  # pyright: ignore[reportArgumentType]
        before = _part(self.state, visit)
        if isinstance(self.rule, ActHalting):
            after: Any = self.rule.step(before, logits_bt.sigmoid(), part_btD, last=last)
            result_btD = after.output_BTD
        else:
            after = self.rule.step(before, logits_bt.sigmoid(), last=last, generator=self._generator)
            result_btD = part_btD
            if self._chosen is not None and not self.skips:
                result_btD = torch.where(before.halted_BT[..., None], self._chosen, part_btD)
        self.state = _whole(self.state, after, visit)
        return self._go_on(part_btD, result_btD, before.halted_BT, after.halted_BT, last, exit)

    def fork(self) -> Exits:
        """A copy that goes on from here on its own."""
        twin = copy.copy(self)
        twin.gate_logits = list(self.gate_logits)
        return twin

    def pass_over(self) -> None:
        """An iteration that no token runs."""
        self.gate_logits.append(torch.full_like(self.gate_logits[-1], torch.nan))

    def _go_on(
        self,
        part_btD: torch.Tensor,
        result_btD: torch.Tensor,
        had_left_bt: torch.Tensor,
        has_left_bt: torch.Tensor,
        last: bool,
        exit: nn.Module,
    ) -> torch.Tensor:
        if not self.skips:
            self._chosen = result_btD
            return exit(result_btD) if last else part_btD
        leaves_bt = has_left_bt & ~had_left_bt
        return torch.where(leaves_bt[..., None], exit(result_btD), part_btD)

    def _read(self, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int) -> None:
        logits_bt = self.gate(part_btD)
        if self._read_at != visit.slot.iterations:
            self._read_at = visit.slot.iterations
            self.gate_logits.append(logits_bt.new_full((num_rows, num_tokens), torch.nan))
        self.gate_logits[-1] = scatter(self.gate_logits[-1], logits_bt, visit) if visit.is_partial else logits_bt


def running_parts(slot: Slot, running_BT: torch.Tensor) -> Iterator[Visit]:
    """Visits of a slot that cover exactly the running tokens, rows with equally many of them together.

    No padding takes part in attention, so that a row does not depend on its batch mates.

    Args:
        slot: the slot.
        running_BT: bool `[B, T]`.
    """
    num_tokens = running_BT.shape[1]
    counts_B = running_BT.sum(1)
    for count in counts_B.unique().tolist():
        if not count:
            continue
        rows_b = (counts_B == count).nonzero()[:, 0]
        rows = None if len(rows_b) == len(counts_B) else rows_b
        positions = None if count == num_tokens else running_BT[rows_b].nonzero()[:, 1].view(-1, count)
        yield Visit(slot=slot, rows=rows, positions=positions)


def _part(state: Any, visit: Visit) -> Any:
    return replace(state, **{field.name: gather(getattr(state, field.name), visit) for field in fields(state)})


def _whole(state: Any, part: Any, visit: Visit) -> Any:
    if not visit.is_partial:
        return part
    names = [field.name for field in fields(state)]
    return replace(state, **{name: scatter(getattr(state, name), getattr(part, name), visit) for name in names})
