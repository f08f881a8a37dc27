"""Score requests through the engine over the mock, whose log-probabilities are worked out by hand.

After any token, the mock's likeliest next one has log-probability ln(1 - 1/e), the id after it one
less, and so on round the 257 ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import torch

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import ScheduledBatch, ScoreJob
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.request import (
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
