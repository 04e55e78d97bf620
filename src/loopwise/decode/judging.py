"""Halting rules of the rows of a batch: each row may have its own, rows with equal rules are judged together.

Shapes: B slots, b rows of a call (one token each), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from loopwise.decode.cache import Span
from loopwise.decode.halting import FixedDepth, Halter, parse_halting, refuse_rule
from loopwise.decode.runner import Carry, Runner
from loopwise.decode.scheduler import Row
from loopwise.loop.config import Component

_MOST_KEPT = 8  # a rule keeps predictions of all slots, and clients choose thresholds


class Judges:
    """The halters of an engine, one for each rule that rows have.

    Args:
        runner: the model.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        self._halters: dict[Component, Halter] = {}
        self._readouts = 0

    @property
    def readouts(self) -> int:
        """Predictions read to judge them."""
        return self._readouts + sum(halter.readouts for halter in self._halters.values())

    def rule(self, halting: Component | str) -> Component:
        """Read and check a rule.

        Raises:
            ValueError: it is unknown, cannot judge this model, or the model has a single rung.
        """
        rule = parse_halting(halting) if isinstance(halting, str) else halting
        refuse_rule(rule, self.runner)
        if self.runner.ladder.num_rungs == 1 and not isinstance(rule, FixedDepth):
            raise ValueError(f"halting {halting}: this engine has one rung, which no token can leave early")
        return rule

    def admit(self, row: Row, rows: Sequence[Row]) -> None:
        """A row has got a slot.

        Args:
            row: the new one.
            rows: all that have one; rules that none of them has may be forgotten.
        """
        if _is_judged(row):
            assert row.rule is not None
            if row.rule not in self._halters and len(self._halters) >= _MOST_KEPT:
                used = {other.rule for other in rows}
                for rule in [rule for rule in self._halters if rule not in used]:
                    self._readouts += self._halters.pop(rule).readouts
            halter = self._halters.setdefault(row.rule, Halter(self.runner, row.rule))
            halter.reset(row.slot, row.request.sampling.seed)

    def start(self, rows: Sequence[Row], span: Span, carry: Carry) -> None:
        """New tokens have entered, one of each row."""
        for halter, places in self._groups(rows):
            index = self._index(places)
            progress = [len(rows[place].tokens) / rows[place].request.max_new_tokens for place in places]
            halter.start(span.rows_b[index], carry.take(index), progress)

    def enter(self, rows: Sequence[Row], span: Span, carry: Carry) -> None:
        """A rung is about to be run."""
        for halter, places in self._groups(rows):
            if halter.mixes_states:
                index = self._index(places)
                rungs, counts = (
                    self._index([number(rows[place]) for place in places])
                    for number in (lambda row: row.rung, lambda row: row.count)
                )
                halter.enter(span.take(index), carry.take(index), rungs, counts)

    def judge(
        self, rows: Sequence[Row], span: Span, carry: Carry
    ) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """Stop rows after a rung: sets the end of those that stop to the rung that they have run.

        Args:
            rows: they have run `rung` rungs, this one included.
            span: one token of each.
            carry: what they have after it.

        Returns:
            By place: predictions already read of rows that stop, `[V]`; and states to leave with that are not those of
            the carry, `[1, D]`.
        """
        logits: dict[int, torch.Tensor] = {}
        states: dict[int, torch.Tensor] = {}
        for halter, places in self._groups(rows):
            if not halter.mixes_states:  # at the last rung nothing is to be decided
                places = [place for place in places if rows[place].rung < rows[place].end]
                if not places:
                    continue
            index, mine = self._index(places), [rows[place] for place in places]
            part, after = span.take(index), carry.take(index)
            rungs = self._index([row.rung - 1 for row in mine])
            last = torch.tensor([row.rung == row.end for row in mine], device=self.runner.device)
            verdict = halter.judge(part, after, rungs, last)
            output = halter.output(part, after) if halter.mixes_states else None
            for at, (place, stops) in enumerate(zip(places, verdict.stops_b.tolist(), strict=True)):
                if stops:
                    rows[place].end = rows[place].rung
                    if verdict.logits_bV is not None:
                        logits[place] = verdict.logits_bV[at]
                    if output is not None:
                        states[place] = output.state_btD[at]
        return logits, states

    def _groups(self, rows: Sequence[Row]) -> Iterator[tuple[Halter, list[int]]]:
        places: dict[Component, list[int]] = {}
        for place, row in enumerate(rows):
            if _is_judged(row) and not row.is_in_prompt:
                assert row.rule is not None
                places.setdefault(row.rule, []).append(place)
        for rule, found in places.items():
            yield self._halters[rule], found

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.runner.device)


def _is_judged(row: Row) -> bool:
    """False for a fixed depth, which is known beforehand."""
    return row.rule is not None and not isinstance(row.rule, FixedDepth)
