"""Tokens guessed ahead change no output, and stay within every limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import ScheduledBatch
from gptjet.service.engine.request import FinishReason

from .conftest import (
    RecordingBackend,
    add,
    ids_of,
    make_engine,
    run,
    run_one,
    summary_of,
    text_of,
)


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
