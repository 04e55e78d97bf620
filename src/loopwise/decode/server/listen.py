"""Listening: a socket, signals, and an end in good order."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import contextmanager

import uvicorn

from loopwise.decode.server.app import create_app
from loopwise.decode.server.front import Service


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody else has; port 0 takes a free one.

    Raises:
        ValueError: the port is taken, or the address is not one of this machine.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: from 1 to 65535, or 0 for a free one")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, proto)
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror or error}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return made


class _Server(uvicorn.Server):
    """Says when it is ready, and ends quietly when a signal asks it to."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], object]):
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self):
        with super().capture_signals():
            yield
            # Stopping was asked for and done: the signals are not raised once more.
            self._captured_signals.clear()


def make_server(service: Service, on_ready: Callable[[], object] = lambda: None) -> uvicorn.Server:
    """The HTTP server of a service; `run(sockets=[...])` serves until SIGINT, SIGTERM or `should_exit`.

    Args:
        service: what is served.
        on_ready: called once connections are taken.
    """
    config = uvicorn.Config(
        create_app(service),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=service.drain_seconds,
        # Longer than clients keep idle connections: else both may act at once, and a request is lost.
        timeout_keep_alive=75,
        lifespan="on",
    )
    return _Server(config, on_ready)


def run_server(service: Service, bound: socket.socket, on_ready: Callable[[str], object] = lambda url: None) -> None:
    """Serve until SIGINT or SIGTERM: requests that run are finished, at most `drain_seconds` long.

    Args:
        service: what is served.
        bound: see `bind`.
        on_ready: called with the address, such as http://127.0.0.1:8000, once connections are taken.
    """
    host, port = bound.getsockname()[:2]
    url = f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"
    make_server(service, lambda: on_ready(url)).run(sockets=[bound])
