"""How a request ends: its summary, and what its caller is told of a failure."""

from __future__ import annotations

import logging
import time
import uuid
from typing import TYPE_CHECKING

from gptjet.service.engine.errors import EngineError, EngineStepError, OutOfMemoryError
from gptjet.service.engine.faults import is_out_of_memory
from gptjet.service.engine.request import (
    FinishReason,
    Request,
    RequestOutput,
    RequestSummary,
    SequenceSummary,
    Speculation,
    Timings,
)
from gptjet.service.engine.score import ScoreOutcome, ScoreRequest

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from gptjet.service.engine.sequence import Sequence

logger = logging.getLogger(__name__)

_NS_PER_MS = 1e6


def rest_of(sequence: Sequence) -> str:
    """The text that was held back, of a sequence that is aborted.

    Empty where the tokenizer raises, as it may have done before: an abort must not fail.
    """
    try:
        return sequence.detokenizer.flush()
    except Exception:
        logger.exception("the end of sequence %d cannot be decoded", sequence.sequence_id)
        return ""


def summarize(request: Request, sequences: Seq[Sequence], *, can_verify: bool) -> RequestSummary:
    """The end of a request whose sequences have all ended.

    can_verify  the backend verifies guesses, so that there is something to say of them
    """
    asked = request.sampling_params.prompt_lookup_tokens > 0
    now_ns = time.monotonic_ns()
    first_step_ns = min((s.first_step_ns for s in sequences if s.first_step_ns), default=now_ns)
    first_token_ns = min((s.first_token_ns for s in sequences if s.first_token_ns), default=0)
    last_token_ns = max(s.last_token_ns for s in sequences)

    def ms(start_ns: int, end_ns: int) -> float:
        return max(0, end_ns - start_ns) / _NS_PER_MS

    timings = Timings(
        queue_ms=ms(request.arrival_ns, first_step_ns),
        prefill_ms=ms(first_step_ns, first_token_ns) if first_token_ns else 0.0,
        decode_ms=ms(first_token_ns, last_token_ns) if first_token_ns else 0.0,
        ttft_ms=ms(request.arrival_ns, first_token_ns) if first_token_ns else 0.0,
        e2e_ms=ms(request.arrival_ns, last_token_ns or now_ns),
    )
    return RequestSummary(
        request_id=request.request_id,
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=sum(len(s.output_token_ids) for s in sequences),
        timings=timings,
        sequences=tuple(
            SequenceSummary(
                index=s.index,
                finish_reason=s.finish_reason or FinishReason.ERROR,
                completion_tokens=len(s.output_token_ids),
                stop_match=s.stop_match,
            )
            for s in sequences
        ),
        seed=request.seed,
        cached_prompt_tokens=sequences[0].num_cached_prompt_tokens,
        speculation=_speculation(sequences) if asked and can_verify else None,
    )


def refusal(request: Request, error: Exception) -> RequestOutput:
    """The one output of a request that failed before it was queued; logs the error."""
    ids = (request.request_id,) * request.sampling_params.n
    return ended(request, log_failure(error, ids))


def ended(request: Request, error: EngineError) -> RequestOutput:
    """The last output of a request that no engine can say more of."""
    sequence = SequenceSummary(index=0, finish_reason=FinishReason.ERROR, completion_tokens=0)
    return RequestOutput(
        request_id=request.request_id,
        finish_reason=FinishReason.ERROR,
        error=error,
        summary=RequestSummary(
            request_id=request.request_id,
            prompt_tokens=len(request.prompt_token_ids),
            completion_tokens=0,
            timings=Timings(),
            sequences=(sequence,),
            seed=request.seed,
        ),
    )


def refused_score(request: ScoreRequest, error: Exception) -> ScoreOutcome:
    """The outcome of a score request that failed before it was queued; logs the error."""
    told = log_failure(error, (request.request_id,))
    return ScoreOutcome(finish_reason=FinishReason.ERROR, error=told)


def log_failure(error: Exception, request_ids: Seq[str]) -> EngineStepError:
    """Log an error with its traceback; what a caller may know of it, with the id of the entry.

    request_ids  of the sequences that it ends, one for each
    """
    error_id = uuid.uuid4().hex[:12]
    logger.error(
        "engine step failed, error id %s, %d sequences",
        error_id,
        len(request_ids),
        exc_info=error,
        extra={"error_id": error_id, "request_ids": list(dict.fromkeys(request_ids))},
    )
    # A foreign exception's message stays in the log: it may hold what no caller should see.
    detail = str(error) if isinstance(error, EngineError) else type(error).__name__
    if is_out_of_memory(error):
        return OutOfMemoryError(error_id, detail)
    return EngineStepError(error_id, detail)


def _speculation(sequences: Seq[Sequence]) -> Speculation:
    return Speculation(
        drafted_tokens=sum(s.num_drafted_tokens for s in sequences),
        accepted_tokens=sum(s.num_accepted_tokens for s in sequences),
        decode_steps=sum(s.num_decode_steps for s in sequences),
    )
