"""The rows of an engine at work: each tick runs parts of a model for those that wait for it.

Shapes: B slots, b rows of a call, t tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from loopwise.decode.cache import Span
from loopwise.decode.halting import FixedDepth
from loopwise.decode.judging import Judges
from loopwise.decode.prompts import Chunk
from loopwise.decode.request import Event
from loopwise.decode.result import next_span
from loopwise.decode.runner import Carry, Runner
from loopwise.decode.sampling import GREEDY, Samplers
from loopwise.decode.scheduler import Phase, Row, Scheduler, by_count
from loopwise.decode.skipped import SkippedDepth
from loopwise.loop.config import Component


class Batch:
    """Runs the rows of a scheduler.

    Args:
        runner: the model; it has as many rows as the scheduler has slots.
        scheduler: the requests.
        prefill_chunk: the most tokens of prompts in one call.
        mixes_rungs: let prompts join those that are on their way, at any rung; the runner must mix.
        runs_halted: compute halted rows along while others of the batch are in the core.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, *, prefill_chunk: int, mixes_rungs: bool, runs_halted: bool
    ):
        self.runner, self.scheduler = runner, scheduler
        self.prefill_chunk, self.mixes_rungs, self.runs_halted = prefill_chunk, mixes_rungs, runs_halted
        self.device = runner.device
        self._samplers = Samplers(GREEDY, runner.num_rows)
        self._judges, self._skipped = Judges(runner), SkippedDepth(runner)
        self._read: dict[int, torch.Tensor] = {}  # by slot: predictions that a rule has read at the last rung
        self._carry: Carry | None = None
        self._chunk: Chunk | None = None
        self._events: list[Event] = []
        self._by_token = runner.policy.prefill.is_sequential
        self._is_told_time = runner.module is not None and runner.module.conditioner is not None
        self._counts: Counter[str] = Counter()

    @property
    def num_rungs(self) -> int:
        """The most rungs of a row."""
        return self.runner.ladder.num_rungs

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return self.scheduler.has_work

    def rule(self, halting: Component | str) -> Component:
        """Read and check a halting rule."""
        return self._judges.rule(halting)

    def submit(self, row: Row) -> None:
        """Take a request in."""
        self.scheduler.submit(row)

    def cancel(self, request_id: int) -> bool:
        """Take a request out."""
        row = self.scheduler.cancel(request_id)
        if row is None:
            return False
        self._counts["cancelled"] += 1
        if row.slot >= 0:
            self._read.pop(row.slot, None)
            self.runner.cache.clear(row.slot)  # nobody has looked whether its numbers are finite
        self._events = [event for event in self._events if event.request_id != request_id]
        if self._chunk is not None:
            self._chunk = self._chunk.without(row)
        return True

    def tick(self) -> list[Event]:
        """Admit, run one rung of prompts, one rung of rows in the core, and serve those in between."""
        self._counts["ticks"] += 1
        for row in self.scheduler.admit():
            self._begin(row)
        self._prefill()
        self._climb()
        climbing = len(self.scheduler.within(Phase.CLIMBING))
        idle = self.scheduler.within(Phase.DONE)
        ready = self.scheduler.within(Phase.READY)
        if self.scheduler.exchange.is_due(len(idle) + len(ready), climbing):
            self._leave(idle)
            self._enter(self.scheduler.within(Phase.READY))
        events, self._events = self._events, []
        return events

    def stats(self) -> dict[str, Any]:
        """Counts so far, see `Engine.stats`."""
        counts = self._counts
        decoded = counts["decoded"]
        mean = counts["depth"] / decoded if decoded else float("nan")
        deepest = counts["deepest"] / decoded if decoded else float("nan")
        executed = counts["executed"]
        return {
            "ticks": counts["ticks"],
            "tokens": counts["tokens"],
            "requests_finished": counts["finished"],
            "requests_cancelled": counts["cancelled"],
            "executed_row_iterations": executed,
            "useful_row_iterations": counts["useful"],
            "prompt_executed_iterations": counts["prompt_executed"],
            "prompt_useful_iterations": counts["prompt_useful"],
            "core_runs": counts["core_runs"],
            "prompt_runs": counts["prompt_runs"],
            "readouts": self._judges.readouts,
            "occupancy": executed / (counts["core_runs"] * self.scheduler.max_requests or 1),
            "mean_depth": mean,
            "mean_max_depth": deepest,
            "bound": deepest / mean if decoded else float("nan"),
            "slots_in_use": len(self.scheduler.rows),
            "queues": self.scheduler.lengths(),
            "cache_bytes": self.runner.cache.bytes_allocated,
        }

    # Prompts.

    def _begin(self, row: Row) -> None:
        sampling = row.request.sampling
        self.runner.seeds[row.slot] = sampling.seed
        self._samplers.rows[row.slot] = sampling
        self._samplers.generators[row.slot] = torch.Generator().manual_seed(sampling.seed)
        self._judges.admit(row, list(self.scheduler.rows.values()))
        self._skipped.forget(row.slot)
        if self._by_token:  # a token of the prompt is then as one that was chosen
            row.phase, row.position = Phase.READY, 0

    def _prefill(self) -> None:
        """One rung of the parts under way and of those that join them."""
        if self._chunk is None or self.mixes_rungs:
            under_way = [] if self._chunk is None else self._chunk.parts
            new = self.scheduler.next_parts(self.prefill_chunk, under_way, equal_counts=self._is_told_time)
            if new:
                joining = Chunk.of(new, self.runner)
                self._chunk = joining if self._chunk is None else self._chunk.join(joining)
        chunk = self._chunk
        if chunk is None:
            return
        rungs, counts = self._number(chunk.rungs), self._number([row.count for row in chunk.rows])
        chunk.carry = self.runner.climb(chunk.span, chunk.carry, rungs, counts)
        chunk.rungs = [rung + 1 for rung in chunk.rungs]
        self._counts["prompt_runs"] += 1
        self._counts["prompt_executed"] += chunk.span.tokens_bt.numel()
        self._counts["prompt_useful"] += sum(chunk.lengths)
        places = chunk.ended
        ended = chunk.take(places)
        if ended is not None:
            self._chunk = chunk.take([place for place in range(len(chunk.rows)) if place not in places])
            self._end_chunk(ended)

    def _end_chunk(self, chunk: Chunk) -> None:
        for row, length in zip(chunk.rows, chunk.lengths, strict=True):
            row.fed += length
        ended = [place for place, row in enumerate(chunk.rows) if row.fed == len(row.request.prompt)]
        if not ended and not self.runner.ladder.tail:
            return
        logits_btV = self.runner.leave(chunk.span, chunk.carry)
        if ended:
            last = torch.tensor([chunk.lengths[place] - 1 for place in ended], device=self.device)
            logits_bV = logits_btV[torch.tensor(ended, device=self.device), last]
            rows = [chunk.rows[place] for place in ended]
            for row in rows:
                row.position, row.rung = row.fed - 1, row.count
            self._choose(rows, logits_bV)

    # Tokens.

    def _enter(self, rows: list[Row]) -> None:
        if not rows:
            return
        span = self._span(rows)
        carry = self.runner.enter(span)
        self._store(span.rows_b, carry)
        self._judges.start(rows, span, carry)
        for row in rows:
            row.phase, row.rung, row.end = Phase.CLIMBING, 0, row.count
            if not row.is_in_prompt:
                fixed = row.rule.rungs if isinstance(row.rule, FixedDepth) else 0
                row.end = min(row.count, fixed or row.count, self._skipped.limit(row.slot))

    def _climb(self) -> None:
        rows = self.scheduler.within(Phase.CLIMBING)
        if not rows:
            return
        for group in by_count(rows) if self._is_told_time else [rows]:
            self._climb_together(group)

    def _climb_together(self, rows: list[Row]) -> None:
        halted = self.scheduler.within(Phase.DONE) if self.runs_halted else []
        span = self._span(rows, halted)
        carry = self._taken(span.rows_b)
        rungs, counts = [row.rung for row in rows], [row.count for row in rows]
        rungs += [rungs[0]] * len(halted)
        counts += [counts[0]] * len(halted)
        self._judges.enter(rows, span, carry)
        after = self._skipped.climb(span, carry, self._number(rungs), self._number(counts))
        if halted:
            live = torch.arange(len(rows), device=self.device)
            span, after = span.take(live), after.take(live)
        self._store(span.rows_b, after)
        self._counts["core_runs"] += 1
        self._counts["executed"] += len(rungs)
        self._counts["useful"] += len(rows)
        for row in rows:
            row.rung += 1
        logits, states = self._judges.judge(rows, span, after)
        self._stop(rows, span, after)
        for place, logits_V in logits.items():
            self._read[rows[place].slot] = logits_V
        if states:
            assert self._carry is not None
            self._carry.state_btD[[rows[place].slot for place in states]] = torch.stack([*states.values()])

    def _stop(self, rows: list[Row], span: Span, carry: Carry) -> None:
        """Rows at the end of their rungs go on to the coda; what they skip is filled."""
        ended = [place for place, row in enumerate(rows) if row.rung == row.end]
        for place in ended:
            rows[place].phase = Phase.DONE
        couples = self.runner.policy.skipped == "monotone"
        early = [p for p in ended if not rows[p].is_in_prompt and (couples or rows[p].rung < rows[p].count)]
        if early:
            index = torch.tensor(early, device=self.device)
            depths = self._number([rows[place].rung for place in early])
            self._skipped.left(span.take(index), carry.take(index), depths)

    def _leave(self, rows: list[Row]) -> None:
        read, others = [row for row in rows if row.is_read], [row for row in rows if not row.is_read]
        # Of a prompt computed token by token, the coda needs keys and values of every token, the head only the last.
        unread = [row for row in (rows if self.runner.ladder.tail else read) if row.slot not in self._read]
        found: dict[int, torch.Tensor] = {}
        if unread:
            span = self._span(unread)
            logits_bV = self.runner.leave(span, self._taken(span.rows_b))[:, 0]
            found = dict(zip((row.slot for row in unread), logits_bV, strict=True))
        self._go_on(others)
        if read:
            logits = [(found if row.slot in found else self._read).pop(row.slot) for row in read]
            self._choose(read, torch.stack(logits))

    @staticmethod
    def _go_on(rows: list[Row]) -> None:
        for row in rows:
            row.position, row.phase = row.position + 1, Phase.READY

    def _choose(self, rows: list[Row], logits_bV: torch.Tensor) -> None:
        """Take the next token of rows from their logits."""
        finite = logits_bV.amax(-1).isfinite().tolist()
        for row in [row for row, is_finite in zip(rows, finite, strict=True) if not is_finite]:
            # What is not finite would reach the next request through masked positions of the slot.
            self.runner.cache.clear(row.slot)
            self._end(row, Event(row.id, None, 0, "error"))
        places = [place for place, is_finite in enumerate(finite) if is_finite]
        if not places:
            return
        rows = [rows[place] for place in places]
        picked = self._samplers.pick(logits_bV[torch.tensor(places, device=self.device)], [row.slot for row in rows])
        decoded = [row for row in rows if not row.is_in_prompt]
        for row in decoded:
            row.depth = row.rung
            self._counts["depth"] += row.depth
            self.scheduler.exchange.note(row.depth)
        deepest = max(row.depth for row in self.scheduler.rows.values())
        self._counts["decoded"] += len(decoded)
        self._counts["deepest"] += len(decoded) * deepest
        for row, token in zip(rows, picked.tolist(), strict=True):
            self._take(row, token)

    def _take(self, row: Row, token: int) -> None:
        request = row.request
        row.tokens.append(token)
        self._counts["tokens"] += 1
        finish = None
        if token in request.stop_ids:
            finish = "stop"
        elif len(row.tokens) >= request.max_new_tokens:
            finish = "length"
        event = Event(row.id, token, row.rung, finish)
        if finish:
            self._end(row, event)
            return
        self._events.append(event)
        self._go_on([row])

    def _end(self, row: Row, event: Event) -> None:
        self._events.append(event)
        self.scheduler.release(row)
        self._counts["finished"] += 1

    # Tensors.

    def _span(self, rows: list[Row], blank: list[Row] | None = None) -> Span:
        """One token of each row, and places without a token for rows whose result is not wanted."""
        blank = blank or []
        everyone = [*rows, *blank]
        positions = [*(row.position for row in rows), *(-1 for _ in blank)]
        return next_span([row.slot for row in everyone], [row.token for row in everyone], positions, self.device)

    def _number(self, values: list[int]) -> int | torch.Tensor:
        first = values[0]
        return first if all(value == first for value in values) else torch.tensor(values, device=self.device)

    def _taken(self, slots_b: torch.Tensor) -> Carry:
        assert self._carry is not None
        return self._carry.take(slots_b)

    def _store(self, slots_b: torch.Tensor, part: Carry) -> None:
        """Put rows of a call into their slots."""
        if self._carry is None:
            self._carry = Carry(
                state_btD=_slots_like(part.state_btD, self.runner.num_rows),
                injected_btD=None
                if part.injected_btD is None
                else _slots_like(part.injected_btD, self.runner.num_rows),
            )
        carry = self._carry
        if part.state_btD.dtype != carry.state_btD.dtype:  # a loop may go on in a wider type than it began with
            wider = torch.promote_types(part.state_btD.dtype, carry.state_btD.dtype)
            carry = self._carry = replace(carry, state_btD=carry.state_btD.to(wider))
        carry.state_btD.index_copy_(0, slots_b, part.state_btD.to(carry.state_btD.dtype))
        if carry.injected_btD is not None and part.injected_btD is not None:
            carry.injected_btD.index_copy_(0, slots_b, part.injected_btD)


def _slots_like(part_btD: torch.Tensor, num_slots: int) -> torch.Tensor:
    return part_btD.new_zeros(num_slots, *part_btD.shape[1:])
