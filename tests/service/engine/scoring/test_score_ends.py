"""Scores that are cancelled, come too late or fail, and the queue they wait in."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from typing import Any

import pytest
import torch

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import ScoreJob
from gptjet.service.engine.errors import EngineStepError, QueueFullError
from gptjet.service.engine.request import FinishReason
from gptjet.service.engine.score import ScoreOutcome

from .conftest import (
    RecordingBackend,
    add,
    add_stream,
    assert_nothing_left,
    make_engine,
    run,
)

# --- ends ---


@pytest.mark.parametrize("pieces_run", [0, 1, 2])
def test_cancelled_score_frees_what_it_holds_at_once(pieces_run: int) -> None:
    engine = make_engine()
    key, outcomes = add(engine, "ab", "c", "d", "e", calibration="x")
    for _ in range(pieces_run):
        engine.step()
    assert engine.cancel(key) == []
    assert_nothing_left(engine)
    (outcome,) = outcomes
    assert outcome == ScoreOutcome(finish_reason=FinishReason.CANCELLED)
    engine.cancel(key)
    assert len(outcomes) == 1


def test_cancelled_score_that_waits_for_room_lets_others_pass() -> None:
    engine = make_engine(RecordingBackend(num_kv_blocks=4))
    add_stream(engine, "a" * 30, 18)
    engine.step()
    key, _ = add(engine, "p" * 20, "cd")
    later = add_stream(engine, "z", 2)
    engine.step()
    engine.cancel(key)
    outputs = run(engine)
    assert outputs[later][-1].finish_reason is FinishReason.LENGTH


def test_deadline_ends_a_score_that_waits_and_one_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()
    soon = time.monotonic_ns() + 3600 * 10**9
    running = add(engine, "ab", "c", "d", deadline_ns=soon)[1]
    waiting = add(engine, "ab", "c", deadline_ns=soon)[1]
    in_time = add(engine, "ab", "c", deadline_ns=soon + 3600 * 10**9)[1]
    engine.step()
    assert not running
    monkeypatch.setattr("time.monotonic_ns", lambda: soon + 1)
    engine.step()
    assert running == waiting == [ScoreOutcome(finish_reason=FinishReason.DEADLINE)]
    run(engine)
    assert in_time[0].result is not None


@pytest.mark.parametrize("piece", [0, 1, 2])
def test_failing_piece_fails_that_score_alone(piece: int, caplog: pytest.LogCaptureFixture) -> None:
    backend = RecordingBackend(fail_in=piece)
    engine = make_engine(backend)
    stream = add_stream(engine, "a", 9)
    broken = add(engine, "ab", "c", "d")[1]
    text = "".join(output.text for _ in range(12) for _, output in engine.step())
    backend.fail_in = None
    good = add(engine, "ab", "c")[1]
    text += "".join(o.text for o in run(engine).get(stream, []))
    (outcome,) = broken
    assert outcome.finish_reason is FinishReason.ERROR
    assert isinstance(outcome.error, EngineStepError)
    # The class, and not the message, which may hold what no caller should see; the log has it.
    assert "ZeroDivisionError" in str(outcome.error)
    assert "kernel broke" not in str(outcome.error)
    assert outcome.error.error_id in caplog.text
    assert "the kernel broke" in caplog.text
    assert good[0].result is not None
    assert text == "bcdefghij"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: (result[0], result[1] * math.nan), "not finite for candidate 1"),
        (lambda result: (result[0] - math.inf, result[1]), "not finite for candidate 0"),
        (lambda result: result[:1], "RuntimeError"),
        (lambda result: (result[0], torch.zeros(3)), "RuntimeError"),
    ],
)
def test_answer_that_is_not_a_finite_number_a_token_is_an_error(
    change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = RecordingBackend()
    monkeypatch.setattr(backend, "change", change)
    engine = make_engine(backend)
    _, outcomes = add(engine, "ab", "c", "d")
    run(engine)
    assert message in str(outcomes[0].error)


def test_backend_that_fails_to_close_a_job_still_gives_the_room_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Sticky(MockBackend):
        def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
            try:
                yield
            finally:
                raise OSError("it sticks")

    engine = make_engine(Sticky())
    key, outcomes = add(engine, "ab", "c")
    engine.step()
    engine.cancel(key)
    assert_nothing_left(engine)
    assert outcomes[0].finish_reason is FinishReason.CANCELLED
    assert "it sticks" in caplog.text


def test_a_bug_of_ours_ends_every_score_too() -> None:
    engine = make_engine()
    both = [add(engine, "ab", "c")[1], add(engine, "ab", "c")[1]]
    engine.step()
    engine.fail(None, KeyError("a bug"))
    assert [outcomes[0].finish_reason for outcomes in both] == [FinishReason.ERROR] * 2
    assert_nothing_left(engine)


def test_scores_and_requests_wait_in_one_bounded_queue() -> None:
    engine = make_engine(max_queue_size=2)
    add_stream(engine, "a", 3)
    add(engine, "ab", "c")
    with pytest.raises(QueueFullError):
        add(engine, "ab", "c")
    with pytest.raises(QueueFullError):
        add_stream(engine, "a", 3)
    run(engine)
    add(engine, "ab", "c")
    run(engine)


def test_stale_deadlines_of_scores_are_dropped_and_those_in_force_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(max_queue_size=1000)
    soon, far = (time.monotonic_ns() + hours * 3600 * 10**9 for hours in (1, 3))
    _, waiting = add(engine, "ab", "c", deadline_ns=soon)
    for _ in range(300):
        key, _ = add(engine, "ab", "c", deadline_ns=far)
        engine.cancel(key)
    assert len(engine._deadlines) < 100
    monkeypatch.setattr("time.monotonic_ns", lambda: soon + 1)
    engine.step()
    assert waiting[0].finish_reason is FinishReason.DEADLINE
