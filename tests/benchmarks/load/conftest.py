"""An event loop whose time is calculated, and a server whose latency is known to the nanosecond."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from gptjet.benchmarks.load.generator import Answered, Generator, RequestFailedError
from gptjet.benchmarks.load.workload import PlannedRequest

MS = 1_000_000
SECOND = 1000 * MS


class VirtualSelector(selectors.SelectSelector):
    """Waits for nothing: the time it would have waited passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or not timeout:
            assert ready or timeout is not None, "everything waits for ever"
            return ready
        self.now_ns += round(timeout * 1e9)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio on a clock that jumps to the next timer. `block` is a callback that takes long."""

    def __init__(self) -> None:
        self.virtual = VirtualSelector()
        super().__init__(self.virtual)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.virtual.now_ns / 1e9

    def time_ns(self) -> int:
        return self.virtual.now_ns

    def block(self, ns: int) -> None:
        self.virtual.now_ns += ns


class SimulatedServer:
    """First token after `prefill_ms`, one each `decode_ms` after it.

    one_at_a_time  requests wait for one another, as on a server with a single slot
    fails          index -> status of requests that are refused at once
    """

    def __init__(
        self,
        prefill_ms: float = 100,
        decode_ms: float = 20,
        *,
        one_at_a_time: bool = False,
        fails: dict[int, str] | None = None,
        tokens_a_message: int = 1,
    ) -> None:
        self.prefill_ms = prefill_ms
        self.decode_ms = decode_ms
        self.sent: list[tuple[int, PlannedRequest]] = []
        self.running = self.most_running = 0
        self._slot = asyncio.Semaphore(1) if one_at_a_time else None
        self._fails = fails or {}
        self._tokens_a_message = tokens_a_message

    async def send(self, request: PlannedRequest, on_tokens: Callable[[int], None]) -> Answered:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.sent.append((loop.time_ns(), request))
        if request.index in self._fails:
            raise RequestFailedError(self._fails[request.index])
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self._slot is not None:
                async with self._slot:
                    await self._stream(request, on_tokens)
            else:
                await self._stream(request, on_tokens)
        finally:
            self.running -= 1
        return Answered(7, {"queue_ms": 1.0})

    async def _stream(self, request: PlannedRequest, on_tokens: Callable[[int], None]) -> None:
        await asyncio.sleep(self.prefill_ms / 1000)
        left = request.output_tokens
        while left:
            count = min(left, self._tokens_a_message)
            on_tokens(count)
            left -= count
            if left:
                await asyncio.sleep(self.decode_ms / 1000)


Script = Callable[[VirtualLoop], Coroutine[Any, Any, Any]]


def run_virtually(script: Script) -> Any:
    """Run a coroutine to its end on a clock that starts at 0."""
    loop = VirtualLoop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(script(loop))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


@pytest.fixture
def virtually() -> Callable[[Script], Any]:
    return run_virtually


@pytest.fixture
def simulated_server() -> type[SimulatedServer]:
    return SimulatedServer


@pytest.fixture
def make_generator() -> Callable[..., Generator]:
    """A generator on a virtual loop's clock, started at 0."""

    def make(loop: VirtualLoop, transport: Any, drain_s: float = 30.0) -> Generator:
        return Generator(transport, start_ns=0, drain_s=drain_s, clock=loop.time_ns)

    return make


@pytest.fixture
def plan_at() -> Callable[..., list[PlannedRequest]]:
    """Requests intended at these ms (None: closed loop), of so many output tokens."""

    def plan(*times_ms: float | None, output_tokens: int = 3) -> list[PlannedRequest]:
        return [
            PlannedRequest(index, None if ms is None else round(ms * MS), (1, 2), 2, output_tokens)
            for index, ms in enumerate(times_ms)
        ]

    return plan
