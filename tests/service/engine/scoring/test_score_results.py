"""What a score says, and its turn among the streams and the blocks."""

from __future__ import annotations

import math

import pytest

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.errors import InvalidRequestError

from .conftest import (
    BEST,
    RecordingBackend,
    add,
    add_stream,
    make_engine,
    run,
    score_one,
)

# --- the numbers ---


def test_logprobs_are_those_worked_out_by_hand() -> None:
    # After "ab" comes c: "c" is the best, "d" one less, "e" two. "cd": both the best. "cc": the
    # successor of c is d, and c is 256 ids further round.
    result = score_one(make_engine(), "ab", "c", "d", "cd", "cc", request_id="mine")
    tokens = [[token.logprob for token in score.tokens] for score in result.scores]
    assert tokens == [
        pytest.approx([BEST], abs=1e-5),
        pytest.approx([BEST - 1], abs=1e-5),
        pytest.approx([BEST, BEST], abs=1e-5),
        pytest.approx([BEST, BEST - 256], abs=1e-4),
    ]
    assert [[t.token_id for t in s.tokens] for s in result.scores] == [
        [99],
        [100],
        [99, 100],
        [99, 99],
    ]
    assert [s.logprob for s in result.scores] == [pytest.approx(sum(row)) for row in tokens]
    assert [s.index for s in result.scores] == [0, 1, 2, 3]
    weights = [math.exp(sum(row)) for row in tokens]
    assert [s.probability for s in result.scores] == pytest.approx(
        [w / sum(weights) for w in weights]
    )
    assert [s.calibration_logprob for s in result.scores] == [None] * 4
    assert (result.request_id, result.prompt_tokens, result.candidate_tokens) == ("mine", 2, 6)


def test_calibration_takes_out_what_the_model_thinks_anyway() -> None:
    # After "ab": c 0, d -1 below the best. After "c" (the calibration): d 0, and c 256 below.
    backend = RecordingBackend()
    result = score_one(make_engine(backend), "ab", "c", "d", calibration="c")
    assert [s.logprob for s in result.scores] == pytest.approx([BEST, BEST - 1], abs=1e-5)
    assert [s.calibration_logprob for s in result.scores] == pytest.approx(
        [BEST - 256, BEST], abs=1e-4
    )
    # 0 + 256 against -1 - 0.
    assert result.scores[0].probability == pytest.approx(1.0)
    assert result.scores[1].probability == pytest.approx(math.exp(-257), rel=1e-2)
    assert [job.prompt_token_ids for job in backend.jobs] == [(97, 98), (99,)]
    assert len({job.job_id for job in backend.jobs}) == 2
    assert result.prompt_tokens == 2


def test_timings_add_up() -> None:
    result = score_one(make_engine(MockBackend(prefill_ms=20, decode_ms=5)), "ab", "c", "d")
    timings = result.timings
    assert timings.prefill_ms >= 20
    assert timings.decode_ms >= 10
    assert timings.ttft_ms == 0
    assert timings.e2e_ms == pytest.approx(
        timings.queue_ms + timings.prefill_ms + timings.decode_ms, abs=1.0
    )


def test_job_ids_are_no_sequence_ids() -> None:
    backend = RecordingBackend()
    engine = make_engine(backend)
    add_stream(engine, "a", 3)
    add(engine, "ab", "c")
    add_stream(engine, "b", 3)
    engine.step()
    ids = {s.sequence_id for s in (*engine.scheduler.waiting, *engine.scheduler.running)}
    run(engine)
    assert backend.jobs[0].job_id not in ids


# --- taking turns with streams ---


def test_a_stream_waits_for_at_most_one_piece_a_token() -> None:
    backend = RecordingBackend()
    engine = make_engine(backend)
    key = add_stream(engine, "a", 30)
    _, outcomes = add(engine, "ab", *"cdefgh")
    outputs = run(engine)
    assert backend.steps.count("S") == 7
    assert "SS" not in backend.steps
    assert backend.steps.rindex("S") < backend.steps.rindex("D")  # while it runs, not after it
    assert "".join(o.text for o in outputs[key]) == "bcdefghijklmnopqrstuvwxyzabcde"
    assert outcomes[0].result is not None


def test_between_two_tokens_of_a_stream_there_is_one_piece_or_one_prefill() -> None:
    backend = RecordingBackend()
    engine = make_engine(backend)
    add_stream(engine, "a", 60)
    engine.step()
    for letter in "bcdefgh":
        add_stream(engine, letter, 10)
        add(engine, "ab", letter, "x")
    run(engine)
    mixed = backend.steps.rstrip("D")
    assert {len(part) for part in mixed.split("D")} <= {0, 1}
    assert set(mixed.split("D")) == {"", "P", "S"}


def test_flood_of_short_requests_does_not_keep_a_score_waiting() -> None:
    """Requests of one token end in their prefill, so there is never a decode step."""
    backend = RecordingBackend()
    engine = make_engine(backend)
    _, outcomes = add(engine, "ab", "c", "d")
    for _ in range(40):
        add_stream(engine, "a", 1)
        engine.step()
    assert outcomes
    assert outcomes[0].result is not None
    run(engine)


def test_without_streams_pieces_follow_one_another() -> None:
    backend = RecordingBackend()
    score_one(make_engine(backend), "ab", "c", "d", "e")
    assert backend.steps == "SSSS"


def test_scores_are_made_one_after_another() -> None:
    backend = RecordingBackend()
    engine = make_engine(backend)
    first, second = add(engine, "ab", "c", "d")[1], add(engine, "x", "y")[1]
    for _ in range(3):
        assert not second
        engine.step()
    assert first
    assert engine.num_waiting_requests == 1
    run(engine)
    assert second[0].result is not None


# --- room ---


def test_blocks_are_held_while_the_job_runs_and_no_longer() -> None:
    # 20 + 13 tokens: three blocks of 16. One candidate at a time goes on from the prompt.
    backend = RecordingBackend()
    engine = make_engine(backend)
    add(engine, "p" * 20, "a", "b" * 13)
    manager = engine.scheduler.block_manager
    engine.step()
    assert manager.num_blocks - manager.num_free_blocks == 3
    run(engine)


def test_request_that_can_never_fit_the_kv_cache_is_refused_with_the_number() -> None:
    engine = make_engine(MockBackend(num_kv_blocks=2))
    with pytest.raises(InvalidRequestError) as caught:
        add(engine, "p" * 30, "abc")
    (violation,) = caught.value.violations
    assert violation.field == "candidates"
    assert "48 tokens of KV cache at once and can never fit its 32" in violation.description
    with pytest.raises(InvalidRequestError, match="never fit"):
        add(engine, "p", "abc", calibration="p" * 30)
    score_one(engine, "p" * 29, "abc", "abc")


def test_job_waits_for_blocks_and_later_requests_do_not_overtake_it() -> None:
    # Four blocks: the stream holds three of them.
    backend = RecordingBackend(num_kv_blocks=4)
    engine = make_engine(backend)
    add_stream(engine, "a" * 30, 18)
    engine.step()
    _, outcomes = add(engine, "p" * 20, "cd")
    later = add_stream(engine, "z", 2)
    for _ in range(10):
        assert engine.step()
        assert all(s.sequence_id == 0 for s in engine.scheduler.running)
    assert not outcomes
    assert "S" not in backend.steps
    outputs = run(engine)
    assert outcomes[0].result is not None
    assert "".join(o.text for o in outputs[later]) == "ab"
    # It came before the later one's prefill.
    assert backend.steps.index("S") < backend.steps.rindex("P")


def test_job_does_not_overtake_an_earlier_request_that_waits() -> None:
    backend = RecordingBackend(num_kv_blocks=4)
    engine = make_engine(backend)
    add_stream(engine, "a" * 30, 18)  # three blocks
    add_stream(engine, "b" * 30, 18)  # waits for them
    engine.step()
    _, outcomes = add(engine, "p", "c")  # one block, which is free
    run(engine)
    assert outcomes[0].result is not None
    assert backend.steps.index("S") > backend.steps.rindex("P")


def test_job_takes_the_one_slot_of_a_backend_that_has_one() -> None:
    """As the deepspeed backend: nothing else may hold its workspace between the pieces."""
    backend = RecordingBackend(max_sequences=1)
    engine = make_engine(backend)
    add_stream(engine, "a", 4)
    add(engine, "ab", "c", "d")
    add_stream(engine, "b", 4)
    run(engine)
    assert backend.steps == "PDDD" + "SSS" + "PDDD"
