"""What the engine has accepted and not ended: counted, bounded, and not left waiting for ever."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

from gptjet.service.engine.errors import QueueFullError, TokensInFlightError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptjet.service.engine.config import EngineConfig
    from gptjet.service.engine.request import Request
    from gptjet.service.engine.score import ScoreRequest

_RETRY_AFTER_S = 1.0

_Submitted = TypeVar("_Submitted")


class Admission(Generic[_Submitted]):
    """The requests between `submit` and their end; belongs to one event loop.

    At most `max_queue_size` of them wait, and all of them together may become at most
    `max_tokens_in_flight` tokens; one that is larger than that by itself is accepted when there is
    no other. `on_late` is called for one that waits longer than `max_queue_time_s`.
    """

    def __init__(self, config: EngineConfig, on_late: Callable[[_Submitted], None]) -> None:
        self._config = config
        self._on_late = on_late
        self._tokens: dict[_Submitted, int] = {}
        self._timers: dict[_Submitted, asyncio.TimerHandle] = {}  # of those that wait
        self.tokens_in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def num_waiting(self) -> int:
        """Requests of which nothing has run yet."""
        return len(self._timers)

    @property
    def num_running(self) -> int:
        """Requests of which at least one step has run."""
        return len(self._tokens) - len(self._timers)

    @property
    def all(self) -> list[_Submitted]:
        """Every request, in the order of arrival."""
        return list(self._tokens)

    def is_waiting(self, submitted: _Submitted) -> bool:
        """Whether nothing of it has run yet, as far as this side knows."""
        return submitted in self._timers

    def check(self, num_tokens: int) -> None:
        """Raise QueueFullError or TokensInFlightError if one more is too many."""
        config = self._config
        if self.num_waiting >= config.max_queue_size:
            raise QueueFullError(config.max_queue_size, _RETRY_AFTER_S)
        limit = config.max_tokens_in_flight
        if self._tokens and self.tokens_in_flight + num_tokens > limit:
            raise TokensInFlightError(num_tokens, self.tokens_in_flight, limit, _RETRY_AFTER_S)

    def add(self, submitted: _Submitted, num_tokens: int) -> None:
        """Note a request that may become `num_tokens` tokens."""
        self._tokens[submitted] = num_tokens
        self.tokens_in_flight += num_tokens
        self._timers[submitted] = asyncio.get_running_loop().call_later(
            self._config.max_queue_time_s, self._on_late, submitted
        )
        self.idle.clear()

    def start(self, submitted: _Submitted) -> None:
        """Note that something of it has run. Fine to say again."""
        timer = self._timers.pop(submitted, None)
        if timer is not None:
            timer.cancel()

    def end(self, submitted: _Submitted) -> None:
        """Note that it has ended. Fine to say again."""
        self.start(submitted)
        self.tokens_in_flight -= self._tokens.pop(submitted, 0)
        if not self._tokens:
            self.idle.set()


def tokens_of(request: Request) -> int:
    """Most tokens a request can become: its prompt once, and every continuation."""
    params = request.sampling_params
    return len(request.prompt_token_ids) + params.n * params.max_new_tokens


def tokens_of_score(request: ScoreRequest) -> int:
    """Tokens of a score request's prompts, each with every candidate."""
    prompts = sum(len(prompt) for prompt in request.prompts)
    return prompts + len(request.prompts) * request.candidate_tokens
