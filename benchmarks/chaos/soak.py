"""Twenty minutes at four fifths of the capacity: memory flat, latency steady, no error."""

from __future__ import annotations

import asyncio
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptjet.benchmarks.chaos.scenario import Findings, Plan
from gptjet.benchmarks.chaos.server import ChaosServer
from gptjet.benchmarks.load.coordinator import RunResult, StopRequest, run_load
from gptjet.benchmarks.load.run_spec import RunSpec
from gptjet.benchmarks.load.samples import Sample
from gptjet.benchmarks.load.workload import WorkloadSpec
from gptjet.service.client import Client

LOAD = 0.8
_PROMPT_TOKENS, _OUTPUT_TOKENS = "uniform:16,128", "uniform:16,96"
_CAPACITY_STREAMS, _CAPACITY_REQUESTS = 16, 400
_SAMPLE_EVERY_S = 5.0
# What allocators and caches fill at first is not a leak.
_SETTLING = 0.2
_GROWTH, _DRIFT = 0.02, 0.25
_MINUTE_NS = 60_000_000_000


@dataclass(frozen=True, slots=True)
class Minute:
    """What callers saw of the requests that were due in one minute."""

    requests: int
    failed: int
    ttft_p95_ms: float
    itl_p95_ms: float


def run(plan: Plan) -> Findings:
    """Find the capacity with a closed loop, then send that share of it as an open loop."""
    found = Findings()
    with ChaosServer("--log-level=warning") as server:
        with Client(server.target) as client:
            model = client.get_model()
        work = WorkloadSpec(
            vocab_size=model.vocab_size,
            max_context=model.max_context,
            eos_token_id=model.eos_token_id,
            prompt_tokens=_PROMPT_TOKENS,
            output_tokens=_OUTPUT_TOKENS,
            seed=plan.seed,
        )
        capacity = measure_capacity(server.target, work, plan)
        rate = LOAD * capacity
        duration_s = 60 * plan.soak_minutes
        plan.report(
            f"  capacity {capacity:.1f} requests/s; {rate:.1f} a second for {duration_s:g} s"
        )
        spec = RunSpec(
            target=server.target,
            workload=replace(work, rate=rate, duration_s=duration_s),
            timeout_s=60.0,
        )
        with MemoryWatch(server, _SAMPLE_EVERY_S) as watch:
            result = asyncio.run(_run(spec))
        held = server.wait_until_idle(10.0)
        minutes = minutes_of(result.samples)
        growth = memory_growth(watch.samples)
        found.figures = {
            "capacity_requests_per_s": round(capacity, 2),
            "rate_requests_per_s": round(rate, 2),
            "duration_s": duration_s,
            "requests": len(result.samples),
            "memory_mib": _thinned(watch.samples),
            "memory_growth": round(growth, 4),
            "minutes": [vars_of(minute) for minute in minutes],
        }
        _judge(found, result, minutes, growth, held)
        found.equal("exit code", server.stop(), 0)
    return found


def _judge(
    found: Findings,
    result: RunResult,
    minutes: Sequence[Minute],
    growth: float,
    held: dict[str, float],
) -> None:
    failed = sum(not sample.is_ok for sample in result.samples)
    found.equal("failed requests", failed, 0)
    found.at_most("memory's growth, by its trend", round(100 * growth, 2), 100 * _GROWTH, " %")
    for name in ("ttft_p95_ms", "itl_p95_ms"):
        drift = drift_of([getattr(minute, name) for minute in minutes])
        found.at_most(f"{name}: last third over first third", round(drift, 3), 1 + _DRIFT, "x")
    found.equal("held afterwards", sum(held.values()), 0)


def measure_capacity(target: str, work: WorkloadSpec, plan: Plan) -> float:
    """Requests a second of a closed loop that keeps the batch full, the same client beside it."""
    requests = plan.count(_CAPACITY_REQUESTS, least=4 * _CAPACITY_STREAMS)
    spec = RunSpec(
        target=target,
        workload=replace(work, closed=True, requests=requests),
        concurrency=_CAPACITY_STREAMS,
    )
    result = asyncio.run(_run(spec))
    return len(result.samples) / (result.window_ns / 1e9)


async def _run(spec: RunSpec) -> RunResult:
    return await run_load(spec, StopRequest())


class MemoryWatch:
    """Reads a server's resident memory at intervals, in a thread; a context manager."""

    def __init__(self, server: ChaosServer, every_s: float) -> None:
        self.samples: list[float] = []
        self._server, self._every_s = server, every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self._every_s) and self._server.is_alive():
            self.samples.append(self._server.memory_mib())


def minutes_of(samples: Sequence[Sample]) -> list[Minute]:
    """The samples by the minute in which they were due; a last minute that is not full is left."""
    if not samples:
        return []
    by_minute: dict[int, list[Sample]] = {}
    for sample in samples:
        by_minute.setdefault(sample.intended_ns // _MINUTE_NS, []).append(sample)
    last = max(sample.intended_ns for sample in samples)
    whole = max(1, round(last / _MINUTE_NS))
    return [
        Minute(
            requests=len(each),
            failed=sum(not sample.is_ok for sample in each),
            ttft_p95_ms=_p95_ms([s.ttft_ns for s in each if s.ttft_ns is not None]),
            itl_p95_ms=_p95_ms([gap for s in each for gap in s.itl_ns]),
        )
        for minute, each in sorted(by_minute.items())
        if minute < whole
    ]


def memory_growth(samples: Sequence[float]) -> float:
    """Share that memory grew by over the run, along the line through its samples (least squares).

    The first fifth is left out.
    """
    settled = samples[int(len(samples) * _SETTLING) :]
    if len(settled) < 2:
        return 0.0
    slope, start = statistics.linear_regression(range(len(settled)), settled)
    return slope * (len(settled) - 1) / start


def drift_of(values: Sequence[float]) -> float:
    """Median of the last third over that of the first."""
    third = max(1, len(values) // 3)
    first = statistics.median(values[:third]) if values else 0.0
    return statistics.median(values[-third:]) / first if first else 1.0


def vars_of(minute: Minute) -> dict[str, Any]:
    """A minute as plain data."""
    return {name: getattr(minute, name) for name in Minute.__slots__}


def _p95_ms(values_ns: Sequence[int]) -> float:
    if len(values_ns) < 2:
        return 0.0
    return round(statistics.quantiles(values_ns, n=20)[-1] / 1e6, 3)


def _thinned(samples: Sequence[float]) -> list[float]:
    step = max(1, len(samples) // 60)
    return [round(value, 1) for value in samples[::step]]
