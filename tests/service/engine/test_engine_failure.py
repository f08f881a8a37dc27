"""An engine that hangs, dies or fails for good: everybody is told, and nothing new is taken."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from gptjet.service.backends.mock import MockBackend
from gptjet.service.backends.mock_faults import FaultyMockBackend
from gptjet.service.backends.mock_settings import MockSettings
from gptjet.service.engine.async_engine import AsyncEngine
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.errors import (
    EngineStepError,
    EngineUnavailableError,
    QueueTimeError,
    TokensInFlightError,
)
from gptjet.service.engine.request import (
    FinishReason,
    Request,
    RequestSummary,
    SamplingParams,
    new_request,
)
from gptjet.service.engine.request_stream import RequestStream
from gptjet.service.engine.score import ScoreOutcome, ScoreRequest, new_score_request
from gptjet.service.engine.tokenizer import ByteTokenizer

PATIENCE_S = 20.0


async def start(backend: MockBackend, **config: Any) -> AsyncEngine:
    engine = AsyncEngine(backend, ByteTokenizer(), EngineConfig(**config))
    await engine.start()
    return engine


def request(prompt: str = "a", **params: Any) -> Request:
    return new_request(tuple(prompt.encode()), SamplingParams(**params))


def score_request() -> ScoreRequest:
    return new_score_request((ord("a"),), ((ord("b"),), (ord("c"),)))


async def end_of(stream: RequestStream) -> Exception | None:
    async with asyncio.timeout(PATIENCE_S):
        outputs = [output async for output in stream]
    assert outputs[-1].summary is not None
    return outputs[-1].error


def assert_everything_was_told(engine: AsyncEngine) -> None:
    assert engine.failed.is_set()
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    with pytest.raises(EngineUnavailableError, match="error id"):
        engine.submit(request())
    with pytest.raises(EngineUnavailableError, match="error id"):
        engine.submit_score(score_request())


class HangingBackend(MockBackend):
    """Decodes until `hang` is set or `hang_at` steps are made, and then waits for `go_on`."""

    def __init__(self, *, hang_at: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.hang, self.go_on = threading.Event(), threading.Event()
        self._steps_left = hang_at

    def decode(self, batch: Any) -> Any:
        if self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left == 0:
                self.hang.set()
        if self.hang.is_set():
            self.go_on.wait(PATIENCE_S)
        return super().decode(batch)


async def test_a_hung_step_is_told_to_all_callers_and_what_it_says_later_to_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = HangingBackend(max_sequences=1, decode_ms=20)
    engine = await start(backend, step_timeout_s=0.3)
    running = engine.submit(request(max_new_tokens=500))
    await anext(running)
    backend.hang.set()
    waiting, scoring = engine.submit(request()), engine.submit_score(score_request())
    in_step, in_queue = await end_of(running), await end_of(waiting)
    assert isinstance(in_step, EngineStepError)
    assert "(step_timeout_s)" in str(in_step)
    assert in_step.error_id in caplog.text
    assert "in decode" in caplog.text  # the stack
    assert isinstance(in_queue, EngineUnavailableError)  # may be tried elsewhere
    assert isinstance((await scoring.outcome()).error, EngineUnavailableError)
    assert_everything_was_told(engine)
    # A step that ends after all changes nothing any more, and stops no one who stops the engine.
    backend.go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        await engine.stop()
    assert [output async for output in running] == []


class Ends:
    """Counts what ends."""

    def __init__(self) -> None:
        self.reasons: list[FinishReason | None] = []

    def request_ended(self, _request: Request, summary: RequestSummary) -> None:
        self.reasons += [sequence.finish_reason for sequence in summary.sequences]

    def score_ended(self, _request: ScoreRequest, outcome: ScoreOutcome) -> None:
        self.reasons.append(outcome.finish_reason)


async def test_what_ends_after_its_engine_has_failed_is_counted_once() -> None:
    backend, ends = HangingBackend(hang_at=3), Ends()
    engine = AsyncEngine(
        backend, ByteTokenizer(), EngineConfig(step_timeout_s=0.3), request_observers=(ends,)
    )
    await engine.start()
    running = engine.submit(request(max_new_tokens=20))
    await anext(running)
    scoring = engine.submit_score(score_request())
    assert isinstance(await end_of(running), EngineStepError)
    assert (await scoring.outcome()).error is not None
    backend.hang.clear()
    backend.go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        while engine.engine.has_work:
            await asyncio.sleep(0.01)
        await engine.stop()
    await asyncio.sleep(0.1)  # for what the thread has said last
    assert ends.reasons == [FinishReason.ERROR] * 2
    assert engine._admission.tokens_in_flight == 0


async def test_a_hung_engine_can_be_stopped() -> None:
    backend = HangingBackend()
    engine = await start(backend, step_timeout_s=0.2)
    backend.hang.set()
    error = await end_of(engine.submit(request(max_new_tokens=9)))
    assert isinstance(error, EngineStepError)
    async with asyncio.timeout(PATIENCE_S):
        assert await engine.drain(1.0)
        await engine.stop()
    backend.go_on.set()


def test_whoever_gives_up_stopping_a_backend_that_does_not_close_can_go() -> None:
    """And so end a process."""
    close = threading.Event()

    class Backend(MockBackend):
        def close(self) -> None:
            close.wait(PATIENCE_S)

    async def give_up() -> None:
        engine = await start(Backend())
        assert await end_of(engine.submit(request())) is None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await engine.stop()

    asyncio.run(give_up())
    still_open = any(thread.name == "gptjet-engine" for thread in threading.enumerate())
    close.set()
    assert still_open


async def test_slow_steps_within_the_timeout_are_left_alone() -> None:
    engine = await start(MockBackend(decode_ms=150), step_timeout_s=1.0)
    assert await end_of(engine.submit(request(max_new_tokens=12))) is None
    assert not engine.failed.is_set()
    await engine.stop()


async def test_a_dead_engine_thread_leaves_nobody_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = FaultyMockBackend(MockSettings(die_at_step=20), max_sequences=1)
    engine = await start(backend)
    running = engine.submit(request(max_new_tokens=500))
    waiting = [engine.submit(request()) for _ in range(5)]
    error = await end_of(running)
    assert isinstance(error, EngineStepError)
    assert error.error_id in caplog.text
    assert "SystemExit" in caplog.text
    for stream in waiting:
        assert isinstance(await end_of(stream), EngineUnavailableError)
    assert_everything_was_told(engine)
    await engine.stop()


async def test_a_bug_that_ends_the_thread_between_steps_is_told_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = await start(MockBackend(decode_ms=1))

    def broken(*_: Any) -> Any:
        raise KeyError("a bug where none can be")

    stream = engine.submit(request(max_new_tokens=500))
    await anext(stream)
    monkeypatch.setattr(Engine, "cancel", broken)
    stream.cancel()
    assert isinstance(await end_of(stream), EngineStepError)
    assert_everything_was_told(engine)
    await engine.stop()


async def test_a_bug_in_a_step_that_ended_a_request_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine knows that request no more, and the outputs of the step are lost."""
    engine = await start(MockBackend(decode_ms=1))
    advance = engine.engine._advance

    def broken() -> Any:
        outputs = advance()
        if any(output.summary is not None for _, output in outputs):
            raise KeyError("a bug where none can be")
        return outputs

    monkeypatch.setattr(engine.engine, "_advance", broken)
    long, short = (engine.submit(request(max_new_tokens=length)) for length in (400, 3))
    for stream in (short, long):
        error = await end_of(stream)
        assert isinstance(error, EngineStepError)
        assert error.error_id in caplog.text
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert engine._admission.tokens_in_flight == 0
    assert len(engine._callers) == 0
    monkeypatch.undo()
    assert await end_of(engine.submit(request())) is None
    await engine.stop()


async def test_a_device_that_fails_every_step_fails_the_engine() -> None:
    engine = await start(FaultyMockBackend(MockSettings(fail_from_step=1)), max_failed_steps=3)
    for _ in range(2):
        assert isinstance(await end_of(engine.submit(request())), EngineStepError)
        assert not engine.failed.is_set()
    assert isinstance(await end_of(engine.submit(request())), EngineStepError)
    async with asyncio.timeout(PATIENCE_S):
        await engine.failed.wait()
    assert engine.failure is not None
    assert "3 steps in a row have failed (max_failed_steps)" in engine.failure
    assert_everything_was_told(engine)
    await engine.stop()


async def test_failed_steps_with_good_ones_between_them_do_not() -> None:
    for_good = FaultyMockBackend(MockSettings(fail_at_step=2))
    engine = await start(for_good, max_failed_steps=1_000)
    assert isinstance(await end_of(engine.submit(request(max_new_tokens=5))), EngineStepError)
    assert await end_of(engine.submit(request(max_new_tokens=5))) is None
    assert engine.engine.guard.num_failed_steps == 0
    await engine.stop()


# --- limits ---


async def test_a_request_that_waited_too_long_is_refused_and_the_running_one_goes_on() -> None:
    engine = await start(MockBackend(max_sequences=1, decode_ms=10), max_queue_time_s=1.0)
    running = engine.submit(request(max_new_tokens=200))
    late, late_score = engine.submit(request()), engine.submit_score(score_request())
    begun = time.monotonic()
    error = await end_of(late)
    assert time.monotonic() - begun >= 0.99
    assert isinstance(error, QueueTimeError)
    assert "waited 1 s" in str(error)
    outcome = await late_score.outcome()
    assert isinstance(outcome.error, QueueTimeError)
    assert outcome.finish_reason is FinishReason.ERROR
    assert engine.num_waiting == 0
    assert await end_of(running) is None  # older than that, but it runs
    await engine.stop()


async def test_a_request_whose_prompt_takes_longer_than_the_queue_may_is_not_late() -> None:
    engine = await start(MockBackend(prefill_ms=1500), max_queue_time_s=0.5)
    assert await end_of(engine.submit(request(max_new_tokens=3))) is None
    await engine.stop()


async def test_tokens_in_flight_are_bounded_and_come_back() -> None:
    engine = await start(MockBackend(decode_ms=1), max_tokens_in_flight=100)
    first = engine.submit(request("aaaa", max_new_tokens=90))
    with pytest.raises(TokensInFlightError, match=r"7 tokens and 94 are in flight, of 100 \(max_"):
        engine.submit(request("a", max_new_tokens=3, n=2))
    assert (engine.num_running + engine.num_waiting) == 1
    second = engine.submit(request("aa", max_new_tokens=4))  # 100 exactly
    with pytest.raises(TokensInFlightError):
        engine.submit_score(score_request())
    assert await end_of(first) is None
    assert await end_of(second) is None
    # One that is larger by itself is taken when it is alone.
    assert await end_of(engine.submit(request(max_new_tokens=120))) is None
    assert engine._admission.tokens_in_flight == 0
    await engine.stop()
