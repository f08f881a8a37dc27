"""The engine thread and its event loop: nobody waits for ever, nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.async_engine import AsyncEngine
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.errors import (
    EngineStepError,
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
)
from gptjet.service.engine.request import FinishReason, Request, SamplingParams, new_request
from gptjet.service.engine.request_stream import RequestStream
from gptjet.service.engine.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

StartEngine = "Callable[..., Awaitable[AsyncEngine]]"


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Awaitable[AsyncEngine]]]:
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
    inner = engine.engine
    assert not inner.has_work
    assert not inner.scheduler.has_work
    manager = inner.scheduler.block_manager
    assert manager.num_free_blocks == manager.num_blocks
    assert isinstance(inner.backend, MockBackend)
    assert inner.backend.cached == {}
    assert not engine._callers


def request(prompt: str, *, deadline_ns: int | None = None, **params: Any) -> Request:
    return new_request(tuple(prompt.encode()), SamplingParams(**params), deadline_ns=deadline_ns)


async def collect(stream: RequestStream) -> str:
    return "".join([output.text async for output in stream])


async def test_stream_ends_with_its_summary(start: Any) -> None:
    engine = await start()
    stream = engine.submit(request("a", max_new_tokens=3))
    outputs = [output async for output in stream]
    assert "".join(o.text for o in outputs) == "bcd"
    assert [o.summary is not None for o in outputs] == [False, False, True]


async def test_64_streams_half_cancelled_leave_nothing_and_the_rest_unchanged(start: Any) -> None:
    rng = random.Random(4)
    prompts = [rng.choice("abcXYZ!") + rng.choice("klm") for _ in range(64)]
    params = {"max_new_tokens": 40, "temperature": 1.2, "ignore_eos": True}
    alone = await start(MockBackend(max_sequences=1))
    expected = [
        await collect(alone.submit(request(prompt, seed=seed, **params)))
        for seed, prompt in enumerate(prompts)
    ]
    engine = await start(MockBackend(decode_ms=0.2, max_sequences=16, max_batch_size=8))
    cancelled = set(rng.sample(range(64), 32))
    moments = {i: rng.randrange(0, 40) for i in cancelled}

    async def one(index: int) -> str:
        stream = engine.submit(request(prompts[index], seed=index, **params))
        text, count = "", 0
        async for output in stream:
            text += output.text
            count += 1
            if index in moments and count > moments[index]:
                await stream.aclose()
        return text

    texts = await asyncio.gather(*(one(index) for index in range(64)))
    while engine.num_running + engine.num_waiting:  # what was left leaves within a step
        await asyncio.sleep(0.001)
    for index in range(64):
        if index in cancelled:
            assert expected[index].startswith(texts[index])
        else:
            assert texts[index] == expected[index]
    assert_empty(engine)


async def test_cancelled_stream_frees_its_blocks_while_others_run(start: Any) -> None:
    engine = await start(MockBackend(decode_ms=20))
    stays = engine.submit(request("a", max_new_tokens=300))
    leaves = engine.submit(request("a", max_new_tokens=300))
    async for _ in leaves:
        break
    leaves.cancel()
    reasons = [o.finish_reason async for o in leaves]
    assert reasons[-1] is FinishReason.CANCELLED
    assert engine.num_running + engine.num_waiting == 1
    assert len(engine.engine.scheduler.running) == 1
    await stays.aclose()


async def test_nothing_comes_out_of_a_stream_that_was_left(start: Any) -> None:
    engine = await start(MockBackend(decode_ms=1))
    stream = engine.submit(request("a", max_new_tokens=50))
    await anext(stream)
    await stream.aclose()
    assert [output async for output in stream] == []


async def test_a_stream_cancelled_before_its_first_step_ends(start: Any) -> None:
    engine = await start(MockBackend(max_sequences=1, decode_ms=1))
    first = engine.submit(request("a", max_new_tokens=200))
    second = engine.submit(request("a", max_new_tokens=200))
    second.cancel()
    outputs = [o async for o in second]
    assert outputs[-1].finish_reason is FinishReason.CANCELLED
    assert outputs[-1].summary is not None
    assert outputs[-1].summary.completion_tokens == 0
    await first.aclose()


async def test_deadline_ends_the_stream(start: Any) -> None:
    engine = await start(MockBackend(decode_ms=1))
    stream = engine.submit(
        request("a", max_new_tokens=400, deadline_ns=time.monotonic_ns() + 30_000_000)
    )
    outputs = [o async for o in stream]
    assert outputs[-1].finish_reason is FinishReason.DEADLINE
    assert len(outputs) < 400


async def test_queue_full_is_refused_with_a_retry_time(start: Any) -> None:
    engine = await start(MockBackend(max_sequences=1, decode_ms=1), max_queue_size=2)
    running = engine.submit(request("a", max_new_tokens=300))
    await anext(running)
    waiting = [engine.submit(request("a", max_new_tokens=5)) for _ in range(2)]
    with pytest.raises(QueueFullError) as caught:
        engine.submit(request("a"))
    assert caught.value.retry_after_s > 0
    assert engine.num_waiting == 2
    await running.aclose()
    assert [await collect(stream) for stream in waiting] == ["bcdef", "bcdef"]
    engine.submit(request("a", max_new_tokens=1))


async def test_invalid_request_is_refused_at_submit(start: Any) -> None:
    engine = await start()
    with pytest.raises(InvalidRequestError, match="temperature"):
        engine.submit(request("a", temperature=-1.0))
    assert (engine.num_waiting, engine.num_running) == (0, 0)


async def test_submit_is_refused_before_start_and_after_drain(start: Any) -> None:
    cold = AsyncEngine(MockBackend(), ByteTokenizer())
    with pytest.raises(EngineUnavailableError, match="not been started"):
        cold.submit(request("a"))
    engine = await start()
    assert await engine.drain(1.0)
    with pytest.raises(EngineUnavailableError, match="draining"):
        engine.submit(request("a"))


async def test_drain_lets_running_requests_finish(start: Any) -> None:
    engine = await start(MockBackend(decode_ms=1))
    stream = engine.submit(request("a", max_new_tokens=30))
    drained, text = await asyncio.gather(engine.drain(60.0), collect(stream))
    assert drained
    assert len(text) == 30


async def test_drain_cancels_what_outlives_the_grace_period(start: Any) -> None:
    engine = await start(MockBackend(decode_ms=5))
    stream = engine.submit(request("a", max_new_tokens=400))
    assert not await engine.drain(0.05)
    outputs = [o async for o in stream]
    assert outputs[-1].finish_reason is FinishReason.CANCELLED


class BrokenWarmUp(MockBackend):
    closed = False

    def warm_up(self) -> None:
        raise RuntimeError("no kernels for this card")

    def close(self) -> None:
        self.closed = True


async def test_start_raises_what_warm_up_raises() -> None:
    backend = BrokenWarmUp()
    engine = AsyncEngine(backend, ByteTokenizer())
    with pytest.raises(RuntimeError, match="no kernels"):
        await engine.start()
    await engine.stop()
    assert backend.closed


async def test_drain_without_grace_is_true_of_an_idle_engine(start: Any) -> None:
    engine = await start()
    assert await engine.drain(0.0)


async def test_a_bug_in_the_engine_leaves_nobody_waiting(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start()
    step = Engine.step

    def broken(self: Engine) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(Engine, "step", broken)
    outputs = [o async for o in engine.submit(request("a", max_new_tokens=5))]
    assert isinstance(outputs[-1].error, EngineStepError)
    monkeypatch.setattr(Engine, "step", step)
    assert await collect(engine.submit(request("a", max_new_tokens=2))) == "bc"


async def test_a_request_that_cannot_be_built_gets_an_error_and_others_go_on(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start()
    new_state = engine.engine.sampler.new_state

    def broken(*args: Any) -> Any:
        raise MemoryError("no room for the state")

    monkeypatch.setattr(engine.engine.sampler, "new_state", broken)
    outputs = [o async for o in engine.submit(request("a", max_new_tokens=5))]
    assert isinstance(outputs[-1].error, EngineStepError)
    assert outputs[-1].summary is not None
    monkeypatch.setattr(engine.engine.sampler, "new_state", new_state)
    assert await collect(engine.submit(request("a", max_new_tokens=2))) == "bc"


async def test_stop_cancels_what_runs_and_ends_the_thread(start: Any) -> None:
    engine = await start(MockBackend(decode_ms=5))
    stream = engine.submit(request("a", max_new_tokens=400))
    await anext(stream)
    await engine.stop()
    outputs = [o async for o in stream]
    assert outputs[-1].finish_reason is FinishReason.CANCELLED
    assert engine._thread is None
