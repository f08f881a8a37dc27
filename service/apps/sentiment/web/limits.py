"""How much one client may ask for: a token bucket for the rate, a count for what runs at a time."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gptjet.service.apps.sentiment.web.errors import PageError

_MAX_CLIENTS = 10_000


@dataclass(slots=True)
class _Budget:
    left: float
    at_s: float


class RateLimit:
    """A token bucket for each client, on the clock `now_s`.

    Of many clients only the latest are remembered: memory is bounded, and a client that was
    forgotten has a full budget again.
    """

    def __init__(
        self, per_minute: int, burst: int, *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_minute = per_minute
        self._burst = burst
        self._now_s = now_s
        self._budgets: OrderedDict[str, _Budget] = OrderedDict()

    def take(self, client: str, cost: int = 1) -> None:
        """Take `cost` from the client's budget. Raises PageError 429 where it is not there.

        What costs more than a full budget takes all of it.
        """
        now_s = self._now_s()
        budget = self._budgets.pop(client, None) or _Budget(float(self._burst), now_s)
        per_second = self._per_minute / 60
        budget.left = min(self._burst, budget.left + (now_s - budget.at_s) * per_second)
        budget.at_s = now_s
        self._budgets[client] = budget
        if len(self._budgets) > _MAX_CLIENTS:
            self._budgets.popitem(last=False)
        cost = min(cost, self._burst)
        if budget.left < cost:
            wait_s = math.ceil((cost - budget.left) / per_second)
            raise PageError(
                429,
                "too_many_requests",
                f"too many requests: {self._per_minute} a minute are allowed; "
                f"try again in {wait_s} s",
                retry_after_s=wait_s,
            )
        budget.left -= cost


class StreamLimit:
    """Counts answers that run at a time, in all and of each client."""

    def __init__(self, per_client: int, in_all: int) -> None:
        self._per_client = per_client
        self._in_all = in_all
        self._running: Counter[str] = Counter()

    @property
    def running(self) -> int:
        """Answers that run now."""
        return self._running.total()

    @property
    def is_full(self) -> bool:
        """Whether nobody can start another answer."""
        return self.running >= self._in_all

    @contextlib.contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """Count one answer while the block runs. Raises PageError 429 or 503 at a limit."""
        if self._running[client] >= self._per_client:
            raise PageError(
                429,
                "too_many_streams",
                f"{self._per_client} answers are running for you already, which is the limit; "
                "stop one or wait for its end",
                retry_after_s=2.0,
            )
        if self.is_full:
            raise PageError(
                503,
                "busy",
                f"{self._in_all} answers are running already, which is the limit",
                retry_after_s=2.0,
            )
        self._running[client] += 1
        try:
            yield
        finally:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
