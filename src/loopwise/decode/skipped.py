"""The depth that tokens skipped, while later tokens of their rows are computed: what the stores alone cannot do.

Most rules of `rules.StorePolicy` fill the stores once, when a token leaves, or leave them as they are. Two rules couple
the tokens of a row:

* `monotone`: no token goes deeper than the one before it, so that nothing is ever missing (SkipDecode, 2307.02628, in
  which depth is a function of the position alone).
* `catch_up`: a token that left early waits with its state. As soon as a later token of its row runs a rung that it did
  not, it runs that rung in the same call (FREE, 2310.05424). All keys and values of a call are written before any is
  read, so the result is that of a model in which every token has its keys and values at full depth. What came after
  the rungs is not run again: keys and values of a coda stay those of the state with which the token left.

Shapes: b rows of a call, t tokens, n waiting tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loopwise.decode.cache import Span
from loopwise.decode.runner import Carry, Runner


@dataclass(frozen=True, kw_only=True, eq=False)
class _Waiting:
    """Tokens of one row that have run equally many rungs, by ascending position."""

    tokens_n: torch.Tensor
    positions_n: torch.Tensor
    state_nD: torch.Tensor
    injected_nD: torch.Tensor | None

    def join(self, other: _Waiting | None) -> _Waiting:
        """Both, in order."""
        if other is None:
            return self
        positions_n = torch.cat([self.positions_n, other.positions_n])
        order = positions_n.argsort()
        injected = None
        if self.injected_nD is not None and other.injected_nD is not None:
            injected = torch.cat([self.injected_nD, other.injected_nD])[order]
        return _Waiting(
            tokens_n=torch.cat([self.tokens_n, other.tokens_n])[order],
            positions_n=positions_n[order],
            state_nD=torch.cat([self.state_nD, other.state_nD])[order],
            injected_nD=injected,
        )


class SkippedDepth:
    """Runs rungs for a runner and keeps its policy for skipped depth; rows are those of the runner's cache.

    Args:
        runner: runs the model; its policy says what is kept.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        self._caps: dict[int, int] = {}
        self._waiting: dict[int, dict[int, _Waiting]] = {}

    def limit(self, row: int) -> int:
        """How deep the next token of a row may go: `monotone` has a limit, with other policies all rungs."""
        return self._caps.get(row, self.runner.ladder.num_rungs)

    def num_waiting(self, row: int) -> int:
        """How many tokens of a row wait to be caught up."""
        return sum(len(chunk.tokens_n) for chunk in self._waiting.get(row, {}).values())

    def forget(self, row: int) -> None:
        """The row begins anew, with another text."""
        self._caps.pop(row, None)
        self._waiting.pop(row, None)

    def climb(self, span: Span, carry: Carry, rung: int | torch.Tensor, counts: int | torch.Tensor = 0) -> Carry:
        """`Runner.climb` for one token per row, together with the tokens of these rows that wait for this rung.

        Args:
            span: one token of each row, no row twice.
            carry: what they have.
            rung: see `Runner.climb`.
            counts: see `Runner.climb`.
        """
        rungs = torch.as_tensor(rung).expand(len(span.rows_b)).tolist()
        rows = span.rows_b.tolist()
        waiting = [self._waiting.get(row, {}).pop(at, None) for row, at in zip(rows, rungs, strict=True)]
        if not any(chunk is not None for chunk in waiting):
            return self.runner.climb(span, carry, rung, counts)
        carry = self.runner.climb(*_together(span, carry, waiting), rung, counts)
        for place, (row, at, chunk) in enumerate(zip(rows, rungs, waiting, strict=True)):
            if chunk is not None:
                self._wait(row, at + 1, _caught_up(chunk, carry, place))
        injected = carry.injected_btD
        return Carry(state_btD=carry.state_btD[:, -1:], injected_btD=None if injected is None else injected[:, -1:])

    def left(self, span: Span, carry: Carry, depth: int | torch.Tensor) -> None:
        """One token of each row has left after so many rungs.

        Args:
            span: the tokens.
            carry: the state with which they left their last rung.
            depth: rungs that they ran, one number or int64 `[b]`.
        """
        self.runner.left(span, carry, depth)
        depths = torch.as_tensor(depth).expand(len(span.rows_b)).tolist()
        for place, (row, at) in enumerate(zip(span.rows_b.tolist(), depths, strict=True)):
            if self.runner.policy.skipped == "monotone":
                self._caps[row] = at
            elif self.runner.policy.skipped == "catch_up":
                injected = carry.injected_btD
                chunk = _Waiting(
                    tokens_n=span.tokens_bt[place],
                    positions_n=span.positions_bt[place],
                    state_nD=carry.state_btD[place],
                    injected_nD=None if injected is None else injected[place],
                )
                self._wait(row, at, chunk)

    def _wait(self, row: int, depth: int, chunk: _Waiting) -> None:
        if depth < self.runner.ladder.num_rungs:
            chunks = self._waiting.setdefault(row, {})
            chunks[depth] = chunk.join(chunks.get(depth))


def _together(span: Span, carry: Carry, waiting: Sequence[_Waiting | None]) -> tuple[Span, Carry]:
    """Spans of one token per row with waiting tokens before it; rows with fewer begin with places without a token."""
    more = max(len(chunk.tokens_n) for chunk in waiting if chunk is not None)
    pad = (0, 0, more, 0)
    tokens_bt = torch.nn.functional.pad(span.tokens_bt, (more, 0))
    positions_bt = torch.nn.functional.pad(span.positions_bt, (more, 0), value=-1)
    state_btD = torch.nn.functional.pad(carry.state_btD, pad)
    injected_btD = None if carry.injected_btD is None else torch.nn.functional.pad(carry.injected_btD, pad)
    for place, chunk in enumerate(waiting):
        if chunk is None:
            continue
        where = slice(more - len(chunk.tokens_n), more)
        tokens_bt[place, where], positions_bt[place, where] = chunk.tokens_n, chunk.positions_n
        state_btD[place, where] = chunk.state_nD
        if injected_btD is not None and chunk.injected_nD is not None:
            injected_btD[place, where] = chunk.injected_nD
    whole = Span(rows_b=span.rows_b, tokens_bt=tokens_bt, positions_bt=positions_bt)
    return whole, Carry(state_btD=state_btD, injected_btD=injected_btD)


def _caught_up(chunk: _Waiting, carry: Carry, place: int) -> _Waiting:
    """Waiting tokens of one row after the rung, from the carry of all."""
    last = carry.state_btD.shape[1] - 1
    where = slice(last - len(chunk.tokens_n), last)
    injected = carry.injected_btD
    return _Waiting(
        tokens_n=chunk.tokens_n,
        positions_n=chunk.positions_n,
        state_nD=carry.state_btD[place, where],
        injected_nD=None if injected is None else injected[place, where],
    )
