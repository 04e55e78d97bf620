"""Which requests hold a slot, what each of them waits for, and when waiting rows are served: no tensors here.

A row that holds a slot is in one of four phases. The queues of an engine are the rows in a phase, oldest request first:

    PROMPT   parts of its prompt are still to be computed
    READY    its next token waits for the prelude
    CLIMBING it is at some iteration of the core
    DONE     its iterations are over, it waits for the coda
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loopwise.decode.request import Request
from loopwise.loop.config import Component


class Phase(enum.Enum):
    """What a row waits for."""

    PROMPT = "prompt"
    READY = "enter"
    CLIMBING = "climb"
    DONE = "leave"


@dataclass(kw_only=True, eq=False)
class Row:
    """A request and where it stands.

    Attributes:
        id: number of the request.
        request: what was asked for.
        count: rungs that its tokens may run.
        rule: its halting rule; None for none.
        slot: row of the cache that it holds; -1 before it has one.
        phase: what it waits for.
        fed: tokens of the prompt whose keys and values are in the cache.
        tokens: new tokens so far.
        position: of the token that is under way.
        rung: how many rungs that token has run.
        end: after how many it leaves, as far as is known.
        depth: rungs of the latest position after the prompt that predicted a token; 0 before the first.
    """

    id: int
    request: Request
    count: int
    rule: Component | None = None
    slot: int = -1
    phase: Phase = Phase.PROMPT
    fed: int = 0
    tokens: list[int] = field(default_factory=list)
    position: int = -1
    rung: int = 0
    end: int = 0
    depth: int = 0

    @property
    def is_in_prompt(self) -> bool:
        """True while the token under way is one of the prompt: no rule judges it."""
        return self.position < len(self.request.prompt)

    @property
    def is_read(self) -> bool:
        """True when the token under way predicts a new one: those before the prompt's last do not."""
        return self.position + 1 >= len(self.request.prompt)

    @property
    def token(self) -> int:
        """The token under way."""
        prompt = self.request.prompt
        return prompt[self.position] if self.position < len(prompt) else self.tokens[self.position - len(prompt)]


class Exchange(Protocol):
    """When rows that wait for coda or prelude are served."""

    def is_due(self, idle: int, climbing: int) -> bool:
        """Whether to serve them now, with so many rows that wait and so many in the core."""
        ...

    def note(self, depth: int) -> None:
        """A token ran so many rungs."""
        ...


class TogetherExchange:
    """Token by token: coda and prelude run when no row is left in the core."""

    def is_due(self, idle: int, climbing: int) -> bool:
        """Whether the core is empty."""
        return idle > 0 and not climbing

    def note(self, depth: int) -> None:
        """Depth makes no difference."""


class DepthWiseExchange:
    """Rows at different iterations: coda and prelude run when a share of the rows waits for them.

    A call costs about the same for one row as for several, so rows are gathered until they are a share `x` of all. One
    exchange, of `c` times the cost of a rung, serves that share; meanwhile they stand idle. Were all depths the depth
    `d`, a token would take `d (1 + x / 2)` ticks. With prompts on their way a tick is two runs, so in all
    `2 d (1 + x / 2) + c / x`, which is least at `x = s = sqrt(c / d)`. Where depths differ, the last to be done are
    the deepest, and a large share waits longer than that: `s / (1 + s)` is near `s` where `s` is small, and never 1.
    docs/batching.md has measurements.

    Args:
        cost: c, what serving both costs over what a rung costs.
        depth: a first guess of d.
        gather: x; None takes the formula with the mean depth of late.
    """

    def __init__(self, cost: float, depth: float, gather: float | None = None):
        if gather is not None and not 0 <= gather <= 1:
            raise ValueError(f"gather {gather}: a share of the rows, from 0 (serve at once) to 1 (wait for all)")
        self.cost, self.depth, self.gather = cost, depth, gather

    @property
    def share(self) -> float:
        """The share x that is waited for."""
        if self.gather is not None:
            return self.gather
        share = math.sqrt(self.cost / self.depth)
        return share / (1 + share)

    def is_due(self, idle: int, climbing: int) -> bool:
        """Whether enough rows wait, or no other is left."""
        return idle > 0 and (not climbing or idle >= self.share * (idle + climbing))

    def note(self, depth: int) -> None:
        """Follow the mean depth."""
        self.depth += 0.02 * (depth - self.depth)


class Scheduler:
    """Requests in order of arrival and the slots that they hold.

    Args:
        max_requests: number of slots.
        exchange: when rows in between are served.
    """

    def __init__(self, max_requests: int, exchange: Exchange):
        self.max_requests, self.exchange = max_requests, exchange
        self.waiting: deque[Row] = deque()
        self.rows: dict[int, Row] = {}  # by request, in order of admission
        self._free = list(reversed(range(max_requests)))

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return bool(self.waiting or self.rows)

    def submit(self, row: Row) -> None:
        """Take a request in."""
        self.waiting.append(row)

    def admit(self) -> list[Row]:
        """Give free slots to the requests that wait longest."""
        new = []
        while self.waiting and self._free:
            row = self.waiting.popleft()
            row.slot = self._free.pop()
            self.rows[row.id] = row
            new.append(row)
        return new

    def release(self, row: Row) -> None:
        """A request is over: its slot is free."""
        del self.rows[row.id]
        self._free.append(row.slot)

    def cancel(self, request_id: int) -> Row | None:
        """Take a request out wherever it is; None where there is no such."""
        row = self.rows.get(request_id)
        if row is not None:
            self.release(row)
            return row
        for row in self.waiting:
            if row.id == request_id:
                self.waiting.remove(row)
                return row
        return None

    def within(self, phase: Phase) -> list[Row]:
        """The rows in a phase, oldest first."""
        return [row for row in self.rows.values() if row.phase is phase]

    def next_parts(
        self, size: int, under_way: Sequence[tuple[Row, int]] = (), *, equal_counts: bool = False
    ) -> list[tuple[Row, int]]:
        """The next parts of prompts to compute: rows, and how many tokens of each.

        Rows join while the whole, padding included, has at most `size` tokens. Nobody overtakes an older row that does
        not fit, or short prompts could keep a long one waiting for ever.

        Args:
            size: the most tokens.
            under_way: the parts that are being computed; what joins them counts into the same size.
            equal_counts: take only rows with as many rungs in all as the oldest of them.
        """
        parts = list(under_way)
        busy = {row.id for row, _ in parts}
        longest = max((length for _, length in parts), default=0)
        for row in self.within(Phase.PROMPT):
            if row.id in busy or (equal_counts and parts and row.count != parts[0][0].count):
                continue
            length = min(size, len(row.request.prompt) - row.fed)
            if parts and max(longest, length) * (len(parts) + 1) > size:
                break
            parts.append((row, length))
            longest = max(longest, length)
        return parts[len(under_way) :]

    def lengths(self) -> dict[str, int]:
        """How many requests are in each queue."""
        counts = {phase.value: 0 for phase in Phase}
        for row in self.rows.values():
            counts[row.phase.value] += 1
        return {"waiting": len(self.waiting), **counts}


def by_count(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows apart by how many rungs they run in all."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.count, []).append(row)
    return list(groups.values())
