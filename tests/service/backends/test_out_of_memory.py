"""Real models that run out of memory in a step: what is computed again gives the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.service.backends.factory import load_backend
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.errors import OutOfMemoryError
from gptjet.service.engine.request import SamplingParams, new_request

PROMPTS = ("The cat", "A longer prompt, of some", "x")


def generate(engine: Engine, prompts: tuple[str, ...]) -> list[tuple[list[int], Exception | None]]:
    """Token ids and the error of each prompt, all of them in flight at once."""
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    keys = [engine.add(new_request(tuple(prompt.encode()), params)) for prompt in prompts]
    ids: dict[int, list[int]] = {key: [] for key in keys}
    errors: dict[int, Exception | None] = dict.fromkeys(keys)
    while engine.has_work:
        for key, output in engine.step():
            ids[key] += output.token_ids
            errors[key] = errors[key] or output.error
        engine.scheduler.block_manager.check_invariants()
    return [(ids[key], errors[key]) for key in keys]


@pytest.mark.parametrize("name", ["huggingface", "fused"])
def test_decode_steps_without_memory_change_no_token_of_a_real_model(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    loaded = load_backend(name, str(make_gptj_checkpoint()), device="cpu", max_sequences=4)
    engine = Engine(loaded.backend, loaded.tokenizer, EngineConfig())
    expected = generate(engine, PROMPTS)
    assert all(error is None for _, error in expected)
    assert len({tuple(ids) for ids, _ in expected}) == 3

    decode, steps, held = loaded.backend.decode, [], []

    def short_of_memory(batch: Any) -> torch.Tensor:
        logits = decode(batch)  # it has written what it could
        steps.append(len(batch.sequences))
        if len(steps) > 2 and len(engine.scheduler.running) > 1 and len(held) < 2:
            held.append(len(engine.scheduler.running))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return logits

    monkeypatch.setattr(loaded.backend, "decode", short_of_memory)
    assert generate(engine, PROMPTS) == expected
    assert held == [3, 2]
    loaded.backend.close()


@pytest.mark.parametrize("name", ["huggingface", "fused"])
def test_a_prompt_without_memory_fails_alone_on_a_real_model(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    loaded = load_backend(name, str(make_gptj_checkpoint()), device="cpu", max_sequences=4)
    engine = Engine(loaded.backend, loaded.tokenizer, EngineConfig())
    expected = generate(engine, PROMPTS)
    prefill = loaded.backend.prefill

    def short_of_memory(batch: Any) -> Any:
        result = prefill(batch)
        if any(s.num_prompt_tokens == len(PROMPTS[1]) for s in batch.sequences):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    monkeypatch.setattr(loaded.backend, "prefill", short_of_memory)
    results = generate(engine, PROMPTS)
    assert [results[0], results[2]] == [expected[0], expected[2]]
    assert results[1][0] == []
    assert isinstance(results[1][1], OutOfMemoryError)
    loaded.backend.close()
