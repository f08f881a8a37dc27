"""Sends requests: an open loop that waits for nobody, and a closed loop of a fixed concurrency.

It knows a clock and a transport and nothing else, so that tests replace both and check its
arithmetic to the nanosecond.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gptjet.benchmarks.load.samples import INTERRUPTED, OK, UNFINISHED, WRONG_LENGTH, Sample
from gptjet.benchmarks.load.workload import PlannedRequest

_NS = 1_000_000_000
# A server that refuses at once would be asked as fast as the client can.
_PAUSE_AFTER_FAILURE_NS = 100_000_000


@dataclass(frozen=True, slots=True)
class Answered:
    """What a transport knows of a request that ended well."""

    prompt_tokens: int | None = None
    server: Mapping[str, float] | None = None


class RequestFailedError(Exception):
    """The request failed; `status` is the name of its gRPC status."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


class Transport(Protocol):
    """How a request gets to the server."""

    async def send(self, request: PlannedRequest, on_tokens: Callable[[int], None]) -> Answered:
        """Run a request to its end, calling `on_tokens` with a count as tokens arrive.

        Raises RequestFailedError.
        """
        ...


@dataclass(slots=True)
class Counters:
    """How far a run is."""

    sent: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0

    @property
    def in_flight(self) -> int:
        """Sent and not answered yet."""
        return self.sent - self.done


class Generator:
    """One run of one process. `samples` has every request that was sent, in the order they ended.

    transport  sends
    start_ns   the run's time 0 on `clock`; may lie in the future
    drain_s    how long requests may still take once nothing more is sent
    """

    def __init__(
        self,
        transport: Transport,
        *,
        start_ns: int,
        drain_s: float,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.samples: list[Sample] = []
        self.counters = Counters()
        self.is_stopped = False
        self._transport = transport
        self._start_ns = start_ns
        self._drain_s = drain_s
        self._clock = clock
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[object]] = set()
        self._error: BaseException | None = None

    def stop(self) -> None:
        """End the run now: nothing more is sent, and what is running is interrupted."""
        self.is_stopped = True
        self._stop.set()

    async def run_open(self, plan: Iterable[PlannedRequest]) -> None:
        """Send each request at its intended time, however many are still running."""
        for request in plan:
            assert request.intended_ns is not None, "an open loop plans times"
            await self._sleep_until(request.intended_ns)
            if self.is_stopped:
                break
            self._start(self._send(request, request.intended_ns))
            # A dispatcher that is behind must still let what it started get to the network.
            await asyncio.sleep(0)
        await self._drain()

    async def run_closed(
        self, plan: Iterable[PlannedRequest], concurrency: int, duration_s: float | None
    ) -> None:
        """Keep `concurrency` requests running until the plan or the time is over."""
        requests = iter(plan)
        end_ns = None if duration_s is None else round(duration_s * _NS)
        for _ in range(concurrency):
            self._start(self._keep_one_running(requests, end_ns))
        if end_ns is None:
            await self._wait_for_tasks(None)
        else:
            await self._sleep_until(end_ns)
        await self._drain()

    async def _keep_one_running(
        self, requests: Iterator[PlannedRequest], end_ns: int | None
    ) -> None:
        await self._sleep_until(0)
        while not self.is_stopped:
            now_ns = self._now()
            if end_ns is not None and now_ns >= end_ns:
                return
            request = next(requests, None)
            if request is None:
                return
            status = await self._send(request, None)
            if status in (INTERRUPTED, UNFINISHED):
                return
            if status != OK:
                await self._sleep_until(self._now() + _PAUSE_AFTER_FAILURE_NS)

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[object]) -> None:
        """Forget the task; where it broke, which no answer of a server can do, end the run."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = error
            self.stop()

    async def _send(self, request: PlannedRequest, intended_ns: int | None) -> str:
        """Run one request, record it and return its status."""
        sent_ns = self._now()
        arrivals: list[tuple[int, int]] = []
        received = 0

        def on_tokens(count: int) -> None:
            nonlocal received
            arrivals.append((self._now(), count))
            received += count
            self.counters.tokens += count

        self.counters.sent += 1
        answered = Answered()
        try:
            answered = await self._transport.send(request, on_tokens)
            status = OK if received == request.output_tokens else WRONG_LENGTH
        except RequestFailedError as error:
            status = error.status
        except asyncio.CancelledError:
            # By `_drain` alone, which waits for this record of it.
            status = INTERRUPTED if self.is_stopped else UNFINISHED
        self.counters.done += 1
        self.counters.failed += status != OK
        self.samples.append(
            Sample(
                index=request.index,
                intended_ns=sent_ns if intended_ns is None else intended_ns,
                sent_ns=sent_ns,
                ended_ns=self._now(),
                arrivals=tuple(arrivals),
                status=status,
                prompt_tokens=request.prompt_tokens or answered.prompt_tokens,
                asked_tokens=request.output_tokens,
                was_cut=request.was_cut,
                server=answered.server,
            )
        )
        return status

    async def _drain(self) -> None:
        """Give what is running its time, then cancel it."""
        await self._wait_for_tasks(0.0 if self.is_stopped else self._drain_s)
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._error is not None:
            raise self._error

    async def _wait_for_tasks(self, timeout_s: float | None) -> None:
        """Until all have ended, the time is over, or the run is stopped."""
        if not self._tasks:
            return
        everything = asyncio.ensure_future(asyncio.wait(set(self._tasks)))
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait(
            {everything, stopped}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        for future in (everything, stopped):
            future.cancel()
        await asyncio.gather(everything, stopped, return_exceptions=True)

    async def _sleep_until(self, when_ns: int) -> None:
        """Until that time of the run, or until it is stopped."""
        while not self.is_stopped:
            left_ns = when_ns - self._now()
            if left_ns <= 0:
                return
            try:
                await asyncio.wait_for(self._stop.wait(), left_ns / _NS)
            except TimeoutError:
                continue

    def _now(self) -> int:
        return self._clock() - self._start_ns
