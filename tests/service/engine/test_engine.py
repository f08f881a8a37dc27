"""The engine over the mock backend, whose output is worked out by hand in each test.

The mock's rule: after a lower-case letter the next one (`z` -> `a`), after an upper-case letter
the next one (`Z` -> end-of-text, id 256), after anything else `a`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import PrefillResult, ScheduledBatch
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.errors import EngineStepError, InvalidRequestError, QueueFullError
from gptjet.service.engine.request import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    new_request,
)
from gptjet.service.engine.sequence import Sequence
from gptjet.service.engine.tokenizer import ByteTokenizer


def make_engine(backend: MockBackend | None = None, **config: Any) -> Engine:
    return Engine(backend or MockBackend(), ByteTokenizer(), EngineConfig(**config))


def add(engine: Engine, prompt: str, *, deadline_ns: int | None = None, **params: Any) -> int:
    return engine.add(
        new_request(tuple(prompt.encode()), SamplingParams(**params), deadline_ns=deadline_ns)
    )


def run(engine: Engine) -> dict[int, list[RequestOutput]]:
    outputs: dict[int, list[RequestOutput]] = {}
    while engine.has_work:
        for key, output in engine.step():
            outputs.setdefault(key, []).append(output)
        engine.scheduler.block_manager.check_invariants()
    assert_nothing_left(engine)
    return outputs


def run_one(engine: Engine, prompt: str, **params: Any) -> list[RequestOutput]:
    key = add(engine, prompt, **params)
    return run(engine)[key]


def assert_nothing_left(engine: Engine) -> None:
    assert not engine.has_work
    assert not engine.scheduler.has_work
    manager = engine.scheduler.block_manager
    assert manager.num_free_blocks == manager.num_blocks
    assert isinstance(engine.backend, MockBackend)
    assert engine.backend.cached == {}


def text_of(outputs: list[RequestOutput], index: int = 0) -> str:
    return "".join(o.text for o in outputs if o.index == index and not o.is_prompt)


def test_tokens_come_one_a_step_until_the_length() -> None:
    # "ab" -> c, d, e: three steps, the last with the reason.
    engine = make_engine()
    key = add(engine, "ab", max_new_tokens=3)
    outputs = run(engine)[key]
    assert [(o.text, o.token_ids, o.finish_reason) for o in outputs] == [
        ("c", (ord("c"),), None),
        ("d", (ord("d"),), None),
        ("e", (ord("e"),), FinishReason.LENGTH),
    ]
    summary = outputs[-1].summary
    assert summary is not None
    assert (summary.prompt_tokens, summary.completion_tokens) == (2, 3)


def test_end_of_text_ends_the_sequence_without_text() -> None:
    # "X" -> Y, Z, end-of-text.
    engine = make_engine()
    outputs = run_one(engine, "X", max_new_tokens=9)
    assert text_of(outputs) == "YZ"
    assert outputs[-1].finish_reason is FinishReason.STOP_TOKEN
    assert outputs[-1].token_ids == (256,)
    assert outputs[-1].summary is not None
    assert outputs[-1].summary.sequences[0].stop_match == 256


def test_ignore_eos_goes_on_past_the_end_of_text() -> None:
    # "Y" -> Z, end-of-text, then `a` (after anything else), b.
    engine = make_engine()
    outputs = run_one(engine, "Y", max_new_tokens=4, ignore_eos=True)
    assert text_of(outputs) == "Zab"
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_stop_token_id_ends_the_sequence_and_its_text_is_left_out() -> None:
    engine = make_engine()
    outputs = run_one(engine, "a", max_new_tokens=9, stop_token_ids=(ord("d"),))
    assert text_of(outputs) == "bc"
    assert outputs[-1].finish_reason is FinishReason.STOP_TOKEN


def test_stop_string_ends_the_sequence_just_before_it_and_never_shows() -> None:
    # "a" -> b c d e f: "de" is the stop; "d" is held back until it is known.
    engine = make_engine()
    outputs = run_one(engine, "a", max_new_tokens=9, stop=("de",))
    assert [o.text for o in outputs] == ["b", "c", "", ""]
    assert outputs[-1].finish_reason is FinishReason.STOP_STRING
    assert outputs[-1].summary is not None
    assert outputs[-1].summary.sequences[0].stop_match == "de"


def test_text_held_for_a_stop_string_is_given_out_at_the_length() -> None:
    engine = make_engine()
    outputs = run_one(engine, "a", max_new_tokens=3, stop=("dx",))
    assert [o.text for o in outputs] == ["b", "c", "d"]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_min_new_tokens_holds_the_end_of_text_back() -> None:
    # "Z" would end at once. With end-of-text masked, the id after it round the vocabulary, 0, is
    # the likeliest; after id 0 ("anything else") comes `a`.
    engine = make_engine()
    outputs = run_one(engine, "Z", max_new_tokens=2, min_new_tokens=2)
    assert [o.token_ids for o in outputs] == [(0,), (ord("a"),)]


def test_echo_gives_the_prompt_first() -> None:
    engine = make_engine()
    outputs = run_one(engine, "ab", max_new_tokens=1, echo=True, logprobs=1)
    prompt, token = outputs
    assert (prompt.text, prompt.token_ids, prompt.is_prompt) == ("ab", (97, 98), True)
    assert [entry.logprob is None for entry in prompt.logprobs] == [True, False]
    # P(successor) = 1 - 1/e, and "b" is the successor of "a" as "c" is of "b".
    assert prompt.logprobs[1].logprob == pytest.approx(-0.4586751, abs=1e-5)
    assert token.logprobs[0].logprob == pytest.approx(-0.4586751, abs=1e-5)
    assert token.logprobs[0].top[0][0] == ord("c")


def test_n_sequences_come_from_one_request_with_one_summary() -> None:
    engine = make_engine()
    outputs = run_one(engine, "a", max_new_tokens=2, n=3)
    assert [text_of(outputs, index) for index in range(3)] == ["bc", "bc", "bc"]
    summaries = [o.summary for o in outputs if o.summary is not None]
    assert len(summaries) == 1
    assert outputs[-1].summary is summaries[0]
    assert summaries[0].completion_tokens == 6
    assert [s.index for s in summaries[0].sequences] == [0, 1, 2]


def test_sampled_tokens_do_not_depend_on_what_else_runs() -> None:
    params = {"max_new_tokens": 20, "temperature": 1.5, "seed": 11, "ignore_eos": True}
    alone = make_engine()
    expected = run_one(alone, "k", **params)
    crowded = make_engine()
    keys = [add(crowded, "k", **{**params, "seed": seed}) for seed in (5, 11, 12)]
    keys += [add(crowded, "Q", max_new_tokens=7)]
    outputs = run(crowded)
    ids = [[o.token_ids for o in outputs[key]] for key in keys]
    assert ids[1] == [o.token_ids for o in expected]
    assert ids[0] != ids[1] != ids[2]


def test_the_n_sequences_of_a_request_are_drawn_apart() -> None:
    engine = make_engine()
    outputs = run_one(engine, "k", max_new_tokens=12, temperature=2.0, seed=3, n=2)
    assert text_of(outputs, 0) != text_of(outputs, 1)


def test_cancel_frees_a_running_and_a_waiting_request_at_once() -> None:
    engine = make_engine(MockBackend(max_sequences=1))
    running = add(engine, "a", max_new_tokens=100)
    waiting = add(engine, "a", max_new_tokens=100)
    engine.step()
    for key in (waiting, running):
        ((cancelled_key, output),) = engine.cancel(key)
        assert cancelled_key == key
        assert output.finish_reason is FinishReason.CANCELLED
        assert output.summary is not None
    assert_nothing_left(engine)
    assert engine.cancel(running) == []


def test_deadline_frees_the_sequence_within_one_step() -> None:
    engine = make_engine()
    key = add(engine, "a", max_new_tokens=100, deadline_ns=time.monotonic_ns() + 10**12)
    engine.step()
    assert engine.has_work
    late = add(engine, "a", max_new_tokens=100, deadline_ns=time.monotonic_ns() - 1)
    ((expired, output),) = [
        item for item in engine.step() if item[1].finish_reason is FinishReason.DEADLINE
    ]
    assert expired == late
    assert output.summary is not None
    engine.cancel(key)
    assert_nothing_left(engine)


def test_finished_requests_do_not_pile_up_in_the_deadline_heap() -> None:
    engine = make_engine()
    for _ in range(300):
        add(engine, "a", max_new_tokens=1, deadline_ns=time.monotonic_ns() + 10**14)
        run(engine)
    assert len(engine._deadlines) <= 70


def test_queue_refuses_one_more_than_its_bound() -> None:
    engine = make_engine(max_queue_size=2)
    add(engine, "a")
    add(engine, "a")
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        add(engine, "a")
    engine.step()  # one of them has started, so there is room for another
    add(engine, "a")
    run(engine)


def test_request_that_can_never_fit_the_kv_cache_is_refused_with_its_size() -> None:
    engine = make_engine(MockBackend(max_context=512, num_kv_blocks=4))
    with pytest.raises(InvalidRequestError, match="KV cache of 64 tokens"):
        add(engine, "a", max_new_tokens=64)
    add(engine, "a", max_new_tokens=63)
    run(engine)


class FaultyBackend(MockBackend):
    """Raises, or returns NaN, for prompts that start with `!` or `?`."""

    def _row_of(self, batch: ScheduledBatch, first: str) -> list[int]:
        return [
            row
            for row, s in enumerate(batch.sequences)
            if s.request.prompt_token_ids[0] == ord(first)
        ]

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        if self._row_of(batch, "!"):
            raise RuntimeError("secret detail of the machine")
        return super().prefill(batch)

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        logits = super().decode(batch)
        logits[self._row_of(batch, "?")] = torch.nan
        return logits


def test_backend_error_fails_its_sequences_with_an_id_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(FaultyBackend())
    good, bad = add(engine, "a", max_new_tokens=3), add(engine, "!", max_new_tokens=3)
    outputs = run(engine)
    assert text_of(outputs[good]) == "bcd"
    (failed,) = outputs[bad]
    assert failed.finish_reason is FinishReason.ERROR
    assert isinstance(failed.error, EngineStepError)
    assert failed.error.error_id in caplog.text
    assert "secret detail" in caplog.text
    assert "secret" not in str(failed.error)
    assert failed.summary is not None


def test_nan_logits_fail_their_own_row_only() -> None:
    engine = make_engine(FaultyBackend())
    good, bad = add(engine, "a", max_new_tokens=4), add(engine, "?", max_new_tokens=4)
    outputs = run(engine)
    assert text_of(outputs[good]) == "bcde"
    assert outputs[bad][-1].finish_reason is FinishReason.ERROR
    assert text_of(outputs[bad]) == "a"  # of the prefill, which was sound


class ForgetfulTokenizer(ByteTokenizer):
    """Raises for the id of "x", as some do for ids beyond their vocabulary."""

    def decode(self, token_ids: Seq[int]) -> str:
        if ord("x") in token_ids:
            raise ValueError("unknown id")
        return super().decode(token_ids)

    def token_bytes(self, token_id: int) -> None:  # type: ignore[override]
        """Not byte-level: a few ids are decoded together."""


def test_a_tokenizer_that_raises_ends_its_request_and_loses_no_neighbours_end() -> None:
    engine = Engine(MockBackend(), ForgetfulTokenizer(), EngineConfig())
    good, bad = add(engine, "a", max_new_tokens=2), add(engine, "v", max_new_tokens=9)
    also_bad = add(engine, "u", max_new_tokens=9)
    outputs = run(engine)
    assert text_of(outputs[good]) == "bc"
    assert outputs[good][-1].summary is not None
    for key in (bad, also_bad):
        assert outputs[key][-1].finish_reason is FinishReason.ERROR
        assert outputs[key][-1].summary is not None


class UnreleasableBackend(MockBackend):
    def release(self, sequence: Sequence) -> None:
        super().release(sequence)
        raise RuntimeError("cannot release")


def test_an_error_in_release_does_not_lose_the_callers_output() -> None:
    engine = make_engine(UnreleasableBackend())
    outputs = run_one(engine, "a", max_new_tokens=2)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert outputs[-1].summary is not None


def test_timings_add_up() -> None:
    engine = make_engine(MockBackend(prefill_ms=2, decode_ms=1))
    request = new_request((97,), SamplingParams(max_new_tokens=4))
    engine.add_unchecked(request)
    while engine.has_work:
        outputs = engine.step()
    summary = outputs[-1][1].summary
    assert summary is not None
    t = summary.timings
    assert t.ttft_ms == pytest.approx(t.queue_ms + t.prefill_ms)
    assert t.e2e_ms == pytest.approx(t.ttft_ms + t.decode_ms)
    assert t.prefill_ms >= 2  # the mock sleeps so long in each
    assert t.decode_ms >= 3
