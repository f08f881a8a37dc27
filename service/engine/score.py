"""Scoring: how likely the model finds each of several continuations of one prompt."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gptjet.service.engine.errors import FieldViolation, InvalidRequestError
from gptjet.service.engine.request import (
    MAX_REQUEST_ID_LENGTH,
    FinishReason,
    Timings,
    TokenLogprob,
)

MAX_CANDIDATES = 64
# Of all candidates together: what one call may take of the machine. 64 of 512 tokens fit.
MAX_CANDIDATE_TOKENS = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One accepted Score call; the wire message of the same name says what each field is.

    Times are `time.monotonic_ns()`. `trace` is a RequestObserver's, as in Request.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    calibration_token_ids: tuple[int, ...] | None = None
    arrival_ns: int
    deadline_ns: int | None = None
    trace: object = field(default=None, compare=False, repr=False)

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """The prompt, and the calibration prompt where there is one: one job each."""
        if self.calibration_token_ids is None:
            return (self.prompt_token_ids,)
        return (self.prompt_token_ids, self.calibration_token_ids)

    @property
    def candidate_tokens(self) -> int:
        """Tokens of all candidates together."""
        return sum(len(candidate) for candidate in self.candidates)


def new_score_request(
    prompt_token_ids: tuple[int, ...],
    candidates: tuple[tuple[int, ...], ...],
    *,
    calibration_token_ids: tuple[int, ...] | None = None,
    request_id: str = "",
    arrival_ns: int | None = None,
    deadline_ns: int | None = None,
    trace: object = None,
) -> ScoreRequest:
    """Build a ScoreRequest, drawing the id and the arrival time where they are not given."""
    return ScoreRequest(
        request_id=request_id or uuid.uuid4().hex,
        prompt_token_ids=prompt_token_ids,
        candidates=candidates,
        calibration_token_ids=calibration_token_ids,
        arrival_ns=time.monotonic_ns() if arrival_ns is None else arrival_ns,
        deadline_ns=deadline_ns,
        trace=trace,
    )


def validate_score_request(request: ScoreRequest, *, vocab_size: int, max_context: int) -> None:
    """Raise InvalidRequestError naming every field out of its limits for this model.

    `max_context` is the most tokens of a prompt and one candidate together.
    """
    violations = list(_violations(request, vocab_size, max_context))
    if violations:
        raise InvalidRequestError(*violations)


def refuse_many_candidates(count: int) -> None:
    """Raise InvalidRequestError unless there are 1 to MAX_CANDIDATES of them."""
    if not 1 <= count <= MAX_CANDIDATES:
        raise InvalidRequestError(
            FieldViolation("candidates", f"must be 1 to {MAX_CANDIDATES}, got {count}")
        )


def _violations(
    request: ScoreRequest, vocab_size: int, max_context: int
) -> Iterator[FieldViolation]:
    if len(request.request_id) > MAX_REQUEST_ID_LENGTH:
        yield FieldViolation(
            "request_id",
            f"must be at most {MAX_REQUEST_ID_LENGTH} characters, got {len(request.request_id)}",
        )
    refuse_many_candidates(len(request.candidates))
    candidates = request.candidates
    yield from _prompt_violations("prompt", "token_ids", request.prompt_token_ids, vocab_size)
    for index, candidate in enumerate(candidates):
        name = f"candidates[{index}]"
        yield from _prompt_violations(name, f"{name}.token_ids", candidate, vocab_size)
    total = request.candidate_tokens
    if total > MAX_CANDIDATE_TOKENS:
        yield FieldViolation(
            "candidates", f"must be at most {MAX_CANDIDATE_TOKENS} tokens together, got {total}"
        )
    yield from _context_violations("prompt", request.prompt_token_ids, candidates, max_context)
    calibration = request.calibration_token_ids
    if calibration is not None:
        name = "calibration_prompt"
        yield from _prompt_violations(name, "calibration_token_ids", calibration, vocab_size)
        yield from _context_violations(name, calibration, candidates, max_context)


def _prompt_violations(
    name: str, ids_name: str, token_ids: Sequence[int], vocab_size: int
) -> Iterator[FieldViolation]:
    if not token_ids:
        yield FieldViolation(name, "must hold at least one token, got none")
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            yield FieldViolation(
                f"{ids_name}.ids[{position}]",
                f"must be below the vocabulary of {vocab_size}, got {token_id}",
            )
            return  # one is enough: a prompt for another model has thousands


def _context_violations(
    name: str,
    prompt: Sequence[int],
    candidates: Sequence[Sequence[int]],
    max_context: int,
) -> Iterator[FieldViolation]:
    if len(prompt) >= max_context:
        yield FieldViolation(
            name,
            f"must leave room for one token in the context of {max_context}, "
            f"got {len(prompt)} tokens",
        )
        return
    room = max_context - len(prompt)
    for index, candidate in enumerate(candidates):
        if len(candidate) > room:
            yield FieldViolation(
                f"candidates[{index}]",
                f"{name} ({len(prompt)}) + candidate ({len(candidate)}) must be at most the "
                f"context of {max_context}: at most {room} here",
            )


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
    """The answer to a ScoreRequest, in the order of its candidates.

    timings  `prefill_ms` is the first piece of work, the prompt's; `decode_ms` what followed, other
             requests' steps between the pieces included. Nothing is sampled: `ttft_ms` is 0.
    """

    request_id: str
    scores: tuple[CandidateScore, ...]
    prompt_tokens: int
    candidate_tokens: int
    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOutcome:
    """How a score request ended: with a result, or with the reason why there is none.

    `error` goes with FinishReason.ERROR.
    """

    result: ScoreResult | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
