"""What a paged backend adds to the wire: cached prompt tokens and speculation in the summary."""

from __future__ import annotations

from typing import Any

from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import Speculation


async def test_the_summary_says_what_the_cache_and_the_guesses_brought(start_server: Any) -> None:
    backend = MockBackend(paged=True, max_draft_tokens=4, max_prefill_tokens=32)
    client = (await start_server(backend=backend)).client
    prompt = "abcdefghijklmnopqrs abcdefg"  # 27 tokens: one block of 16 is full
    first = await client.generate(prompt, max_new_tokens=5)
    assert first.text == "hijkl"
    assert first.summary.cached_prompt_tokens == 0
    assert first.summary.speculation is None
    second = await client.generate(prompt, max_new_tokens=5, prompt_lookup_tokens=4)
    assert second.text == "hijkl"
    assert second.summary.cached_prompt_tokens == 16
    # The prefill gives "h"; the guesses "ijk" are right and "l" comes on top.
    assert second.summary.speculation == Speculation(
        drafted_tokens=3, accepted_tokens=3, decode_steps=1
    )


async def test_tokens_of_one_step_arrive_in_one_message_in_order(start_server: Any) -> None:
    # Steps so far apart that what one makes is sent before the next one ends.
    backend = MockBackend(paged=True, max_draft_tokens=4, decode_ms=500)
    client = (await start_server(backend=backend)).client
    options = {"max_new_tokens": 6, "prompt_lookup_tokens": 3, "logprobs": 0, "stop": "ma"}
    async with client.generate_stream("hijklm ghi", **options) as stream:
        chunks = [chunk async for chunk in stream]
    # "j" from the prefill; the guesses "klm" are right and "n" comes on top, so no "ma".
    assert [chunk.text for chunk in chunks] == ["j", "klmn", "o"]
    assert [bytes(chunk.token_ids) for chunk in chunks] == [b"j", b"klmn", b"o"]
    assert [len(chunk.logprobs) for chunk in chunks] == [1, 4, 1]


async def test_a_backend_without_pages_says_nothing_of_either(start_server: Any) -> None:
    client = (await start_server()).client
    answer = await client.generate("abcabc", max_new_tokens=4, prompt_lookup_tokens=4)
    assert answer.summary.cached_prompt_tokens == 0
    assert answer.summary.speculation is None
