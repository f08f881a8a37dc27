"""Scoring: how likely the model finds each of several continuations of one prompt."""

from __future__ import annotations

from dataclasses import dataclass

from gptjet.service.engine.request import Timings, TokenLogprob

MAX_CANDIDATES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One accepted Score call; the wire message of the same name says what each field is.

    Times are `time.monotonic_ns()`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    calibration_token_ids: tuple[int, ...] | None = None
    arrival_ns: int
    deadline_ns: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScore:
    """One candidate's natural log-probability, in total and by token, and its share of them all."""

    index: int
    logprob: float
    tokens: tuple[TokenLogprob, ...]
    probability: float
    calibration_logprob: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """The answer to a ScoreRequest, in the order of its candidates."""

    request_id: str
    scores: tuple[CandidateScore, ...]
    prompt_tokens: int
    candidate_tokens: int
    timings: Timings
