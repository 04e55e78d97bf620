"""Parts of prompts on their way through the rungs, a batch of their own beside the rows that make new tokens.

Shapes: b rows of a call, t tokens of the longest part, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from loopwise.decode.cache import Span
from loopwise.decode.runner import Carry, Runner
from loopwise.decode.scheduler import Row


@dataclass(kw_only=True, eq=False)
class Chunk:
    """Parts of prompts that climb together.

    Attributes:
        rows: whose they are.
        lengths: how many tokens of each.
        rungs: how many rungs each has run.
        span: the tokens, `[b, t]`; shorter parts are followed by places without a token.
        carry: what they have.
    """

    rows: list[Row]
    lengths: list[int]
    rungs: list[int]
    span: Span
    carry: Carry

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
        return cls(rows=rows, lengths=lengths, rungs=[0] * len(rows), span=span, carry=runner.enter(span))

    @property
    def parts(self) -> list[tuple[Row, int]]:
        """Rows and how many tokens of each."""
        return list(zip(self.rows, self.lengths, strict=True))

    @property
    def ended(self) -> list[int]:
        """Places of the rows that have run all their rungs."""
        return [place for place, row in enumerate(self.rows) if self.rungs[place] == row.count]

    def join(self, other: Chunk) -> Chunk:
        """Both in one, whatever rung each is at."""
        longest = max(self.span.tokens_bt.shape[1], other.span.tokens_bt.shape[1])
        mine, theirs = self._widened(longest), other._widened(longest)
        injected = None
        if mine.carry.injected_btD is not None and theirs.carry.injected_btD is not None:
            injected = torch.cat([mine.carry.injected_btD, theirs.carry.injected_btD])
        return Chunk(
            rows=mine.rows + theirs.rows,
            lengths=mine.lengths + theirs.lengths,
            rungs=mine.rungs + theirs.rungs,
            span=Span(
                rows_b=torch.cat([mine.span.rows_b, theirs.span.rows_b]),
                tokens_bt=torch.cat([mine.span.tokens_bt, theirs.span.tokens_bt]),
                positions_bt=torch.cat([mine.span.positions_bt, theirs.span.positions_bt]),
            ),
            carry=Carry(state_btD=torch.cat([mine.carry.state_btD, theirs.carry.state_btD]), injected_btD=injected),
        )

    def take(self, places: Sequence[int]) -> Chunk | None:
        """The rows at some places, no wider than the longest of them; None where there is no place."""
        if not places or len(places) == len(self.rows):
            return self if places else None
        index = torch.tensor(places, device=self.span.rows_b.device)
        chunk = replace(
            self,
            rows=[self.rows[place] for place in places],
            lengths=[self.lengths[place] for place in places],
            rungs=[self.rungs[place] for place in places],
            span=self.span.take(index),
            carry=self.carry.take(index),
        )
        return chunk._widened(max(chunk.lengths))

    def _widened(self, longest: int) -> Chunk:
        """The same with other room for tokens; what is cut off holds none."""
        more = longest - self.span.tokens_bt.shape[1]
        if not more:
            return self
        span, carry = self.span, self.carry
        injected = carry.injected_btD
        return replace(
            self,
            span=Span(
                rows_b=span.rows_b,
                tokens_bt=pad(span.tokens_bt, (0, more)),
                positions_bt=pad(span.positions_bt, (0, more), value=-1),
            ),
            carry=Carry(
                state_btD=pad(carry.state_btD, (0, 0, 0, more)),
                injected_btD=None if injected is None else pad(injected, (0, 0, 0, more)),
            ),
        )

    def without(self, row: Row) -> Chunk | None:
        """The others of it; None where there is no other. A slot that is free again must not be written."""
        return self.take([place for place, other in enumerate(self.rows) if other is not row])
