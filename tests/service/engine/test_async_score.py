"""Score requests through the engine thread: nobody waits for ever, nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.async_engine import AsyncEngine
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.errors import (
    EngineStepError,
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
)
from gptjet.service.engine.request import FinishReason, SamplingParams, new_request
from gptjet.service.engine.score import ScoreRequest, new_score_request
from gptjet.service.engine.scoring import Scorer
from gptjet.service.engine.tokenizer import ByteTokenizer

Start = Callable[..., Awaitable[AsyncEngine]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    engines: list[AsyncEngine] = []

    async def start_engine(backend: MockBackend | None = None, **config: Any) -> AsyncEngine:
        engine = AsyncEngine(backend or MockBackend(), ByteTokenizer(), EngineConfig(**config))
        await engine.start()
        engines.append(engine)
        return engine

    yield start_engine
    for engine in engines:
        await engine.stop()
        assert_empty(engine)


def assert_empty(engine: AsyncEngine) -> None:
    assert (engine.num_waiting, engine.num_running) == (0, 0)
    assert not engine.engine.has_work
    manager = engine.engine.scheduler.block_manager
    manager.check_invariants()
    assert manager.num_free_blocks == manager.num_blocks
    assert isinstance(engine.engine.backend, MockBackend)
    assert engine.engine.backend.cached == {}
    assert not engine._callers


def score(prompt: str, *candidates: str, **options: Any) -> ScoreRequest:
    return new_score_request(
        tuple(prompt.encode()), tuple(tuple(c.encode()) for c in candidates), **options
    )


async def test_score_ends_with_its_result(start: Start) -> None:
    engine = await start()
    outcome = await engine.submit_score(score("ab", "c", "d")).outcome()
    assert outcome.result is not None
    # The successor is e times as likely as the id after it.
    first, second = (s.probability for s in outcome.result.scores)
    assert first / second == pytest.approx(2.718282, rel=1e-5)
    assert await engine.drain(1.0)


async def test_score_cancelled_while_it_waits_and_while_it_runs(start: Start) -> None:
    engine = await start(MockBackend(decode_ms=50))
    runs = engine.submit_score(score("ab", *["c"] * 64))
    waits = engine.submit_score(score("ab", "c"))
    while engine.num_running == 0:
        await asyncio.sleep(0.001)
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    waits.cancel()
    assert (await waits.outcome()).finish_reason is FinishReason.CANCELLED
    runs.cancel(FinishReason.DEADLINE)
    assert (await runs.outcome()).finish_reason is FinishReason.DEADLINE
    runs.cancel()
    assert_empty(engine)


async def test_whoever_stops_waiting_does_not_take_the_outcome_from_others(start: Start) -> None:
    engine = await start(MockBackend(prefill_ms=30))
    call = engine.submit_score(score("ab", "c"))
    waiting = asyncio.create_task(call.outcome())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (await call.outcome()).result is not None


async def test_queue_is_shared_with_generation(start: Start) -> None:
    engine = await start(MockBackend(max_sequences=1, decode_ms=20), max_queue_size=2)
    stream = engine.submit(new_request((97,), SamplingParams(max_new_tokens=300)))
    await anext(stream)
    calls = [engine.submit_score(score("ab", "c")) for _ in range(2)]
    with pytest.raises(QueueFullError) as caught:
        engine.submit_score(score("ab", "c"))
    assert caught.value.retry_after_s > 0
    with pytest.raises(QueueFullError):
        engine.submit(new_request((97,), SamplingParams(max_new_tokens=3)))
    await stream.aclose()
    for call in calls:
        assert (await call.outcome()).result is not None
    engine.submit_score(score("ab", "c"))


async def test_bad_score_is_refused_at_submit(start: Start) -> None:
    engine = await start()
    with pytest.raises(InvalidRequestError, match=r"candidates\[0\]"):
        engine.submit_score(score("ab", ""))
    assert (engine.num_waiting, engine.num_running) == (0, 0)


async def test_submit_score_is_refused_before_start_and_after_drain(start: Start) -> None:
    cold = AsyncEngine(MockBackend(), ByteTokenizer())
    with pytest.raises(EngineUnavailableError, match="not been started"):
        cold.submit_score(score("ab", "c"))
    engine = await start()
    assert await engine.drain(1.0)
    with pytest.raises(EngineUnavailableError, match="draining"):
        engine.submit_score(score("ab", "c"))


async def test_drain_lets_scores_finish(start: Start) -> None:
    engine = await start(MockBackend(prefill_ms=20))
    calls = [engine.submit_score(score("ab", "c")) for _ in range(3)]
    assert await engine.drain(30.0)
    for call in calls:
        assert (await call.outcome()).result is not None


async def test_drain_cancels_scores_that_outlive_the_grace_period(start: Start) -> None:
    engine = await start(MockBackend(decode_ms=50))
    calls = [engine.submit_score(score("ab", *["c"] * 64)) for _ in range(2)]
    assert not await engine.drain(0.05)
    for call in calls:
        assert (await call.outcome()).finish_reason is FinishReason.CANCELLED


async def test_stop_ends_scores_too(start: Start) -> None:
    engine = await start(MockBackend(decode_ms=20))
    call = engine.submit_score(score("ab", *["c"] * 64))
    await engine.stop()
    assert (await call.outcome()).finish_reason is FinishReason.CANCELLED


async def test_score_that_cannot_be_queued_gets_an_error_and_others_go_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start()

    def broken(*_: Any) -> Any:
        raise MemoryError("no room for the state")

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "add", broken)
        outcome = await engine.submit_score(score("ab", "c")).outcome()
    assert isinstance(outcome.error, EngineStepError)
    assert (await engine.submit_score(score("ab", "c")).outcome()).result is not None


async def test_64_streams_run_while_scores_are_answered_and_both_are_right(start: Start) -> None:
    rng = random.Random(7)
    params = {"max_new_tokens": 24, "temperature": 1.2, "ignore_eos": True}
    prompts = [rng.choice("abcXYZ!") + rng.choice("klm") for _ in range(64)]
    questions = [(rng.choice("abxyz") * 3, rng.choice("cdefg")) for _ in range(40)]

    async def stream(engine: AsyncEngine, index: int) -> str:
        request = new_request(tuple(prompts[index].encode()), SamplingParams(seed=index, **params))
        return "".join([output.text async for output in engine.submit(request)])

    async def logprobs(engine: AsyncEngine, prompt: str, candidate: str) -> list[float]:
        call = engine.submit_score(score(prompt, candidate, "dd", "b"))
        result = (await call.outcome()).result
        assert result is not None
        return [s.logprob for s in result.scores]

    alone = await start(MockBackend(max_sequences=1))
    texts = [await stream(alone, index) for index in range(64)]
    scores = [await logprobs(alone, *question) for question in questions]
    # 80 slots: the 64 streams hold theirs all the while.
    engine = await start(MockBackend(decode_ms=0.5, max_sequences=80), max_sequences=80)
    async with asyncio.TaskGroup() as group:
        streams = [group.create_task(stream(engine, index)) for index in range(64)]
        answers = [group.create_task(logprobs(engine, *question)) for question in questions]
    assert [task.result() for task in streams] == texts
    assert [task.result() for task in answers] == scores


async def test_cancelled_scores_and_streams_at_random_leave_nothing(start: Start) -> None:
    rng = random.Random(11)
    engine = await start(
        MockBackend(decode_ms=0.2, max_sequences=6, num_kv_blocks=20), max_sequences=6
    )

    async def one(index: int) -> None:
        await asyncio.sleep(rng.random() * 0.1)
        if index % 2:
            deadline = time.monotonic_ns() + rng.randrange(1, 200) * 10**6
            calibration = (97,) if rng.random() < 0.5 else None
            call = engine.submit_score(
                score(
                    "p" * rng.randrange(1, 90),
                    *["c" * rng.randrange(1, 40)] * rng.randrange(1, 9),
                    deadline_ns=deadline,
                    calibration_token_ids=calibration,
                )
            )
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.05)
                call.cancel()
            await call.outcome()
        else:
            params = SamplingParams(max_new_tokens=rng.randrange(1, 60))
            stream = engine.submit(new_request((97,) * rng.randrange(1, 90), params))
            leave_after = rng.randrange(1, 60)
            async for _ in stream:
                leave_after -= 1
                if leave_after == 0:
                    await stream.aclose()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for index in range(120):
            group.create_task(one(index))
    while engine.num_running + engine.num_waiting:
        await asyncio.sleep(0.001)
    assert_empty(engine)
