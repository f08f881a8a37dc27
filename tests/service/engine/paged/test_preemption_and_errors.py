"""Without blocks for all, and with a backend that fails: no output changes, no block is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import PrefillResult, ScheduledBatch
from gptjet.service.engine.errors import InvalidRequestError
from gptjet.service.engine.request import FinishReason

from .conftest import (
    RecordingBackend,
    add,
    assert_nothing_left,
    ids_of,
    make_engine,
    run,
    run_one,
    summary_of,
    text_of,
)

# --- preemption ---


def crowded_backend(**options: Any) -> RecordingBackend:
    return RecordingBackend(**{"max_context": 64, "num_kv_blocks": 16, **options})


def test_preempted_sequences_go_on_with_the_same_tokens_and_no_duplicate_text() -> None:
    # Four sequences of up to 48 tokens want 48 blocks of 4; there are 16.
    params: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.3, "ignore_eos": True}
    alone = [
        run_one(make_engine(MockBackend()), "abcdefg" + last, **params, seed=seed)
        for seed, last in enumerate("kLm!")
    ]
    backend = crowded_backend()
    engine = make_engine(backend)
    keys = [add(engine, "abcdefg" + last, **params, seed=seed) for seed, last in enumerate("kLm!")]
    outputs = run(engine)
    assert len(backend.prefills(3)) > 1  # it was preempted
    assert len(backend.prefills(0)) == 1  # the oldest never is
    for key, expected in zip(keys, alone, strict=True):
        assert ids_of(outputs[key]) == ids_of(expected)
        assert text_of(outputs[key]) == text_of(expected)
        assert summary_of(outputs[key]).completion_tokens == 40


def test_the_latest_arrival_is_preempted_and_is_next_in_the_queue() -> None:
    engine = make_engine(crowded_backend(num_kv_blocks=6, max_context=24), max_sequences=2)
    for _ in range(3):
        add(engine, "abc", max_new_tokens=20)
    scheduler = engine.scheduler
    while not any(sequence.output_token_ids for sequence in scheduler.waiting):
        engine.step()
    assert [s.sequence_id for s in scheduler.running] == [0]
    assert [s.sequence_id for s in scheduler.waiting] == [1, 2]
    run(engine)


def test_preempted_continuations_go_their_own_way() -> None:
    # The first request grows into all 8 blocks, so that both continuations of the second have to
    # wait, and later each computes its own output again, not the other's.
    params: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.4, "seed": 1, "n": 2}
    params["ignore_eos"] = True
    backend = crowded_backend(num_kv_blocks=8, max_context=32, max_prefill_tokens=4)
    engine = make_engine(backend)
    first = add(engine, "abcd", max_new_tokens=28)
    second = add(engine, "abcdefg", **params)
    outputs = run(engine)
    assert sum(backend.prefills(1)) > 7
    assert sum(backend.prefills(2)) > 0  # a continuation that was never preempted has none
    alone = run_one(make_engine(MockBackend()), "abcdefg", **params)
    assert text_of(outputs[first]) == "efghijklmnopqrstuvwxyzabcdef"
    assert [ids_of(outputs[second], i) for i in range(2)] == [ids_of(alone, i) for i in range(2)]


def test_a_prompt_preempted_half_way_is_echoed_with_each_logprob_once() -> None:
    # Of 7 blocks the echo holds 4, for a prompt of 12 tokens computed one by one; after 8 of them
    # the first request needs its fourth.
    backend = crowded_backend(num_kv_blocks=7, max_context=28, max_prefill_tokens=1)
    engine = make_engine(backend)
    add(engine, "abcd", max_new_tokens=24)
    params: dict[str, Any] = {"max_new_tokens": 2, "echo": True, "logprobs": 1}
    key = add(engine, "twelve token", **params)
    outputs = run(engine)[key]
    assert len(backend.prefills(1)) > 12
    alone = run_one(make_engine(MockBackend()), "twelve token", **params)
    assert [o.logprobs for o in outputs] == [o.logprobs for o in alone]


def test_cancelling_a_preempted_request_frees_it() -> None:
    engine = make_engine(crowded_backend(num_kv_blocks=6, max_context=24))
    keys = [add(engine, "abc", max_new_tokens=20) for _ in range(2)]
    engine.step()
    while not (engine.scheduler.waiting and engine.scheduler.waiting[0].output_token_ids):
        engine.step()
    ((_, output),) = engine.cancel(keys[1])
    assert output.summary is not None
    assert output.summary.completion_tokens > 0
    run(engine)


def test_a_request_that_never_fits_is_refused_with_the_number_that_would() -> None:
    engine = make_engine(crowded_backend(num_kv_blocks=4))
    with pytest.raises(InvalidRequestError, match="KV cache of 16 tokens: at most 13 here"):
        add(engine, "abc", max_new_tokens=14)
    assert text_of(run_one(engine, "abc", max_new_tokens=13)) == "defghijklmnop"
    with pytest.raises(InvalidRequestError, match=r"KV cache of 16 tokens$"):
        add(engine, "abc" * 6, max_new_tokens=1)


# --- errors ---


class FaultyBackend(RecordingBackend):
    """Raises in the prefill, or returns NaN in the decode step, of prompts with `!` or `?`."""

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        if any(ord("!") in s.request.prompt_token_ids for s in batch.sequences):
            raise RuntimeError("broken")
        return super().prefill(batch)

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        logits = super().decode(batch)
        if not batch.num_tokens:
            for row, sequence in enumerate(batch.sequences):
                if ord("?") in sequence.request.prompt_token_ids:
                    logits[row] = torch.nan
        return logits


def test_an_error_in_a_chunk_fails_its_sequences_and_frees_their_blocks() -> None:
    engine = make_engine(FaultyBackend(max_prefill_tokens=4))
    good = add(engine, "abc", max_new_tokens=9)
    bad = add(engine, "failing!", max_new_tokens=9, n=2)
    outputs = run(engine)
    assert text_of(outputs[good]) == "defghijkl"
    assert {o.finish_reason for o in outputs[bad]} == {FinishReason.ERROR}


def test_blocks_of_a_failed_sequence_are_not_found_by_the_next_prompt() -> None:
    engine = make_engine(FaultyBackend())
    assert run_one(engine, "abcdefgh?", max_new_tokens=9)[-1].error is not None
    again = run_one(engine, "abcdefghi", max_new_tokens=2)
    assert summary_of(again).cached_prompt_tokens == 0


class NanPromptBackend(RecordingBackend):
    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        result = super().prefill(batch)
        for row, sequence in enumerate(batch.sequences):
            prompt_logits = result.prompt_logits[row]
            if prompt_logits is not None and ord("?") in sequence.request.prompt_token_ids:
                prompt_logits[:] = torch.nan
        return result


def test_prompt_logits_that_are_not_finite_fail_their_own_sequence_only() -> None:
    engine = make_engine(NanPromptBackend(max_prefill_tokens=8, max_prefill_batch_size=2))
    params = {"max_new_tokens": 3, "echo": True, "logprobs": 0}
    bad, good = add(engine, "a?", n=2, **params), add(engine, "abc", **params)
    outputs = run(engine)
    assert text_of(outputs[good]) == "def"
    assert [o.finish_reason for o in outputs[bad]] == [FinishReason.ERROR] * 2


def test_an_error_after_the_prompt_fails_the_forks_of_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()

    def broken(*_: Any) -> Any:
        raise RuntimeError("the sampler broke")

    key = add(engine, "abc", n=2, echo=True, max_new_tokens=3)
    monkeypatch.setattr(engine._steps, "_sample", broken)
    outputs = dict.fromkeys((0, 1), None)
    for found, output in engine.step():
        assert found == key
        outputs[output.index] = output.finish_reason
    assert outputs == {0: FinishReason.ERROR, 1: FinishReason.ERROR}
    assert_nothing_left(engine)
