"""A limit for the bodies of requests."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loopwise.decode.server.protocol import ApiError


class BodyLimit:
    """ASGI middleware that reads a body before the application does, and answers 413 where it is too large.

    The limit of FastAPI answers in plain text, whatever form the application's errors have.

    Args:
        app: the application.
        limit: in bytes.
    """

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, then pass on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = bytearray(), True
        while more and len(body) <= self.limit and int(declared) <= self.limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if more or len(body) > self.limit:
            error = ApiError(f"the body is over the limit of {self.limit} bytes", status=413, code="body_too_large")
            return await JSONResponse(error.body, status_code=413)(scope, receive, send)
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, again, send)
