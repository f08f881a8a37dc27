"""Tokenizing is bounded and never holds up the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gptjet.service.client import InvalidRequestError
from gptjet.service.client import QueueFullError as ClientQueueFullError
from gptjet.service.engine.errors import InvalidRequestError as EngineInvalidRequestError
from gptjet.service.engine.tokenizer import ByteTokenizer
from gptjet.service.rpc.text import MAX_TOKENIZE_BYTES, TextCodec

StartServer = Callable[..., Awaitable[Any]]
LONG = "x" * 4000


class StuckTokenizer(ByteTokenizer):
    """Counts its calls; texts of more than 3000 characters wait until `go_on`."""

    def __init__(self) -> None:
        self.calls = 0
        self.go_on = threading.Event()

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        if len(text) > 3000:
            assert self.go_on.wait(20)
        return super().encode(text)


async def test_text_that_cannot_fit_is_refused_without_tokenizing(
    start_server: StartServer,
) -> None:
    tokenizer = StuckTokenizer()
    running = await start_server(tokenizer=tokenizer)
    with pytest.raises(InvalidRequestError) as caught:
        await running.client.generate("x" * 513)
    assert caught.value.violations[0].field == "prompt"
    assert "512 bytes" in caught.value.violations[0].description
    with pytest.raises(InvalidRequestError, match=str(MAX_TOKENIZE_BYTES)):
        await running.client.tokenize("x" * (MAX_TOKENIZE_BYTES + 1))
    assert tokenizer.calls == 0


async def test_bound_counts_bytes_not_characters() -> None:
    codec = TextCodec(ByteTokenizer(), max_context=4, max_pending=1)
    assert await codec.encode_prompt("éé") == tuple("éé".encode())
    with pytest.raises(EngineInvalidRequestError, match="got 5"):
        await codec.encode_prompt("ééx")


async def test_bound_is_the_context_times_the_longest_token() -> None:
    class Words(ByteTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            return b"twelve bytes" if token_id == 7 else b"x"

    codec = TextCodec(Words(), max_context=10, max_pending=1)
    assert codec.max_prompt_bytes == 120


async def test_too_many_ids_to_detokenize_are_refused(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptjet.service.rpc.text.MAX_DETOKENIZE_IDS", 3)
    running = await start_server()
    assert await running.client.detokenize([104, 105, 33]) == "hi!"
    with pytest.raises(InvalidRequestError, match="at most 3 ids, got 4"):
        await running.client.detokenize([104, 105, 33, 33])


async def test_long_text_does_not_block_other_callers(start_server: StartServer) -> None:
    tokenizer = StuckTokenizer()
    running = await start_server(tokenizer=tokenizer)
    long = asyncio.create_task(running.client.tokenize(LONG))
    await running.until(lambda: tokenizer.calls == 1)
    assert await running.client.health() == "serving"
    assert (await running.client.generate("abc", max_new_tokens=1)).text == "d"
    tokenizer.go_on.set()
    assert len((await long).ids) == 4000


async def test_waiting_texts_are_bounded_even_when_their_callers_leave(
    start_server: StartServer,
) -> None:
    tokenizer = StuckTokenizer()
    running = await start_server(tokenizer=tokenizer, max_queue_size=1)
    first = asyncio.create_task(running.client.tokenize(LONG))
    await running.until(lambda: tokenizer.calls == 1)
    first.cancel()
    await running.request_line(method="Tokenize", code="CANCELLED")
    with pytest.raises(ClientQueueFullError) as caught:  # its thread still runs
        await running.client.tokenize(LONG)
    assert caught.value.retry_after_s == 1.0
    tokenizer.go_on.set()

    async def served() -> bool:
        try:
            return len((await running.client.tokenize(LONG)).ids) == 4000
        except ClientQueueFullError:
            return False

    async with asyncio.timeout(20):
        while not await served():
            await asyncio.sleep(0.01)


async def test_drain_waits_for_what_the_engine_knows_nothing_of(start_server: StartServer) -> None:
    tokenizer = StuckTokenizer()
    running = await start_server(tokenizer=tokenizer)
    tokenizing = asyncio.create_task(running.client.tokenize(LONG))
    await running.until(lambda: tokenizer.calls == 1)
    draining = asyncio.create_task(running.server.drain(20.0))
    await asyncio.sleep(1.5)  # longer than the server gives to answers on their way
    tokenizer.go_on.set()
    assert len((await tokenizing).ids) == 4000
    assert await draining
