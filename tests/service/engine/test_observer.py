"""What the engine reports of its steps and requests: worked out by hand on the mock backend.

The mock's rule: after a lower-case letter the next one (`z` -> `a`), after an upper-case letter
the next one (`Z` -> end-of-text), after anything else `a`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.async_engine import AsyncEngine
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.observer import StepKind, StepReport
from gptjet.service.engine.request import (
    FinishReason,
    Request,
    RequestSummary,
    SamplingParams,
    new_request,
)
from gptjet.service.engine.score import ScoreOutcome, ScoreRequest, new_score_request
from gptjet.service.engine.tokenizer import ByteTokenizer


class Reports:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.requests: list[tuple[Request, RequestSummary]] = []
        self.scores: list[tuple[ScoreRequest, ScoreOutcome]] = []

    def step_ended(self, report: StepReport) -> None:
        self.steps.append(report)

    def request_ended(self, request: Request, summary: RequestSummary) -> None:
        self.requests.append((request, summary))

    def score_ended(self, request: ScoreRequest, outcome: ScoreOutcome) -> None:
        self.scores.append((request, outcome))

    @property
    def shapes(self) -> list[tuple[str, int, int, int, int, int, int]]:
        """(kind, sequences, computed, sampled, prompts', first tokens, gaps) of each step."""
        return [
            (
                str(step.kind),
                step.num_sequences,
                step.computed_prompt_tokens,
                step.output_tokens,
                step.prompt_tokens,
                len(step.ttft_ns),
                len(step.gaps_ns),
            )
            for step in self.steps
        ]


class Failing(Reports):
    def step_ended(self, report: StepReport) -> None:
        super().step_ended(report)
        raise RuntimeError("the counter overflowed")

    def request_ended(self, request: Request, summary: RequestSummary) -> None:
        raise RuntimeError("the counter overflowed")


def observed(reports: Reports, config: EngineConfig | None = None, **backend: Any) -> Engine:
    return Engine(MockBackend(**backend), ByteTokenizer(), config, reports)


def add(engine: Engine, prompt: str, **params: Any) -> int:
    return engine.add(new_request(tuple(prompt.encode()), SamplingParams(**params)))


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def test_each_step_is_reported_once_with_what_it_did() -> None:
    # "abc" -> d in the prefill, e and f in two decode steps.
    reports = Reports()
    engine = observed(reports)
    add(engine, "abc", max_new_tokens=3)
    run(engine)
    assert reports.shapes == [
        ("prefill", 1, 3, 1, 3, 1, 0),
        ("decode", 1, 0, 1, 0, 0, 1),
        ("decode", 1, 0, 1, 0, 0, 1),
    ]


def test_a_batch_has_one_gap_a_sequence_and_one_first_token_a_request() -> None:
    reports = Reports()
    engine = observed(reports, paged=True, block_size=4, max_prefill_batch_size=4)
    add(engine, "ab", max_new_tokens=2)
    add(engine, "abcdef", max_new_tokens=2, n=2)
    run(engine)
    # One prefill of both prompts, whose three sequences get their first tokens; one decode of all.
    assert reports.shapes == [("prefill", 2, 8, 3, 8, 2, 0), ("decode", 3, 0, 3, 0, 0, 3)]


def test_chunks_of_a_prompt_have_one_first_token_at_their_end() -> None:
    reports = Reports()
    engine = observed(reports, paged=True, block_size=4, max_prefill_tokens=4)
    add(engine, "abcdefghij", max_new_tokens=1)
    run(engine)
    assert reports.shapes == [
        ("prefill", 1, 4, 0, 0, 0, 0),
        ("prefill", 1, 4, 0, 0, 0, 0),
        ("prefill", 1, 2, 1, 10, 1, 0),
    ]


def test_drafts_that_are_accepted_are_tokens_but_one_gap() -> None:
    reports = Reports()
    engine = observed(reports, paged=True, block_size=4, max_draft_tokens=4)
    # The prompt goes round the alphabet, so it has the right guesses.
    prompt = "abcdefghijklmnopqrstuvwxyzabc"
    add(engine, prompt, max_new_tokens=6, prompt_lookup_tokens=4)
    run(engine)
    assert [(s.output_tokens, len(s.gaps_ns)) for s in reports.steps] == [(1, 0), (5, 1)]


def test_tokens_of_the_prefix_cache_are_not_computed_but_are_of_the_prompt() -> None:
    reports = Reports()
    engine = observed(reports, paged=True, block_size=4)
    add(engine, "abcdefghij", max_new_tokens=1)
    run(engine)
    add(engine, "abcdefghij", max_new_tokens=1)
    run(engine)
    # Two of its blocks are there; the third is not full.
    assert [(s.computed_prompt_tokens, s.prompt_tokens) for s in reports.steps] == [
        (10, 10),
        (2, 10),
    ]


def test_a_preempted_sequence_waits_once_for_its_first_token_and_is_counted() -> None:
    reports = Reports()
    engine = observed(reports, EngineConfig(), paged=True, block_size=4, num_kv_blocks=6)
    for prompt in ("abcd", "klmn"):
        add(engine, prompt, max_new_tokens=16)
    run(engine)
    assert engine.scheduler.num_preemptions == 1
    assert sum(len(step.ttft_ns) for step in reports.steps) == 2
    assert sum(step.output_tokens for step in reports.steps) == 32
    assert sum(len(step.gaps_ns) for step in reports.steps) == 30
    assert sum(step.prompt_tokens for step in reports.steps) == 8
    assert sum(step.computed_prompt_tokens for step in reports.steps) > 8


def test_pieces_of_a_score_request_are_steps_of_their_own_kind() -> None:
    reports = Reports()
    engine = observed(reports)
    ended: list[ScoreOutcome] = []
    engine.add_score(new_score_request((97, 98), ((99,), (100, 101))), ended.append)
    run(engine)
    assert len(ended) == 1
    assert {step.kind for step in reports.steps} == {StepKind.SCORE}
    assert {step.num_sequences for step in reports.steps} == {1}


def test_times_are_those_between_arrival_steps_and_tokens() -> None:
    reports = Reports()
    engine = observed(reports, prefill_ms=20, decode_ms=10)
    arrival_ns = time.monotonic_ns() - 5_000_000_000
    engine.add(new_request((97,), SamplingParams(max_new_tokens=2), arrival_ns=arrival_ns))
    before_ns = time.monotonic_ns()
    run(engine)
    after_ns = time.monotonic_ns()
    prefill, decode = reports.steps
    assert before_ns <= prefill.started_ns < decode.started_ns
    assert prefill.duration_ns >= 20_000_000
    assert decode.duration_ns >= 10_000_000
    assert prefill.duration_ns + decode.duration_ns <= after_ns - before_ns
    assert prefill.ttft_ns[0] >= 5_020_000_000
    # From token to token: the decode step, and what the loop does between the two.
    assert 10_000_000 <= decode.gaps_ns[0] <= after_ns - before_ns


def test_a_step_in_which_nothing_can_run_is_not_reported() -> None:
    reports = Reports()
    engine = observed(reports)
    engine.step()
    assert reports.steps == []


def test_an_observer_that_raises_is_logged_once_and_fails_no_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reports = Failing()
    engine = observed(reports)
    key = add(engine, "abc", max_new_tokens=3)
    text = ""
    with caplog.at_level(logging.ERROR):
        while engine.has_work:
            text += "".join(output.text for got, output in engine.step() if got == key)
    assert text == "def"
    assert len(reports.steps) == 3
    assert len(caplog.records) == 1


@pytest.fixture
def async_engine() -> Iterator[Callable[[Reports], AsyncEngine]]:
    def make(reports: Reports) -> AsyncEngine:
        return AsyncEngine(
            MockBackend(decode_ms=1),
            ByteTokenizer(),
            step_observer=reports,
            request_observers=(reports,),
        )

    return make


async def test_every_request_ends_with_one_report_also_a_cancelled_one(
    async_engine: Callable[[Reports], AsyncEngine],
) -> None:
    reports = Reports()
    engine = async_engine(reports)
    await engine.start()
    finished = engine.submit(new_request((97,), SamplingParams(max_new_tokens=2), trace="mine"))
    left = engine.submit(new_request((97,), SamplingParams(max_new_tokens=400)))
    async for _ in left:
        await left.aclose()  # as a caller does that has gone
    async for _ in finished:
        pass
    call = engine.submit_score(new_score_request((97,), ((98,),), trace="score"))
    await call.outcome()
    await engine.stop()
    reasons = {summary.finish_reason for _, summary in reports.requests}
    assert reasons == {FinishReason.LENGTH, FinishReason.CANCELLED}
    assert len(reports.requests) == 2
    assert "mine" in [request.trace for request, _ in reports.requests]
    assert [request.trace for request, _ in reports.scores] == ["score"]
    assert reports.steps


async def test_a_request_observer_that_raises_keeps_no_output_back(
    async_engine: Callable[[Reports], AsyncEngine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = async_engine(Failing())
    await engine.start()
    stream = engine.submit(new_request((97,), SamplingParams(max_new_tokens=3)))
    text = "".join([output.text async for output in stream])
    await engine.stop()
    assert text == "bcd"
    assert "an observer of the requests failed" in caplog.text
