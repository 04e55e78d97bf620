"""Parts of prompts on their way through the rungs, a batch of their own beside the rows that make new tokens.

Shapes: b rows of a call, t tokens of the longest part, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loopwise.decode.cache import Span
from loopwise.decode.runner import Carry, Runner
from loopwise.decode.scheduler import Row


@dataclass(kw_only=True, eq=False)
class Chunk:
    """Parts of prompts that climb together.

    Attributes:
        rows: whose they are, all with the same count.
        lengths: how many tokens of each.
        span: the tokens, `[b, t]`; shorter parts are followed by places without a token.
        carry: what they have.
        rung: how many rungs they have run.
    """

    rows: list[Row]
    lengths: list[int]
    span: Span
    carry: Carry
    rung: int = 0

    @classmethod
    def of(cls, parts: Sequence[tuple[Row, int]], runner: Runner) -> Chunk:
        """The next tokens of rows, as many of each as is said, through the head."""
        longest = max(length for _, length in parts)
        tokens, positions = [], []
        for row, length in parts:
            blank = longest - length
            tokens.append([*row.request.prompt[row.fed : row.fed + length], *[0] * blank])
            positions.append([*range(row.fed, row.fed + length), *[-1] * blank])
        span = Span(
            rows_b=torch.tensor([row.slot for row, _ in parts], device=runner.device),
            tokens_bt=torch.tensor(tokens, device=runner.device),
            positions_bt=torch.tensor(positions, device=runner.device),
        )
        rows, lengths = [row for row, _ in parts], [length for _, length in parts]
        return cls(rows=rows, lengths=lengths, span=span, carry=runner.enter(span))

    def without(self, row: Row) -> Chunk | None:
        """The others of it; None where there is no other. A slot that is free again must not be written."""
        places = [place for place, other in enumerate(self.rows) if other is not row]
        if not places or len(places) == len(self.rows):
            return self if places else None
        index = torch.tensor(places, device=self.span.rows_b.device)
        return replace(
            self,
            rows=[self.rows[place] for place in places],
            lengths=[self.lengths[place] for place in places],
            span=self.span.take(index),
            carry=self.carry.take(index),
        )
