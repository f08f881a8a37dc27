"""Runs the page on a socket until a signal says stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_BACKLOG = 128
# Answers that run are cut off at once; this is for what does not notice.
_GRACE_S = 3


class PageServer(uvicorn.Server):
    """uvicorn, told to stop by `stop` and not by signals of its own.

    It would deliver a signal once more after it has stopped, and the exit code would be that of a
    process that was killed.
    """

    def __init__(self, app: ASGIApp, on_started: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                # A client's address is that of its connection: a header could name any.
                proxy_headers=False,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started:
            self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """None: see `stopped_by_signals`."""
        yield

    def stop(self) -> None:
        """End running answers and stop; through `handle_exit`, which sse-starlette listens to."""
        self.handle_exit(signal.SIGTERM, None)


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Generator[None, None, None]:
    """Call `stop` on SIGTERM and Ctrl-C while the block runs; for the event loop's main thread."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def address(host: str, port: int) -> str:
    """What a browser on this machine opens."""
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(host)
        if ip.is_unspecified:
            host = "127.0.0.1" if ip.version == 4 else "::1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
