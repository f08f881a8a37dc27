"""Score requests through the engine over the mock, whose log-probabilities are worked out by hand.

After any token, the mock's likeliest next one has log-probability ln(1 - 1/e), the id after it one
less, and so on round the 257 ids.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import ScheduledBatch, ScoreJob
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.errors import EngineStepError, InvalidRequestError, QueueFullError
from gptjet.service.engine.request import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    new_request,
)
from gptjet.service.engine.score import ScoreOutcome, ScoreRequest, new_score_request
from gptjet.service.engine.tokenizer import ByteTokenizer

BEST = math.log(1 - 1 / math.e)


class RecordingBackend(MockBackend):
    """Writes down what runs: P, D, and S for a piece of a score job. `fail_in` breaks a piece."""

    def __init__(self, *, fail_in: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.steps = ""
        self.jobs: list[ScoreJob] = []
        self.fail_in = fail_in
        self.on_piece: Callable[[], None] = lambda: None

    def prefill(self, batch: ScheduledBatch) -> Any:
        self.steps += "P"
        return super().prefill(batch)

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        self.steps += "D"
        return super().decode(batch)

    def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        self.jobs.append(job)
        pieces = super().score(job)
        try:
            for piece in range(1000):
                self.steps += "S"
                self.on_piece()
                if piece == self.fail_in:
                    raise ZeroDivisionError("the kernel broke")
                try:
                    next(pieces)
                except StopIteration as stop:
                    return self.change(stop.value)
                yield
        finally:
            pieces.close()
        raise AssertionError("a job of the mock ends")

    def change(self, result: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return result


def make_engine(backend: MockBackend | None = None, **config: Any) -> Engine:
    return Engine(backend or RecordingBackend(), ByteTokenizer(), EngineConfig(**config))


def score_request(prompt: str, *candidates: str, **options: Any) -> ScoreRequest:
    calibration = options.pop("calibration", None)
    return new_score_request(
        tuple(prompt.encode()),
        tuple(tuple(candidate.encode()) for candidate in candidates),
        calibration_token_ids=None if calibration is None else tuple(calibration.encode()),
        **options,
    )


def add(engine: Engine, *texts: str, **options: Any) -> tuple[int, list[ScoreOutcome]]:
    """Queue a score; its one outcome will be in the list."""
    outcomes: list[ScoreOutcome] = []
    return engine.add_score(score_request(*texts, **options), outcomes.append), outcomes


def add_stream(engine: Engine, prompt: str, tokens: int) -> int:
    return engine.add(new_request(tuple(prompt.encode()), SamplingParams(max_new_tokens=tokens)))


def run(engine: Engine) -> dict[int, list[RequestOutput]]:
    outputs: dict[int, list[RequestOutput]] = {}
    while engine.has_work:
        for key, output in engine.step():
            outputs.setdefault(key, []).append(output)
        engine.scheduler.block_manager.check_invariants()
    assert_nothing_left(engine)
    return outputs


def assert_nothing_left(engine: Engine) -> None:
    assert not engine.has_work
    assert (engine.num_requests, engine.num_waiting_requests) == (0, 0)
    assert not engine.scheduler.has_work
    manager = engine.scheduler.block_manager
    manager.check_invariants()
    assert manager.num_free_blocks == manager.num_blocks
    assert isinstance(engine.backend, MockBackend)
    assert engine.backend.cached == {}


def score_one(engine: Engine, *texts: str, **options: Any) -> Any:
    _, outcomes = add(engine, *texts, **options)
    run(engine)
    (outcome,) = outcomes
    assert outcome.result is not None, outcome
    return outcome.result


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


def test_deadline_ends_a_score_that_waits_and_one_that_runs() -> None:
    engine = make_engine()
    soon = time.monotonic_ns() + 50_000_000
    running = add(engine, "ab", "c", "d", deadline_ns=soon)[1]
    waiting = add(engine, "ab", "c", deadline_ns=soon)[1]
    in_time = add(engine, "ab", "c", deadline_ns=soon + 10**12)[1]
    engine.step()
    assert not running
    time.sleep(0.06)
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


def test_stale_deadlines_of_scores_are_dropped_and_those_in_force_kept() -> None:
    engine = make_engine(max_queue_size=1000)
    far = time.monotonic_ns() + 10**13
    _, waiting = add(engine, "ab", "c", deadline_ns=time.monotonic_ns() + 10**8)
    for _ in range(300):
        key, _ = add(engine, "ab", "c", deadline_ns=far)
        engine.cancel(key)
    assert len(engine._deadlines) < 100
    time.sleep(0.11)
    engine.step()
    assert waiting[0].finish_reason is FinishReason.DEADLINE
