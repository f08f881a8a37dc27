"""64 streams over one wire, half of them left at random moments: nothing stays behind."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from gptjet.service.backends.mock import MockBackend

STREAMS = 64
# Temperature makes every stream's text its own, so a mix-up of sequences shows.
OPTIONS: dict[str, Any] = {"max_new_tokens": 48, "temperature": 1.3, "ignore_eos": True}


# A tenth of the memory that 24 of them want, prompts in chunks and guesses.
PAGED: dict[str, Any] = {
    "paged": True,
    "num_kv_blocks": 40,
    "max_context": 512,
    "block_size": 4,
    "max_prefill_batch_size": 4,
    "max_prefill_tokens": 16,
    "max_draft_tokens": 3,
}


@pytest.mark.parametrize("pages", [{}, PAGED], ids=["plain", "paged"])
@pytest.mark.parametrize("max_batch_size", [1, 16])
async def test_64_streams_half_cancelled_at_random_moments_leave_the_other_half_unchanged(
    start_server: Any, max_batch_size: int, pages: dict[str, Any]
) -> None:
    rng = random.Random(max_batch_size)
    prompts = ["".join(rng.choices("abcdefXYZ ,é", k=rng.randint(1, 12))) for _ in range(STREAMS)]
    alone = await start_server(backend=MockBackend(max_sequences=1))
    expected = [
        (await alone.client.generate(prompt, seed=seed, **OPTIONS)).text
        for seed, prompt in enumerate(prompts)
    ]
    assert len(set(expected)) == STREAMS

    backend = MockBackend(max_sequences=24, max_batch_size=max_batch_size, decode_ms=0.2, **pages)
    running = await start_server(backend=backend)
    leaves_after = {i: rng.randrange(0, 40) for i in rng.sample(range(STREAMS), STREAMS // 2)}

    async def stream_text(index: int) -> str:
        await asyncio.sleep(rng.uniform(0, 0.05))
        text = ""
        options = OPTIONS | {"prompt_lookup_tokens": index % 3}
        async with running.client.generate_stream(prompts[index], seed=index, **options) as stream:
            if leaves_after.get(index) == 0:
                return text  # before anything has come
            count = 0
            async for chunk in stream:
                text += chunk.text
                count += 1
                if count == leaves_after.get(index):
                    break
        return text

    texts = await asyncio.gather(*(stream_text(index) for index in range(STREAMS)))
    for index, text in enumerate(texts):
        if index in leaves_after:
            assert expected[index].startswith(text)
        else:
            assert text == expected[index]

    engine = running.server.engine
    await running.until(lambda: engine.num_running + engine.num_waiting == 0)
    inner = engine.engine
    assert not inner.has_work
    assert not inner.scheduler.waiting
    assert not inner.scheduler.running
    inner.scheduler.block_manager.check_invariants()
    assert inner.scheduler.block_manager.num_free_blocks == backend.spec.num_kv_blocks
    assert backend.cached == {}
    # And it still serves.
    assert (await running.client.generate("a", max_new_tokens=3)).text == "bcd"
