"""The engine over the paged mock: sharing, chunks, preemption and drafts change no output.

The mock's rule: after a lower-case letter the next one (`z` -> `a`), after an upper-case letter
the next one (`Z` -> end-of-text), after anything else `a`. Paged, it raises where a block does not
hold what a model would have put there, so a wrong copy or an early reuse fails the request.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import Phase, PrefillResult, ScheduledBatch
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.errors import InvalidRequestError
from gptjet.service.engine.request import (
    FinishReason,
    RequestOutput,
    RequestSummary,
    SamplingParams,
    new_request,
)
from gptjet.service.engine.tokenizer import ByteTokenizer


class RecordingBackend(MockBackend):
    """Keeps what was asked: "P" or "D", and (sequence_id, tokens) of each sequence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"paged": True, "block_size": 4, **options})
        self.steps: list[tuple[str, tuple[tuple[int, int], ...]]] = []
        self.copies: list[tuple[int, int]] = []

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        self._record(batch)
        return super().prefill(batch)

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        self._record(batch)
        return super().decode(batch)

    def _record(self, batch: ScheduledBatch) -> None:
        counts = batch.num_tokens or (1,) * len(batch.sequences)
        ids = (sequence.sequence_id for sequence in batch.sequences)
        name = "P" if batch.phase is Phase.PREFILL else "D"
        self.steps.append((name, tuple(zip(ids, counts, strict=True))))
        self.copies += batch.block_copies

    def prefills(self, sequence_id: int) -> list[int]:
        return [n for name, work in self.steps if name == "P" for i, n in work if i == sequence_id]


def make_engine(backend: MockBackend | None = None, **config: Any) -> Engine:
    return Engine(backend or RecordingBackend(), ByteTokenizer(), EngineConfig(**config))


def add(engine: Engine, prompt: str, *, deadline_ns: int | None = None, **params: Any) -> int:
    return engine.add(
        new_request(tuple(prompt.encode()), SamplingParams(**params), deadline_ns=deadline_ns)
    )


def run(engine: Engine) -> dict[int, list[RequestOutput]]:
    outputs: dict[int, list[RequestOutput]] = {}
    for _ in range(10_000):
        if not engine.has_work:
            assert_nothing_left(engine)
            return outputs
        for key, output in engine.step():
            outputs.setdefault(key, []).append(output)
        engine.scheduler.block_manager.check_invariants()
    raise AssertionError("the engine makes no progress")


def run_one(engine: Engine, prompt: str, **params: Any) -> list[RequestOutput]:
    key = add(engine, prompt, **params)
    return run(engine)[key]


def assert_nothing_left(engine: Engine) -> None:
    assert not engine.has_work
    assert not engine.scheduler.has_work
    manager = engine.scheduler.block_manager
    manager.check_invariants()
    assert manager.num_free_blocks == manager.num_blocks


def text_of(outputs: list[RequestOutput], index: int = 0) -> str:
    return "".join(o.text for o in outputs if o.index == index and not o.is_prompt)


def ids_of(outputs: list[RequestOutput], index: int = 0) -> list[int]:
    return [t for o in outputs if o.index == index and not o.is_prompt for t in o.token_ids]


def summary_of(outputs: list[RequestOutput]) -> RequestSummary:
    (summary,) = [o.summary for o in outputs if o.summary is not None]
    return summary


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


# --- drafts ---


def drafting_backend(**options: Any) -> RecordingBackend:
    return RecordingBackend(**{"max_draft_tokens": 8, **options})


def test_drafts_that_are_right_save_steps() -> None:
    # "abcdefabc" -> "de", quoted from the start, then "f" as well; then "a" again would be a guess,
    # but the mock goes on with "g".
    backend = drafting_backend()
    engine = make_engine(backend)
    outputs = run_one(engine, "abcdefabc", max_new_tokens=6, prompt_lookup_tokens=4)
    assert text_of(outputs) == "defghi"
    # The prefill gives "d"; the drafts are then "efab", of which "ef" is right and "g" comes on
    # top; "g" is new, and so are "h" and "i".
    assert [o.text for o in outputs] == ["d", "efg", "h", "i"]
    speculation = summary_of(outputs).speculation
    assert speculation is not None
    assert (speculation.drafted_tokens, speculation.accepted_tokens) == (4, 2)
    assert speculation.decode_steps == 3


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7, "seed": 3},
        {"temperature": 0.7, "seed": 3, "logprobs": 2},
        {"temperature": 0.7, "seed": 4, "top_k": 3, "top_p": 0.9},
        {"temperature": 0.5, "seed": 4, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"temperature": 0.5, "seed": 4, "presence_penalty": 0.5, "logit_bias": {101: 2.0}},
        {"no_repeat_ngram_size": 4},
        {"stop": ("yza",)},
        {"stop_token_ids": (ord("x"),)},
        {"min_new_tokens": 30, "stop_token_ids": (ord("b"),)},
        {"temperature": 0.9, "seed": 9, "n": 3},
    ],
)
def test_drafts_change_no_token_text_logprob_or_ending(params: dict[str, Any]) -> None:
    for prompt in ("abcdefghijklmnopqrstuvwxyzabcdefghij", "A", "aZaZaY"):
        plain = run_one(make_engine(), prompt, max_new_tokens=80, **params)
        backend = drafting_backend()
        drafted = run_one(
            make_engine(backend), prompt, max_new_tokens=80, **params, prompt_lookup_tokens=6
        )
        for index in range(params.get("n", 1)):
            assert ids_of(drafted, index) == ids_of(plain, index)
            assert text_of(drafted, index) == text_of(plain, index)
        # (a row's log-softmax does not depend on the batch it is in)
        entries = [[e for o in outputs for e in o.logprobs] for outputs in (plain, drafted)]
        assert entries[0] == entries[1]
        assert summary_of(drafted).sequences == summary_of(plain).sequences
        speculation = summary_of(drafted).speculation
        assert speculation is not None
        total = sum(s.completion_tokens for s in summary_of(drafted).sequences)
        steps = speculation.decode_steps + speculation.accepted_tokens
        # The prefill gave the first of each; a guess that ended one stood for the step's own token.
        num_sequences = params.get("n", 1)
        assert total - num_sequences <= steps <= total
        assert summary_of(plain).speculation is None


def test_guess_that_the_sequence_ends_with_counts_as_accepted() -> None:
    """After "abcabc..." comes "defg": the guess at the stop token is right, and is the last."""
    prompt = "cdefghabc"
    backend = drafting_backend()
    outputs = run_one(
        make_engine(backend),
        prompt,
        max_new_tokens=20,
        prompt_lookup_tokens=4,
        stop_token_ids=(ord("h"),),
    )
    assert "".join(map(chr, ids_of(outputs))) == "defgh"
    speculation = summary_of(outputs).speculation
    assert speculation is not None
    # "d" comes with the prompt, then "efgh" was guessed whole, and "h" ends it.
    assert (speculation.drafted_tokens, speculation.accepted_tokens) == (4, 4)
    assert speculation.decode_steps == 1


def test_drafts_stay_within_every_limit() -> None:
    # 60 tokens of context are 15 blocks, all there are: a draft too many would not fit.
    backend = drafting_backend(max_context=60, num_kv_blocks=15, max_draft_tokens=5)
    engine = make_engine(backend)
    outputs = run_one(engine, "a" * 10 + "ba", max_new_tokens=48, prompt_lookup_tokens=16)
    assert len(ids_of(outputs)) == 48
    assert max(n for name, work in backend.steps if name == "D" for _, n in work) == 6


def test_a_guess_never_costs_another_sequence_its_blocks() -> None:
    # Of 6 blocks 3 are for the 11 tokens of the first and one to come, 2 for the second. The seven
    # guesses "efghabc" want two more.
    backend = drafting_backend(max_context=20, num_kv_blocks=6, max_prefill_batch_size=2)
    engine = make_engine(backend)
    first = add(engine, "abcdefghabc", max_new_tokens=9, prompt_lookup_tokens=8)
    second = add(engine, "Bcdef", max_new_tokens=2)
    outputs = run(engine)
    assert text_of(outputs[first]) == "defghijkl"
    assert text_of(outputs[second]) == "gh"
    assert backend.prefills(1) == [5]


def test_a_backend_that_cannot_verify_gets_no_drafts() -> None:
    for backend in (MockBackend(max_draft_tokens=4), RecordingBackend()):
        outputs = run_one(make_engine(backend), "abcabc", max_new_tokens=4, prompt_lookup_tokens=4)
        assert text_of(outputs) == "defg"
        assert summary_of(outputs).speculation is None


class NanDraftBackend(RecordingBackend):
    """NaN in the third row of every step with drafts."""

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        logits = super().decode(batch)
        if batch.num_tokens:
            logits[2] = torch.nan
        return logits


def test_tokens_before_a_bad_row_of_a_verified_step_still_arrive() -> None:
    # "c" -> d; then drafts "efa": e and f are right, the row after them is NaN.
    engine = make_engine(NanDraftBackend(max_draft_tokens=4))
    outputs = run_one(engine, "abcdefabc", max_new_tokens=6, prompt_lookup_tokens=3)
    assert text_of(outputs) == "def"
    assert outputs[-1].finish_reason is FinishReason.ERROR


def test_a_bad_row_after_a_wrong_guess_is_read_by_nobody() -> None:
    # "c" -> d; then drafts "zzz", of which the first is wrong already.
    engine = make_engine(NanDraftBackend(max_draft_tokens=4))
    outputs = run_one(engine, "dzzzc", max_new_tokens=5, prompt_lookup_tokens=3)
    assert text_of(outputs) == "defgh"
    speculation = summary_of(outputs).speculation
    assert speculation is not None
    assert (speculation.drafted_tokens, speculation.accepted_tokens) == (3, 0)


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
