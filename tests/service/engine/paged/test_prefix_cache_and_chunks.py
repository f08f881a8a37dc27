"""Shared beginnings, several continuations and prompts in chunks change no output."""

from __future__ import annotations

import time

import pytest

from gptjet.service.backends.mock import MockBackend
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

# --- the prefix cache ---


def test_a_shared_beginning_is_computed_once() -> None:
    engine = make_engine()
    backend = engine.backend
    assert isinstance(backend, RecordingBackend)
    first = run_one(engine, "the prompt X", max_new_tokens=5)
    second = run_one(engine, "the prompt A", max_new_tokens=5)
    assert (backend.prefills(0), backend.prefills(1)) == ([12], [4])
    assert (text_of(first), text_of(second)) == ("YZ", "BCDEF")
    assert summary_of(first).cached_prompt_tokens == 0
    assert summary_of(second).cached_prompt_tokens == 8


def test_a_conversation_finds_its_own_answer_in_the_cache() -> None:
    # 4 tokens of prompt and 8 of answer, the last of which is sampled but not computed.
    engine = make_engine()
    answer = text_of(run_one(engine, "abcd", max_new_tokens=8))
    again = run_one(engine, "abcd" + answer + "Q", max_new_tokens=2)
    assert text_of(again) == "RS"
    assert summary_of(again).cached_prompt_tokens == 8


def test_the_prefix_cache_can_be_turned_off() -> None:
    engine = make_engine(prefix_cache=False)
    run_one(engine, "the prompt X", max_new_tokens=5)
    assert summary_of(run_one(engine, "the prompt A", max_new_tokens=5)).cached_prompt_tokens == 0


def test_an_echo_with_logprobs_is_computed_whole_whatever_is_cached() -> None:
    engine = make_engine()
    params = {"max_new_tokens": 1, "echo": True, "logprobs": 1}
    first = run_one(engine, "abcdefghi", **params)
    second = run_one(engine, "abcdefghi", **params)
    assert [o.logprobs for o in first] == [o.logprobs for o in second]
    assert len(second[0].logprobs) == 9
    assert summary_of(second).cached_prompt_tokens == 0


def test_requests_that_arrive_together_compute_their_common_beginning_once() -> None:
    # Chunks of 8 for prompts of 13: the oldest gets 4 and then 4 of the first two steps; all it has
    # computed by then is not computed again by the one that shares the step, nor by the third.
    backend = RecordingBackend(max_prefill_tokens=8, max_prefill_batch_size=2)
    engine = make_engine(backend)
    keys = [add(engine, "twelve of it" + last, max_new_tokens=2) for last in "AKX"]
    outputs = run(engine)
    assert [text_of(outputs[key]) for key in keys] == ["BC", "LM", "YZ"]
    assert sum(backend.prefills(0)) == 13
    assert sum(backend.prefills(2)) == 1
    assert summary_of(outputs[keys[2]]).cached_prompt_tokens == 12


# --- n > 1 ---


def test_the_prompt_of_n_continuations_is_computed_once_and_its_last_block_copied() -> None:
    engine = make_engine(RecordingBackend())
    backend = engine.backend
    assert isinstance(backend, RecordingBackend)
    params = {"max_new_tokens": 9, "temperature": 1.5, "seed": 5, "n": 3}
    outputs = run_one(engine, "abcdef", **params)
    assert [work for name, work in backend.steps if name == "P"] == [((0, 6),)]
    assert len(backend.copies) == 2  # the last of the three writes in place
    plain = run_one(make_engine(MockBackend()), "abcdef", **params)
    for index in range(3):
        assert ids_of(outputs, index) == ids_of(plain, index)
    assert text_of(outputs, 0) != text_of(outputs, 1) != text_of(outputs, 2)


def test_continuations_without_a_slot_follow_later_through_the_prefix_cache() -> None:
    engine = make_engine(RecordingBackend(max_sequences=2))
    backend = engine.backend
    assert isinstance(backend, RecordingBackend)
    params = {"max_new_tokens": 6, "temperature": 1.5, "seed": 5, "n": 3}
    outputs = run_one(engine, "abcdef", **params)
    assert [backend.prefills(i) for i in range(3)] == [[6], [], [2]]
    plain = run_one(make_engine(MockBackend()), "abcdef", **params)
    assert [ids_of(outputs, i) for i in range(3)] == [ids_of(plain, i) for i in range(3)]


def test_every_continuation_echoes_the_prompt_with_its_logprobs() -> None:
    engine = make_engine(RecordingBackend(max_prefill_tokens=4))
    outputs = run_one(engine, "abcdefg", max_new_tokens=2, n=2, echo=True, logprobs=0)
    for index in range(2):
        echoed, *_ = [o for o in outputs if o.index == index]
        assert echoed.is_prompt
        assert [entry.token_id for entry in echoed.logprobs] == list(b"abcdefg")
        assert echoed.logprobs[0].logprob is None
        # P(successor) = 1 - 1/e
        assert [e.logprob for e in echoed.logprobs[1:]] == pytest.approx([-0.4586751] * 6)


def test_cancelling_n_continuations_while_their_prompt_is_computed_frees_all() -> None:
    engine = make_engine(RecordingBackend(max_prefill_tokens=4))
    key = add(engine, "a long prompt", max_new_tokens=4, n=4)
    engine.step()
    assert len(engine.cancel(key)) == 4
    assert_nothing_left(engine)


# --- chunked prefill ---


def test_a_long_prompt_is_computed_in_chunks_with_a_decode_step_after_each() -> None:
    backend = RecordingBackend(max_prefill_tokens=8)
    engine = make_engine(backend)
    short = add(engine, "a", max_new_tokens=6)
    engine.step()
    long = add(engine, "some twenty tokens N", max_new_tokens=2)
    outputs = run(engine)
    assert (text_of(outputs[short]), text_of(outputs[long])) == (
        "cdefg",
        "OP",
    )  # "b" is the first step's
    assert backend.steps[1:7] == [
        ("D", ((0, 1),)),
        ("P", ((1, 8),)),
        ("D", ((0, 1),)),
        ("P", ((1, 8),)),
        ("D", ((0, 1),)),
        ("P", ((1, 4),)),
    ]


def test_the_config_lowers_the_chunk_and_cannot_raise_it() -> None:
    for limit, expected in ((5, [5, 5, 2]), (100, [8, 4])):
        backend = RecordingBackend(max_prefill_tokens=8)
        engine = make_engine(backend, max_prefill_tokens=limit)
        run_one(engine, "twelve token", max_new_tokens=1)
        assert backend.prefills(0) == expected


def test_logprobs_of_an_echoed_prompt_are_the_same_in_chunks_of_any_size() -> None:
    params = {"max_new_tokens": 2, "echo": True, "logprobs": 2}
    whole = run_one(make_engine(MockBackend()), "some prompt", **params)
    for size in (1, 3, 4, 10, 11):
        engine = make_engine(RecordingBackend(max_prefill_tokens=size))
        chunked = run_one(engine, "some prompt", **params)
        assert [o.logprobs for o in chunked] == [o.logprobs for o in whole]
        assert len(chunked[0].logprobs) == 11


def test_a_deadline_in_the_middle_of_a_chunked_prefill_frees_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(RecordingBackend(max_prefill_tokens=4))
    in_an_hour = time.monotonic_ns() + 3600 * 10**9
    add(engine, "a long prompt", max_new_tokens=4, deadline_ns=in_an_hour)
    engine.step()
    assert engine.scheduler.prefilling
    monkeypatch.setattr("time.monotonic_ns", lambda: in_an_hour)
    ((_, output),) = engine.step()
    assert output.finish_reason is FinishReason.DEADLINE
    assert output.summary is not None
    assert_nothing_left(engine)
