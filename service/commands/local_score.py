"""Scores from a model in this process, as the client gives them."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from gptjet.service import client
from gptjet.service.commands.sampling import flag_of
from gptjet.service.commands.terminal import ExitCode, fail
from gptjet.service.engine.errors import InvalidRequestError
from gptjet.service.engine.request import FinishReason
from gptjet.service.engine.score import ScoreOutcome, ScoreResult, new_score_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptjet.service.engine.engine import Engine


def score_here(
    engine: Engine,
    prompt: str,
    candidates: Sequence[str],
    calibration: str | None,
    *,
    request_id: str = "",
    timeout_s: float,
) -> client.ScoreResult:
    """Score the candidates in the caller's thread.

    Ends the command where the request cannot be served, fails, or takes over `timeout_s`.
    """

    def ids(text: str) -> tuple[int, ...]:
        # As in the server: no text stays none, even where the model has a start token.
        return tuple(engine.tokenizer.encode(text)) if text else ()

    now_ns = time.monotonic_ns()
    request = new_score_request(
        ids(prompt),
        tuple(ids(candidate) for candidate in candidates),
        calibration_token_ids=None if calibration is None else ids(calibration),
        request_id=request_id,
        arrival_ns=now_ns,
        deadline_ns=None if math.isinf(timeout_s) else now_ns + int(timeout_s * 1e9),
    )
    outcomes: list[ScoreOutcome] = []
    try:
        key = engine.add_score(request, outcomes.append)
    except InvalidRequestError as error:
        lines = [f"{flag_of(v.field)}: {v.description}" for v in error.violations]
        fail("\n".join(lines), ExitCode.USAGE)
    try:
        while not outcomes:
            engine.step()
    finally:
        engine.cancel(key)
    (outcome,) = outcomes
    if outcome.error is not None:
        fail(str(outcome.error), ExitCode.FAILURE)
    if outcome.finish_reason is FinishReason.DEADLINE:
        fail(f"timed out after {timeout_s:g} s (--timeout)", ExitCode.TIMEOUT)
    assert outcome.result is not None
    return _as_the_client_does(outcome.result)


def _as_the_client_does(result: ScoreResult) -> client.ScoreResult:
    timings = result.timings
    return client.ScoreResult(
        request_id=result.request_id,
        scores=tuple(
            client.CandidateScore(
                index=item.index,
                logprob=item.logprob,
                tokens=tuple(
                    client.TokenLogprob(token.token_id, token.logprob) for token in item.tokens
                ),
                probability=item.probability,
                calibration_logprob=item.calibration_logprob,
            )
            for item in result.scores
        ),
        prompt_tokens=result.prompt_tokens,
        candidate_tokens=result.candidate_tokens,
        timings=client.Timings(
            queue_ms=timings.queue_ms,
            prefill_ms=timings.prefill_ms,
            decode_ms=timings.decode_ms,
            ttft_ms=timings.ttft_ms,
            e2e_ms=timings.e2e_ms,
        ),
    )
