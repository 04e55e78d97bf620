"""One thread owns the engine; everyone else talks to it through a queue.

An engine is not made for several threads, and a model that records its calls cannot be (see `models.attach`). Commands
go in through a thread-safe queue, and are carried out between two steps of the engine; what comes out of a step is
handed on in one call.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from loopwise.decode.request import Event, Request

LOG = logging.getLogger("loopwise.serve")


class EngineLike(Protocol):
    """What a worker needs of an engine."""

    @property
    def has_work(self) -> bool:
        """True while a request is not finished."""
        ...

    def submit(self, request: Request) -> int:
        """Take a request; ValueError when it cannot be served."""
        ...

    def cancel(self, request_id: int) -> Any:
        """Forget a request."""
        ...

    def step(self) -> list[Event]:
        """Compute once."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters."""
        ...


@dataclass(frozen=True)
class Accepted:
    """The engine has taken the request."""


@dataclass(frozen=True)
class Refused:
    """The engine has not: what is wrong with the request."""

    message: str


@dataclass(frozen=True)
class Failed:
    """The request is over without its fault: what happened, and the status of HTTP that says so."""

    message: str
    status: int = 500


Answer = Accepted | Refused | Failed | Event


@dataclass(eq=False)
class Ticket:
    """A request on its way.

    Attributes:
        request: what is asked for.
        index: its number among those that came together.
        sink: of whoever waits for it; the worker does not look at it.
        id: the engine's number for it; belongs to the worker's thread.
    """

    request: Request
    index: int
    sink: Any
    id: int | None = field(default=None)


Deliver = Callable[[Sequence[tuple[Ticket, Answer]]], object]


class Worker:
    """The thread of an engine.

    Args:
        engine: it; nobody else may use it from now on.

    Attributes:
        stats: the engine's counters after its last step.
    """

    def __init__(self, engine: EngineLike):
        self._engine = engine
        self._commands: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._live: dict[int, Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="loopwise-engine", daemon=True)
        self._deliver: Deliver = lambda answers: None
        self.stats = engine.stats()

    def start(self, deliver: Deliver) -> None:
        """Begin.

        Args:
            deliver: called in the worker's thread with everything that came out of one step.
        """
        self._deliver = deliver
        self._thread.start()

    def stop(self) -> None:
        """Cancel everything and end the thread; returns when it has ended."""
        self._commands.put(("stop", None))
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """True while the thread works."""
        return self._thread.is_alive()

    def submit(self, ticket: Ticket) -> None:
        """Hand in a request; `Accepted` or `Refused` is the first thing delivered."""
        self._commands.put(("submit", ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Free what a request holds; right at any time, also after its end."""
        self._commands.put(("cancel", ticket))

    def _run(self) -> None:
        while self._carry_out():
            if self._engine.has_work:
                self._step()

    def _carry_out(self) -> bool:
        """Do what the queue says, and wait for it where nothing else is to be done; False at the end."""
        answers: list[tuple[Ticket, Answer]] = []
        count = 0
        while True:
            try:
                word, ticket = self._commands.get(block=not count and not self._engine.has_work)
            except queue.Empty:
                break
            count += 1
            if ticket is None:
                for live in list(self._live.values()):
                    self._cancel(live)
                    answers.append((live, Failed("the server is shutting down", 503)))
                self._hand_out(answers)
                return False
            if word == "submit":
                answers.append((ticket, self._submit(ticket)))
            else:
                self._cancel(ticket)
        if count:
            self._hand_out(answers)
        return True

    def _submit(self, ticket: Ticket) -> Answer:
        try:
            ticket.id = self._engine.submit(ticket.request)
        except ValueError as error:
            return Refused(str(error))
        except Exception as error:  # a defect of ours must not end the thread
            LOG.exception("the engine failed to take a request")
            return Failed(f"the engine failed: {type(error).__name__}")
        self._live[ticket.id] = ticket
        return Accepted()

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.id is not None and self._live.pop(ticket.id, None) is not None:
            self._engine.cancel(ticket.id)

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:  # those who wait get an answer, and later requests a try
            LOG.exception("the engine failed")
            failed = Failed(f"the engine failed: {type(error).__name__}")
            tickets = list(self._live.values())
            for ticket in tickets:
                self._cancel(ticket)
            self._hand_out([(ticket, failed) for ticket in tickets])
            return
        answers: list[tuple[Ticket, Answer]] = []
        for event in events:
            ticket = self._live.get(event.request_id)
            if ticket is None:
                continue
            if event.finish is not None:
                del self._live[event.request_id]
            answers.append((ticket, event))
        self._hand_out(answers)

    def _hand_out(self, answers: Sequence[tuple[Ticket, Answer]]) -> None:
        self.stats = self._engine.stats()  # who gets an answer finds it counted
        if answers:
            self._deliver(answers)
