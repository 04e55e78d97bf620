"""An HTTP request while it is answered: its prompts in the engine, its text as it comes, its client while there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loopwise.decode.request import Event, Request
from loopwise.decode.server.detokenize import StopTexts, TextStream
from loopwise.decode.server.protocol import ApiError
from loopwise.decode.server.worker import Accepted, Answer, Failed, Refused, Ticket, Worker

Receive = Callable[[], Awaitable[Any]]


class ClientGoneError(Exception):
    """The client has closed the connection."""


@dataclass(frozen=True)
class Piece:
    """Text that is final.

    Attributes:
        index: number of the prompt.
        text: may be empty.
        finish: "stop" or "length" with the last piece of a prompt.
    """

    index: int
    text: str
    finish: str | None


class Part:
    """The answer to one prompt.

    Args:
        tokenizer: of transformers.
        request: what was asked.
        stops: texts that end the answer.
    """

    def __init__(self, tokenizer: Any, request: Request, stops: Sequence[str]):
        self._text = TextStream(tokenizer, request.prompt)
        self._stops = StopTexts(stops)
        self._stop_ids = frozenset(request.stop_ids)
        self.num_tokens = self.depths = 0
        self.finish: str | None = None

    def push(self, event: Event) -> str:
        """What may be shown after an event of the engine; sets `finish` with the last."""
        text = ""
        if event.token is not None:
            self.num_tokens += 1
            self.depths += event.depth
            if event.token not in self._stop_ids:
                text = self._text.push(event.token)
        if event.finish is not None:
            text += self._text.end()
        shown = self._stops.push(text)
        if event.finish is not None:
            shown += self._stops.end()
        if self._stops.found:
            self.finish = "stop"
        elif event.finish is not None:
            self.finish = event.finish
        return shown


class Reply:
    """The prompts of one HTTP request.

    Args:
        worker: the engine's thread.
        tokenizer: of transformers.
        requests: one per prompt.
        stops: texts that end an answer.
        receive: where the ASGI server says that the client has gone.
    """

    def __init__(
        self, worker: Worker, tokenizer: Any, requests: Sequence[Request], stops: Sequence[str], receive: Receive
    ):
        self._worker, self._receive = worker, receive
        self._inbox: asyncio.Queue[tuple[Ticket, Answer] | None] = asyncio.Queue()
        self._early: list[tuple[Ticket, Answer]] = []
        self.tickets = [Ticket(request, index, self._inbox) for index, request in enumerate(requests)]
        self.parts = [Part(tokenizer, request, stops) for request in requests]
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        self.first_token_seconds: float | None = None
        self._began = time.perf_counter()
        self._watch: asyncio.Task[None] | None = None

    @property
    def num_tokens(self) -> int:
        """New tokens so far."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self._began

    @property
    def depths(self) -> int:
        """Sum of their depths."""
        return sum(part.depths for part in self.parts)

    async def begin(self) -> None:
        """Hand in every prompt and wait until all are taken.

        Raises:
            ApiError: the engine refuses one; the others are cancelled.
            ClientGoneError: nobody waits for the answer.
        """
        self._watch = asyncio.create_task(self._watch_client())
        for ticket in self.tickets:
            self._worker.submit(ticket)
        waiting = len(self.tickets)
        while waiting:
            ticket, answer = await self._next()
            if isinstance(answer, Accepted):
                waiting -= 1
            else:
                self._early.append((ticket, answer))

    async def pieces(self) -> AsyncIterator[Piece]:
        """The text of all prompts as it comes, until every one has ended.

        Raises:
            ApiError: the engine failed.
            ClientGoneError: nobody waits for the answer.
        """
        running = len(self.parts)
        while running:
            ticket, answer = self._early.pop(0) if self._early else await self._next()
            part = self.parts[ticket.index]
            if not isinstance(answer, Event) or part.finish is not None:
                continue
            if self.first_token_seconds is None:
                self.first_token_seconds = self.seconds
            text = part.push(answer)
            if part.finish not in (None, "stop", "length"):
                raise ApiError(f"the engine ended the answer: {part.finish}", status=500)
            if part.finish is not None:
                running -= 1
                if answer.finish is None:
                    self._worker.cancel(ticket)
            if text or part.finish is not None:
                yield Piece(ticket.index, text, part.finish)

    def close(self) -> None:
        """Free what is held, however the reply ended."""
        self._cancel()
        if self._watch is not None:
            self._watch.cancel()

    def _cancel(self) -> None:
        for ticket in self.tickets:
            self._worker.cancel(ticket)

    async def _next(self) -> tuple[Ticket, Answer]:
        item = await self._inbox.get()
        if item is None:
            raise ClientGoneError
        if isinstance(item[1], Refused):
            raise refusal(item[1].message)
        if isinstance(item[1], Failed):
            raise ApiError(item[1].message, status=item[1].status)
        return item

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        # At once, and not when the next piece could be sent: a client may be slow to read as well.
        self._cancel()
        self._inbox.put_nowait(None)


def refusal(message: str) -> ApiError:
    """What the engine says about a request; its messages begin with the field."""
    word = message.split(maxsplit=1)[0].rstrip(":") if message else ""
    param = word if word in ("loops", "halting", "prompt") else None
    return ApiError(message, param=param, code="invalid_value")
