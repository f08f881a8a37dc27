"""Runs a load: starts the worker processes together, follows them, and collects what they saw."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptjet.benchmarks.environment import utc_now
from gptjet.benchmarks.load.generator import Counters
from gptjet.benchmarks.load.histogram import Histogram
from gptjet.benchmarks.load.run_spec import RunSpec
from gptjet.benchmarks.load.samples import Sample
from gptjet.benchmarks.load.validity import WorkerHealth

_MODULE = "gptjet.benchmarks.load.worker"
# All workers have read the start before it comes.
_HEAD_START_NS = 100_000_000
# One line holds one request with every token's time.
_LINE_LIMIT_BYTES = 64 * 2**20


class LoadError(Exception):
    """The run could not be made; the message is one line for a person."""


class InterruptedBeforeStartError(LoadError):
    """A person ended the run while it was warming up: there is nothing to report."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run saw. `is_partial`: a person ended it. `window_ns` is what rates are counted over.

    The window is the time in which requests were intended, or, where their number was given or the
    run was ended early, the time until the last one ended.
    """

    spec: RunSpec
    started_at: str
    samples: tuple[Sample, ...]
    workers: tuple[WorkerHealth, ...]
    window_ns: int
    is_partial: bool


class StopRequest:
    """Ctrl-C and SIGTERM, as something a run can wait for; a second one ends the program."""

    def __init__(self) -> None:
        self.is_set = False
        self._event = asyncio.Event()

    def set(self) -> None:
        """Ask the run to end."""
        self.is_set = True
        self._event.set()

    async def wait(self) -> None:
        """Until it is asked for."""
        await self._event.wait()

    @contextlib.contextmanager
    def on_signals(self) -> Any:
        """While inside, the first SIGINT or SIGTERM asks, and the second is Python's again."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)

        def handle() -> None:
            self.set()
            for number in signals:
                loop.remove_signal_handler(number)

        for number in signals:
            loop.add_signal_handler(number, handle)
        try:
            yield self
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


async def run_load(
    spec: RunSpec,
    stop: StopRequest,
    on_progress: Callable[[Counters, float], None] = lambda *_: None,
) -> RunResult:
    """Make one run. `on_progress` gets the sum over all workers and the seconds since the start.

    Raises LoadError where a worker cannot do its part: no server, a file that cannot be read.
    """
    workers = [_Worker(index) for index in range(spec.processes)]
    follower: asyncio.Task[None] | None = None
    try:
        await asyncio.gather(*(worker.start(spec) for worker in workers))
        ready = asyncio.gather(*(worker.wait_until_ready() for worker in workers))
        stopped = asyncio.ensure_future(stop.wait())
        both: set[asyncio.Future[Any]] = {ready, stopped}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not ready.done():
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)
            raise InterruptedBeforeStartError("interrupted before the first request")
        await ready
        start_ns = time.monotonic_ns() + _HEAD_START_NS
        started_at = utc_now()
        for worker in workers:
            worker.tell({"start_ns": start_ns})

        def report() -> None:
            on_progress(_sum(worker.counters for worker in workers), _since_s(start_ns))

        follower = asyncio.create_task(_pass_on(stop, workers))
        await asyncio.gather(*(worker.follow(report) for worker in workers))
    finally:
        if follower is not None:
            follower.cancel()
        await asyncio.gather(*(worker.end() for worker in workers))
    samples = sorted((s for worker in workers for s in worker.samples), key=lambda s: s.index)
    is_partial = any(worker.is_stopped for worker in workers)
    return RunResult(
        spec,
        started_at,
        tuple(samples),
        tuple(worker.health for worker in workers if worker.health is not None),
        _window_ns(spec, samples, is_partial),
        is_partial,
    )


def _window_ns(spec: RunSpec, samples: list[Sample], is_partial: bool) -> int:
    workload = spec.workload
    is_timed = workload.duration_s is not None and not workload.trace_file
    if is_timed and workload.requests is None and not is_partial:
        return round((workload.duration_s or 0) * 1e9)
    return max((sample.ended_ns for sample in samples), default=0)


async def _pass_on(stop: StopRequest, workers: list[_Worker]) -> None:
    await stop.wait()
    for worker in workers:
        worker.tell({"stop": True})


def _sum(counters: Any) -> Counters:
    total = Counters()
    for each in counters:
        total.sent += each.sent
        total.done += each.done
        total.failed += each.failed
        total.tokens += each.tokens
    return total


def _since_s(start_ns: int) -> float:
    return max(0.0, (time.monotonic_ns() - start_ns) / 1e9)


class _Worker:
    """One worker process as the parent sees it."""

    def __init__(self, index: int) -> None:
        self.counters = Counters()
        self.samples: list[Sample] = []
        self.health: WorkerHealth | None = None
        self.is_stopped = False
        self._index = index
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, spec: RunSpec) -> None:
        """Start it and give it the spec."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", _MODULE),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT_BYTES,
            # Ctrl-C is the parent's: it asks the workers for what they have.
            start_new_session=True,
            # gRPC's own log repeats what its errors say.
            env={"GRPC_VERBOSITY": "NONE"} | os.environ,
        )
        self.tell({"spec": spec.to_json(), "worker": self._index})

    def tell(self, command: dict[str, Any]) -> None:
        """Send it a line; one that has ended already needs none."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._process.stdin.write(json.dumps(command).encode() + b"\n")

    async def wait_until_ready(self) -> None:
        """Until it is connected and warm. Raises LoadError."""
        if (await self._read())["kind"] != "ready":
            raise LoadError("a worker process began before it was asked to")

    async def follow(self, on_progress: Callable[[], None]) -> None:
        """Until it has reported everything. Raises LoadError."""
        while self.health is None:
            fields = await self._read()
            match fields["kind"]:
                case "sample":
                    self.samples.append(Sample.from_json(fields))
                case "progress":
                    self._count(fields)
                    on_progress()
                case "end":
                    self._count(fields)
                    self.is_stopped = fields["is_stopped"]
                    lag_ns = Histogram.from_json(fields["lag_ns"])
                    self.health = WorkerHealth(lag_ns, fields["cpu_share"])

    async def end(self) -> None:
        """Have it end, by force if need be."""
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.communicate(), timeout=10)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _count(self, fields: dict[str, Any]) -> None:
        names = ("sent", "done", "failed", "tokens")
        self.counters = Counters(**{name: fields[name] for name in names})

    async def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            words = (await self._process.stderr.read()).decode(errors="replace").strip()
            last = words.splitlines()[-1] if words else "it said nothing"
            raise LoadError(f"a worker process ended: {last}")
        fields: dict[str, Any] = json.loads(line)
        if fields["kind"] == "error":
            raise LoadError(fields["message"])
        return fields
