"""Deep supervision in segments: what a puzzle carries from one segment to the next, and when it has had enough.

A segment is one run of the plan; its streams, detached, start the next one (HRM, 2506.21734; TRM, 2510.04871). Rows of
a batch are independent: each halts by itself, and a trainer puts the next puzzle in its place.

Shapes: B batch rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from loopwise.loop.config import Component


@dataclass(frozen=True, kw_only=True, eq=False)
class Carry:
    """The state between two segments.

    Attributes:
        streams: detached values of the named streams, floating, each `[B, T, D]`.
        steps: segments that each row has run since its start, int64 `[B]`.
        halted: the row has finished, bool `[B]`; true before the first segment.
    """

    streams: Mapping[str, torch.Tensor]
    steps: torch.Tensor
    halted: torch.Tensor

    def restart(self, rows_B: torch.Tensor, first: Mapping[str, torch.Tensor]) -> Carry:
        """The carry with some rows (bool `[B]`) at the beginning again; `first` holds the first values, each `[D]`."""
        streams = {
            name: torch.where(rows_B[:, None, None], first[name].to(value), value)
            for name, value in self.streams.items()
        }
        return replace(self, streams=streams, steps=torch.where(rows_B, 0, self.steps), halted=self.halted & ~rows_B)


@dataclass(frozen=True, kw_only=True)
class SegmentHalting(Component):
    """When a row stops running segments, judged from two logits that a head gives: halt and continue.

    In evaluation a row stops after `max_steps` segments only, as in the published code. In training it also stops when
    the rule says so, but not before a minimum that is drawn for it: with probability `exploration` one of
    {2, ..., max_steps}, else none.

    Attributes:
        max_steps: most segments of a row, at least 1; with 1 the logits are not read.
        rule: stop when the halt logit is above the continue logit ("greater", HRM) or above 0 ("positive", TRM).
        exploration: probability of a minimum, from 0 to 1.
    """

    kind: ClassVar[str | None] = "halting.segments"
    max_steps: int = 16
    rule: Literal["greater", "positive"] = "greater"
    exploration: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.max_steps >= 1, "max_steps", "must be at least 1")
        self.require(0 <= self.exploration <= 1, "exploration", "must be from 0 to 1")

    def halts(
        self,
        steps_B: torch.Tensor,
        halt_B: torch.Tensor,
        continue_B: torch.Tensor,
        *,
        training: bool = False,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Which rows have finished after a segment.

        Args:
            steps_B: segments that each row has run, this one included, int64 `[B]`.
            halt_B: logits of halting, floating `[B]`.
            continue_B: logits of going on, floating `[B]`.
            training: apply the rule.
            generator: source of the drawn minimum; needed in training with exploration.

        Returns:
            bool `[B]`.

        Raises:
            ValueError: a minimum is to be drawn without a generator.
        """
        last_B = steps_B >= self.max_steps
        if not training or self.max_steps == 1:
            return last_B
        wants_B = halt_B > 0 if self.rule == "positive" else halt_B > continue_B
        return (last_B | wants_B) & (steps_B >= self._minimum(steps_B, generator))

    def _minimum(self, steps_B: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        if not self.exploration:
            return torch.zeros_like(steps_B)
        if generator is None:
            raise ValueError(
                f"{self.kind}: exploration={self.exploration!r} draws in training; pass generator=, or set it to 0"
            )
        draw_B = torch.rand(steps_B.shape, generator=generator, device=generator.device) < self.exploration
        least_B = torch.randint(2, self.max_steps + 1, steps_B.shape, generator=generator, device=generator.device)
        return (draw_B * least_B).to(steps_B.device)
