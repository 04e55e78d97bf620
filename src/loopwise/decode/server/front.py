"""The event loop's side of a server: reads requests, follows their replies, counts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI
from fastapi.requests import Request as HttpRequest

from loopwise.decode.engine import Engine
from loopwise.decode.request import Request, check_fits
from loopwise.decode.server.protocol import COMPLETION_TOKENS, ApiError, ChatRequest, CompletionRequest, Usage, one_line
from loopwise.decode.server.reply import ClientGoneError, Piece, Reply, refusal
from loopwise.decode.server.telemetry import Metrics
from loopwise.decode.server.worker import Answer, Ticket, Worker

Body = CompletionRequest | ChatRequest


@dataclass(frozen=True, kw_only=True)
class Service:
    """What is served.

    Attributes:
        engine: used by one service only.
        tokenizer: of transformers.
        name: of the model, as clients call it.
        stop_ids: tokens that end an answer.
        plan: of the model, for those who ask which models there are.
        max_waiting: requests beyond those in slots; more are answered with 429.
        drain_seconds: how long requests that run may go on once the server is told to stop.
    """

    engine: Engine
    tokenizer: Any
    name: str
    stop_ids: tuple[int, ...] = ()
    plan: str | None = None
    max_waiting: int = 1024
    drain_seconds: int = 5


class Front:
    """The event loop's side of a service: reads requests, follows their replies, counts.

    Args:
        service: what is served.
    """

    def __init__(self, service: Service):
        self.service, self.worker = service, Worker(service.engine)
        self.metrics = Metrics(lambda: self.worker.stats)
        self.created = int(time.time())
        self._live = 0
        # Tokenizing a long text takes its time; one thread, because tokenizers are not made for several.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loopwise-tokenizer")

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the engine's thread while the application runs."""
        loop = asyncio.get_running_loop()

        def put(answers: Sequence[tuple[Ticket, Answer]]) -> None:
            for ticket, answer in answers:
                ticket.sink.put_nowait((ticket, answer))

        def deliver(answers: Sequence[tuple[Ticket, Answer]]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(put, answers)

        self.worker.start(deliver)
        yield
        await asyncio.to_thread(self.worker.stop)
        self._pool.shutdown(wait=False)

    async def prompts(self, body: Body) -> list[list[int]]:
        """Token ids of every prompt of a body."""
        if isinstance(body, ChatRequest):
            return [await self._in_pool(self._chat_ids, body)]
        return [item if isinstance(item, list) else await self._in_pool(self._text_ids, item) for item in body.prompts]

    async def reply(self, body: Body, http: HttpRequest) -> Reply:
        """A reply that the engine has taken.

        Raises:
            ApiError: the request cannot be served.
            ClientGoneError: nobody waits for it any more.
        """
        body.check(self.service.name)
        prompts = await self.prompts(body)
        limit = self.service.engine.max_requests + self.service.max_waiting
        if self._live + len(prompts) > limit:
            raise ApiError(f"{self._live} requests are waiting already: try again later", status=429, code="queue_full")
        requests = [self._request(body, prompt, index) for index, prompt in enumerate(prompts)]
        reply = Reply(self.worker, self.service.tokenizer, requests, body.stops, http.receive)
        self._live += len(requests)
        try:
            await reply.begin()
        except BaseException:
            self.end(reply, "refused")
            raise
        return reply

    def end(self, reply: Reply, outcome: str) -> None:
        """Free what a reply holds, and count it."""
        reply.close()
        self._live -= len(reply.parts)
        self.metrics.ended(reply, outcome)

    @asynccontextmanager
    async def following(self, reply: Reply) -> AsyncIterator[AsyncIterator[Piece]]:
        """The pieces of a reply; frees what it holds at the end, whatever the end is."""
        outcome = "error"
        try:
            yield reply.pieces()
            outcome = "done"
        except (ClientGoneError, asyncio.CancelledError):
            outcome = "disconnected"
            raise
        finally:
            self.end(reply, outcome)

    def usage(self, reply: Reply) -> Usage:
        """Its tokens."""
        prompt, new = reply.prompt_tokens, reply.num_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=new,
            total_tokens=prompt + new,
            mean_depth=round(reply.depths / new, 4) if new else None,
        )

    async def _in_pool(self, work: Callable[..., list[int]], *arguments: Any) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def _text_ids(self, text: str) -> list[int]:
        return list(self.service.tokenizer(text)["input_ids"])

    def _chat_ids(self, body: ChatRequest) -> list[int]:
        tokenizer = self.service.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ApiError("this model has no chat template: use /v1/completions", code="no_chat_template")
        # Templates know the older word for what a developer says.
        roles = {"developer": "system"}
        messages = [{"role": roles.get(m.role, m.role), "content": m.text} for m in body.messages]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of the model's makers and raises what it likes
            raise ApiError(f"messages: the chat template refuses them: {error}", param="messages") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _request(self, body: Body, prompt: list[int], index: int) -> Request:
        field = "messages" if isinstance(body, ChatRequest) else "prompt"
        room = self.service.engine.capacity - len(prompt)
        wanted = body.max_tokens
        if isinstance(body, ChatRequest):
            wanted = body.max_completion_tokens or body.max_tokens or max(1, room)
        elif wanted is None:
            wanted = max(1, min(COMPLETION_TOKENS, room))
        if not prompt:
            raise ApiError(f"{field}: no tokens, at least one is needed", param=field, code="invalid_value")
        if wanted > room:
            raise ApiError(
                f"{field} of {len(prompt)} tokens and {one_line(str(wanted), 20)} new ones are over the context limit "
                f"of {self.service.engine.capacity} tokens",
                param=field,
                code="context_length_exceeded",
            )
        sampling = body.sampling
        request = Request(
            prompt=prompt,
            max_new_tokens=wanted,
            # Every prompt of a list draws for itself, whether the seed is given or not.
            sampling=replace(sampling, seed=(sampling.seed + index + 2**63) % 2**64 - 2**63),
            stop_ids=self.service.stop_ids,
            loops=body.loops,
            halting=body.halting,
        )
        engine = self.service.engine
        try:  # the engine does so too; but the end of the prompt is decoded before it comes to that
            check_fits(
                request,
                capacity=engine.capacity,
                vocabulary=engine.vocabulary,
                max_loops=engine.max_loops,
                has_loop=engine.max_loops > 0,
            )
        except ValueError as error:
            raise refusal(str(error)) from None
        return request
