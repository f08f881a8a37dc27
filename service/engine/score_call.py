"""A score request on the asyncio side."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gptjet.service.engine.request import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptjet.service.engine.score import ScoreOutcome, ScoreRequest


class ScoreCall:
    """A score request that `AsyncEngine.submit_score` has queued.

    It belongs to the event loop that submitted the request. Whoever leaves before the outcome is
    there must `cancel`.
    """

    def __init__(
        self, request: ScoreRequest, on_cancel: Callable[[ScoreCall, FinishReason], None]
    ) -> None:
        self.request = request
        self._on_cancel = on_cancel
        self._outcome: asyncio.Future[ScoreOutcome] = asyncio.get_running_loop().create_future()

    async def outcome(self) -> ScoreOutcome:
        """Wait for the end of the request, however it ends."""
        return await asyncio.shield(self._outcome)

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Stop the request within one step; `outcome` still comes. Fine for a finished one."""
        if not self._outcome.done():
            self._on_cancel(self, reason)

    def deliver(self, outcome: ScoreOutcome) -> None:
        """For the engine: the end of the request."""
        if not self._outcome.done():
            self._outcome.set_result(outcome)
