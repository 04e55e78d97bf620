"""The ASGI application: routes, streams, and errors in OpenAI's form."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any, cast

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from loopwise.decode.server.forms import ChatForm, CompletionForm, Form
from loopwise.decode.server.front import Body, Front, Service
from loopwise.decode.server.limit import BodyLimit
from loopwise.decode.server.protocol import (
    ApiError,
    Chat,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    explained,
    sse,
)
from loopwise.decode.server.reply import ClientGoneError, Reply
from loopwise.decode.server.telemetry import CONTENT_TYPE, Counted

MAX_BODY_BYTES = 1_000_000
_BODIES = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM = {"text/event-stream": {"schema": _EVENT}}


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service."""
    front = Front(service)
    app = FastAPI(
        title="loopwise",
        lifespan=front.lifespan,
        docs_url=None,  # the page loads scripts from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.state.front = front
    app.add_middleware(cast(Any, BodyLimit), limit=MAX_BODY_BYTES)
    app.add_middleware(cast(Any, Counted), metrics=front.metrics, paths=(*_BODIES, "/v1/models", "/health", "/metrics"))
    _add_errors(app)
    _add_status(app, front)

    @app.post("/v1/completions", response_model=Completion, responses={200: {"content": _STREAM}})
    async def completions(body: CompletionRequest, http: HttpRequest) -> Any:
        """Continue one prompt or several."""
        return await _answer(front, body, http, CompletionForm(service.name))

    @app.post("/v1/chat/completions", response_model=Chat, responses={200: {"content": _STREAM}})
    async def chat(body: ChatRequest, http: HttpRequest) -> Any:
        """Answer a chat."""
        return await _answer(front, body, http, ChatForm(service.name))

    return app


def _add_status(app: FastAPI, front: Front) -> None:
    service = front.service

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """Name the model that is served."""
        engine = service.engine
        card = ModelCard(
            id=service.name,
            created=front.created,
            plan=service.plan,
            max_model_len=engine.capacity,
            max_loops=engine.max_loops or None,
        )
        return ModelList(data=[card])

    @app.get("/health", response_model=Health)
    async def health() -> Health:
        """Say whether the engine's thread works."""
        if not front.worker.is_alive:
            raise ApiError("the engine has stopped", status=503)
        return Health()

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Give counters in the text form of Prometheus."""
        return Response(front.metrics.text(), media_type=CONTENT_TYPE)


def _add_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status)

    @app.exception_handler(ApiError)
    async def of_ours(http: HttpRequest, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(ClientGoneError)
    async def gone(http: HttpRequest, error: ClientGoneError) -> Response:
        return Response(status_code=499)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, error: RequestValidationError) -> Response:
        return answer(explained(error.errors(), _BODIES.get(http.scope["path"])))

    @app.exception_handler(HTTPException)
    async def of_http(http: HttpRequest, error: HTTPException) -> Response:
        known = {
            400: ("the body is not JSON in UTF-8", "invalid_json"),
            404: (f"there is no {http.scope['path'][:100]} here", "not_found"),
            405: (f"{http.method} is not for {http.scope['path'][:100]}", "method_not_allowed"),
        }
        message, code = known.get(error.status_code, (str(error.detail), None))
        made = answer(ApiError(message, status=error.status_code, code=code))
        made.headers.update(error.headers or {})
        return made

    @app.exception_handler(Exception)
    async def unexpected(http: HttpRequest, error: Exception) -> Response:
        return answer(ApiError("the server failed", status=500))


class EventStream(Response):
    """Sends what an iterator gives as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]):
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send; a client that has gone ends it without a word."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with contextlib.suppress(ClientGoneError):
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _answer(front: Front, body: Body, http: HttpRequest, form: Form) -> Any:
    reply = await front.reply(body, http)
    if body.stream:
        return EventStream(_events(front, reply, form, body.includes_usage))
    texts = [""] * len(reply.parts)
    async with front.following(reply) as pieces:
        async for piece in pieces:
            texts[piece.index] += piece.text
    answer = form.whole(texts, [part.finish for part in reply.parts], front.usage(reply))
    return JSONResponse(answer.model_dump())


async def _events(front: Front, reply: Reply, form: Form, includes_usage: bool) -> AsyncGenerator[bytes]:
    usage: dict[str, Any] = {"usage": None} if includes_usage else {}
    shared = {**form.shared, "object": form.chunk_kind}
    try:
        async with front.following(reply) as pieces:
            for index in range(len(reply.parts)):
                if choices := form.first(index):
                    yield sse({**shared, "choices": choices, **usage})
            async for piece in pieces:
                yield sse({**shared, "choices": form.choices(piece), **usage})
        if includes_usage:
            yield sse({**shared, "choices": [], "usage": front.usage(reply).model_dump()})
    except ApiError as error:  # the status is sent already
        yield sse(error.body)
    yield sse("[DONE]")
