"""How long a caller who does not read its stream is waited for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeAlias

from gptjet.service.engine.errors import SlowReaderError

if TYPE_CHECKING:
    import grpc

    from gptjet.service.config import ServerConfig
    from gptjet.service.engine.request_stream import RequestStream

# What is left to a write once too many tokens wait: it is over at once for a caller who reads,
# where it was this process that was busy.
_LAST_CHANCE_S = 1.0

# gRPC's class is generic in its stub only.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class PatientWriter:
    """Writes the messages of one stream.

    A write lasts as long as HTTP/2 flow control holds it back, which is for ever where the caller
    does not read. Meanwhile the engine goes on and its outputs wait in the RequestStream.
    """

    def __init__(self, context: _Context, stream: RequestStream, config: ServerConfig) -> None:
        self._context = context
        self._stream = stream
        self._config = config
        self._timeout: asyncio.Timeout | None = None
        self._reason = ""
        stream.watch_unread(config.max_unread_tokens, self._too_many)

    async def write(self, message: Any) -> None:
        """Send a message. Raises SlowReaderError when the caller has not read for too long."""
        limit_s = self._config.slow_reader_timeout_s
        self._reason = f"it took nothing for {limit_s:g} s (slow_reader_timeout_s)"
        try:
            async with asyncio.timeout(limit_s) as self._timeout:
                await self._context.write(message)
        except TimeoutError:
            raise SlowReaderError(self._reason) from None
        finally:
            self._timeout = None

    def _too_many(self) -> None:
        timeout, end = self._timeout, asyncio.get_running_loop().time() + _LAST_CHANCE_S
        if timeout is None or timeout.expired():
            return
        when = timeout.when()
        if when is not None and when > end:
            timeout.reschedule(end)
            self._reason = (
                f"more than {self._config.max_unread_tokens} tokens wait for it (max_unread_tokens)"
            )
