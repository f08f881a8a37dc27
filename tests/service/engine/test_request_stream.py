"""The stream of one request: a reader that is behind gets fewer, longer outputs and loses none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gptjet.service.engine.request import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
    new_request,
)
from gptjet.service.engine.request_stream import RequestStream


def make_stream(n: int = 1) -> RequestStream:
    return RequestStream(new_request((1,), SamplingParams(n=n)), lambda *_: None)


def token(position: int, index: int = 0, **fields: Any) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        index=index,
        text=f"<{position}>",
        token_ids=(position,),
        logprobs=(TokenLogprob(position, -1.0),),
        **fields,
    )


async def read(stream: RequestStream, count: int) -> list[RequestOutput]:
    return [await anext(stream) for _ in range(count)]


async def test_a_reader_that_keeps_up_gets_every_output_by_itself() -> None:
    stream = make_stream()
    for position in range(100):
        stream.deliver(token(position))
        (output,) = await read(stream, 1)
        assert output.token_ids == (position,)
    assert stream.unread_tokens == 0


@pytest.mark.parametrize("n", [1, 3])
async def test_outputs_that_wait_are_joined_and_nothing_is_lost(n: int) -> None:
    stream = make_stream(n)
    for position in range(1000):
        for index in range(n):
            stream.deliver(token(position, index))
    for index in range(n):
        stream.deliver(token(1000, index, finish_reason=FinishReason.LENGTH))
    assert stream.unread_tokens == n * 1001
    waiting = list(stream._outputs)
    assert len(waiting) < n * 100  # of 1001 each
    outputs = await read(stream, len(waiting))
    assert stream.unread_tokens == 0
    for index in range(n):
        own = [output for output in outputs if output.index == index]
        assert "".join(o.text for o in own) == "".join(f"<{p}>" for p in range(1001))
        assert [i for o in own for i in o.token_ids] == list(range(1001))
        assert [e.token_id for o in own for e in o.logprobs] == list(range(1001))
        assert own[-1].finish_reason is FinishReason.LENGTH
        assert own[-1].token_ids == (1000,)  # the end is by itself, with what it says


async def test_an_echoed_prompt_stays_apart_from_what_follows() -> None:
    stream = make_stream()
    stream.deliver(RequestOutput(request_id="r", text="prompt", token_ids=(7,), is_prompt=True))
    for position in range(150):
        stream.deliver(token(position))
    outputs = await read(stream, len(stream._outputs))
    assert [o.text for o in outputs if o.is_prompt] == ["prompt"]


async def test_too_many_unread_tokens_are_told_and_only_then() -> None:
    stream, told = make_stream(), []
    stream.watch_unread(20, lambda: told.append(stream.unread_tokens))
    for position in range(20):
        stream.deliver(token(position))
    assert told == []
    stream.deliver(token(20))
    assert told == [21]
    await read(stream, len(stream._outputs))
    for position in range(20):
        stream.deliver(token(position))
    assert told == [21]


async def test_what_comes_after_the_end_is_dropped() -> None:
    from gptjet.service.engine.endings import ended
    from gptjet.service.engine.errors import EngineStepError

    stream = make_stream()
    stream.deliver(ended(stream.request, EngineStepError("id", "hung")))
    stream.deliver(token(1))  # from a step that ended after all
    async with asyncio.timeout(5):
        outputs = [output async for output in stream]
    assert len(outputs) == 1
