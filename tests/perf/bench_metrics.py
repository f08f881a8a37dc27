"""What metrics cost, by themselves: counting a step, in the engine thread, and a request's end.

`bench_decode_step` has the whole step with metrics on and off: on a busy machine their difference
drowns in the step. Here the counting alone runs in a tight loop on one core, and the least of many
rounds is what it costs (`least_us`); what other processes take only ever adds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gptjet.service.engine.backend import Phase
from gptjet.service.engine.observer import StepWatch
from gptjet.service.engine.request import FinishReason
from gptjet.service.observability.metrics import Metrics

# Few enough that some rounds are not interrupted.
_CALLS = 20
_STEP_NS = 10_000_000


@pytest.fixture(autouse=True)
def _on_one_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


def _repeated(
    bench: Any, benchmark: Any, call: Callable[[], None], check: Callable[[], None]
) -> None:
    def work() -> None:
        for _ in range(_CALLS):
            call()

    bench(work, check)
    if benchmark.stats is not None:
        benchmark.extra_info["least_us"] = round(benchmark.stats.stats.min / _CALLS * 1e6, 3)


def _count(metrics: Metrics, name: str) -> float:
    return sum(
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"gptjet_{name}"
    )


@pytest.mark.parametrize("streams", [1, 8, 32])
def bench_counting_a_decode_step(bench: Any, benchmark: Any, streams: int) -> None:
    """All that a step with metrics does more than one without."""
    metrics = Metrics(("Generate",))
    watch = StepWatch(metrics)
    last_ns = time.monotonic_ns() - _STEP_NS
    sequences: Any = [SimpleNamespace(last_token_ns=last_ns, index=0) for _ in range(streams)]
    batch: Any = SimpleNamespace(phase=Phase.DECODE, sequences=sequences)

    def count() -> None:
        watch.begin()
        watch.note_batch(batch)
        now_ns = last_ns + _STEP_NS
        for sequence in sequences:
            watch.note_tokens(sequence, 1, now_ns)
        watch.end()

    def check() -> None:
        before = _count(metrics, "inter_token_latency_seconds_sum")
        count()
        added = _count(metrics, "inter_token_latency_seconds_sum") - before
        assert added == pytest.approx(streams * _STEP_NS / 1e9)
        assert _count(metrics, "generated_tokens_total") == streams

    _repeated(bench, benchmark, count, check)


def bench_counting_a_request(bench: Any, benchmark: Any) -> None:
    """Once a request, in the event loop: prometheus_client's own counters and their locks."""
    metrics = Metrics(("Generate",))
    sequence: Any = SimpleNamespace(completion_tokens=16)
    summary: Any = SimpleNamespace(
        finish_reason=FinishReason.LENGTH,
        prompt_tokens=32,
        completion_tokens=16,
        cached_prompt_tokens=0,
        sequences=(sequence,),
        speculation=None,
        timings=SimpleNamespace(queue_ms=1.0, prefill_ms=20.0, decode_ms=150.0, e2e_ms=171.0),
    )

    def count() -> None:
        metrics.rpc_started()
        metrics.request_ended(None, summary)  # type: ignore[arg-type]
        metrics.rpc_ended("Generate", "OK", 0.171, counted=True)
        metrics.rpc_refused(None)

    def check() -> None:
        count()
        assert _count(metrics, "requests_finished_total") == 1
        assert _count(metrics, "rpcs_active") == 0

    _repeated(bench, benchmark, count, check)
