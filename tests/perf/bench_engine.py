"""One engine step over the mock backend: what scheduling, sampling and reporting cost a token."""

from __future__ import annotations

from typing import Any

import pytest

from gptjet.service.backends.mock import MockBackend, successor
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.observer import StepObserver
from gptjet.service.engine.request import SamplingParams, new_request
from gptjet.service.engine.scheduler import Scheduler
from gptjet.service.engine.tokenizer import ByteTokenizer
from gptjet.service.observability.metrics import Metrics

_CONTEXT = 1_000_000
_ENDLESS = SamplingParams(max_new_tokens=_CONTEXT - 1, ignore_eos=True)


def endless_engine(streams: int, observer: StepObserver | None = None) -> Engine:
    blocks = streams * _CONTEXT // 16 + streams
    backend = MockBackend(max_context=_CONTEXT, num_kv_blocks=blocks)
    engine = Engine(backend, ByteTokenizer(), observer=observer)
    for _ in range(streams):
        engine.add(new_request((ord("a"),), _ENDLESS))
    # Prefill and decode take turns until every stream runs.
    for _ in range(2 * streams + 1):
        engine.step()
    return engine


@pytest.mark.parametrize("metrics", [False, True], ids=["", "metrics"])
@pytest.mark.parametrize("streams", [1, 8, 64])
def bench_decode_step(bench: Any, streams: int, metrics: bool) -> None:
    """With metrics on and off: what counting costs a step."""
    engine = endless_engine(streams, Metrics() if metrics else None)

    def check() -> None:
        """Every stream gets the letter after its last one."""
        last = {s.sequence_id: s.last_token_id for s in engine.scheduler.running}
        outputs = engine.step()
        assert len(outputs) == streams == len(last)
        assert [s.last_token_id for s in engine.scheduler.running] == [
            successor(last[s.sequence_id]) for s in engine.scheduler.running
        ]

    bench(engine.step, check)


@pytest.mark.parametrize("streams", [1, 64])
def bench_schedule(bench: Any, streams: int) -> None:
    scheduler: Scheduler = endless_engine(streams).scheduler

    def check() -> None:
        batch = scheduler.schedule()
        assert batch is not None
        assert len(batch.sequences) == streams

    bench(scheduler.schedule, check)


def bench_a_request_from_start_to_end(bench: Any) -> None:
    engine = Engine(MockBackend(), ByteTokenizer())

    def run() -> list[str]:
        engine.add(new_request((ord("a"),), SamplingParams(max_new_tokens=16)))
        texts: list[str] = []
        while engine.has_work:
            texts += [output.text for _, output in engine.step()]
        return texts

    def check() -> None:
        assert "".join(run()) == "bcdefghijklmnopq"

    bench(run, check)
