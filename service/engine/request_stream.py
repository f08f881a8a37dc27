"""The outputs of one request on the asyncio side, bounded for a caller who reads slowly."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from gptjet.service.engine.request import FinishReason, Request, RequestOutput

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

# Outputs that wait to be read, for each sequence of the request, before further ones are joined to
# them; a reader that keeps up has one or two waiting. And the most tokens that are joined, since
# each joining copies what is there.
_JOIN_FROM = 64
_MOST_JOINED_TOKENS = 64


class RequestStream:
    """The outputs of one request, as they come. Iterate it once; `aclose` or `cancel` to leave.

    It belongs to the event loop that submitted the request. Outputs of a sequence that its reader
    is behind with are joined: fewer and longer ones, with nothing lost. `unread_tokens` are those
    that wait to be read; `watch_unread` says when there are too many.
    """

    def __init__(self, request: Request, on_cancel: Callable[[RequestStream, FinishReason], None]):
        self.request = request
        self.unread_tokens = 0
        self._on_cancel = on_cancel
        self._outputs: deque[RequestOutput] = deque()
        self._arrived = asyncio.Event()
        self._ended = False
        self._closed = False
        self._max_unread_tokens = sys.maxsize
        self._on_too_many: Callable[[], None] | None = None

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._outputs:
            if self._ended or self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        output = self._outputs.popleft()
        self.unread_tokens -= len(output.token_ids)
        return output

    def watch_unread(self, max_unread_tokens: int, on_too_many: Callable[[], None]) -> None:
        """Call `on_too_many` with every output that finds more than `max_unread_tokens` waiting."""
        self._max_unread_tokens, self._on_too_many = max_unread_tokens, on_too_many

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Stop the request within one step; the stream still delivers its summary."""
        if not self._ended:
            self._on_cancel(self, reason)

    async def aclose(self) -> None:
        """Leave: cancel if unfinished, and drop what has not been read; the iteration ends."""
        self.cancel()
        self._closed = True
        self._outputs.clear()
        self._arrived.set()

    def deliver(self, output: RequestOutput) -> None:
        """For the engine: append an output, and end the stream with the one that has a summary.

        What comes after the end is dropped.
        """
        if self._ended:
            return
        if not self._closed:  # else what comes late would follow a gap
            self._append(output)
        self._ended = output.summary is not None
        self._arrived.set()

    def _append(self, output: RequestOutput) -> None:
        self.unread_tokens += len(output.token_ids)
        place = self._place_to_join(output)
        if place is None:
            self._outputs.append(output)
        else:
            self._outputs[place] = _join(self._outputs[place], output)
        if self.unread_tokens > self._max_unread_tokens and self._on_too_many is not None:
            self._on_too_many()

    def _place_to_join(self, output: RequestOutput) -> int | None:
        """Index of the waiting output that this one may be joined to; None: it stands by itself.

        An echoed prompt and the end of a sequence do, the summary with it.
        """
        waiting = self._outputs
        num_sequences = self.request.sampling_params.n
        if len(waiting) < _JOIN_FROM * num_sequences:
            return None
        if output.is_prompt or output.finish_reason is not None:
            return None
        # The sequences of a request take their steps together or in turns, so the last one of this
        # sequence is near the end.
        for back in range(1, min(len(waiting), 2 * num_sequences) + 1):
            last = waiting[-back]
            if last.index == output.index:
                fits = not last.is_prompt and len(last.token_ids) < _MOST_JOINED_TOKENS
                return len(waiting) - back if fits else None
        return None


def _join(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    return replace(
        first,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
    )
