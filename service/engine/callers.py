"""Who waits for what the engine computes: its keys, and the streams and calls behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptjet.service.engine.request_stream import RequestStream

if TYPE_CHECKING:
    from gptjet.service.engine.faults import Outputs
    from gptjet.service.engine.request import Request, RequestOutput
    from gptjet.service.engine.score_call import ScoreCall


class Callers:
    """Belongs to the engine thread. A caller is in it while the engine knows its request."""

    def __init__(self) -> None:
        self._stream_of: dict[int, RequestStream] = {}
        self._key_of: dict[RequestStream | ScoreCall, int] = {}

    def __len__(self) -> int:
        return len(self._key_of)

    def add(self, key: int, caller: RequestStream | ScoreCall) -> None:
        """Note the engine's key for what it has taken."""
        self._key_of[caller] = key
        if isinstance(caller, RequestStream):
            self._stream_of[key] = caller

    def key_of(self, caller: RequestStream | ScoreCall) -> int | None:
        """None of one that was never added, or has ended."""
        return self._key_of.get(caller)

    def end(self, caller: RequestStream | ScoreCall) -> None:
        """Forget a caller; of one that is not in it nothing happens."""
        key = self._key_of.pop(caller, None)
        if isinstance(caller, RequestStream) and key is not None:
            del self._stream_of[key]

    def address(self, outputs: Outputs) -> list[tuple[RequestStream, RequestOutput]]:
        """The stream that each output is for; one whose last output is among them is forgotten."""
        addressed = []
        for key, output in outputs:
            stream = self._stream_of[key]
            addressed.append((stream, output))
            if output.summary is not None:
                self.end(stream)
        return addressed

    def not_told(self, outputs: Outputs) -> list[tuple[int, Request]]:
        """(key, request) of every stream whose end is not among the outputs."""
        told_of = {key for key, output in outputs if output.summary is not None}
        return [(k, s.request) for k, s in self._stream_of.items() if k not in told_of]
