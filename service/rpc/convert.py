"""Messages to the engine's types and back. Only the servicer uses it."""

from __future__ import annotations

import math
import struct
from typing import TypeAlias

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service.engine.backend import BackendSpec, ParityStatus, ParityVerdict
from gptjet.service.engine.errors import FieldViolation, InvalidRequestError
from gptjet.service.engine.request import (
    MAX_LOGIT_BIAS_ENTRIES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    FinishReason,
    RequestOutput,
    RequestSummary,
    SamplingParams,
    SequenceSummary,
    Speculation,
    Timings,
    TokenLogprob,
)
from gptjet.service.engine.score import ScoreResult

GenerateMessage: TypeAlias = pb.GenerateRequest | pb.GenerateStreamRequest

_FINISH_REASON = {
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_PARITY = {
    ParityStatus.NOT_RUN: pb.ParityVerdict.STATUS_NOT_RUN,
    ParityStatus.PASSED: pb.ParityVerdict.STATUS_PASSED,
    ParityStatus.FAILED: pb.ParityVerdict.STATUS_FAILED,
}
_SCALARS = (
    "max_new_tokens",
    "min_new_tokens",
    "top_k",
    "no_repeat_ngram_size",
    "prompt_lookup_tokens",
    "seed",
    "n",
    "ignore_eos",
    "logprobs",
    "echo",
)
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def sampling_params_from_pb(message: pb.SamplingParams) -> SamplingParams:
    """Fields that are absent get the engine's defaults.

    Raises InvalidRequestError where a list is over its bound. The bounds are the engine's; looking
    here keeps a message of a million stop strings from being copied and picked apart first.
    """
    _refuse_long_lists(message)
    values = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    values |= {
        name: shortest_decimal(getattr(message, name)) for name in _FLOATS if message.HasField(name)
    }
    return SamplingParams(
        **values,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias={key: shortest_decimal(bias) for key, bias in message.logit_bias.items()},
    )


def _refuse_long_lists(message: pb.SamplingParams) -> None:
    lengths = (
        ("stop", len(message.stop), MAX_STOP_STRINGS, "strings"),
        ("stop_token_ids", len(message.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids"),
        ("logit_bias", len(message.logit_bias), MAX_LOGIT_BIAS_ENTRIES, "ids"),
    )
    violations = [
        FieldViolation(f"sampling_params.{name}", f"must be at most {limit} {what}, got {length}")
        for name, length, limit, what in lengths
        if length > limit
    ]
    if violations:
        raise InvalidRequestError(*violations)


def shortest_decimal(value: float) -> float:
    """The decimal number with the fewest digits that is `value` in float32.

    The wire holds float32: 0.7 arrives as 0.699999988079071. This gives 0.7 back, so that a request
    samples the same tokens over the wire as in-process, and errors show what the caller wrote.
    """
    if not math.isfinite(value):
        return value
    for digits in range(6, 9):
        candidate = float(f"{value:.{digits}g}")
        try:
            if struct.unpack("<f", struct.pack("<f", candidate))[0] == value:
                return candidate
        except OverflowError:  # rounded up past the largest float32
            continue
    return float(f"{value:.9g}")  # nine digits always suffice


def chunk_to_pb(output: RequestOutput) -> pb.TokenChunk:
    """What one step added to one sequence."""
    return pb.TokenChunk(
        index=output.index,
        text=output.text,
        token_ids=output.token_ids,
        logprobs=[_logprob_to_pb(logprob) for logprob in output.logprobs],
        is_prompt=output.is_prompt,
    )


def append_output(sequence: pb.GeneratedSequence, texts: list[str], output: RequestOutput) -> None:
    """Add one step to a sequence of a unary response; its text is `texts` joined, at the end."""
    texts.append(output.text)
    sequence.token_ids.extend(output.token_ids)
    sequence.logprobs.extend(_logprob_to_pb(logprob) for logprob in output.logprobs)


def _logprob_to_pb(logprob: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        top=[pb.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top],
    )


def summary_to_pb(summary: RequestSummary) -> pb.GenerationSummary:
    """The end of a request."""
    return pb.GenerationSummary(
        request_id=summary.request_id,
        finish_reason=_FINISH_REASON[summary.finish_reason],
        usage=pb.Usage(
            prompt_tokens=summary.prompt_tokens, completion_tokens=summary.completion_tokens
        ),
        timings=_timings_to_pb(summary.timings),
        sequences=[_sequence_summary_to_pb(sequence) for sequence in summary.sequences],
        seed=summary.seed,
        speculation=_speculation_to_pb(summary.speculation),
        cached_prompt_tokens=summary.cached_prompt_tokens,
    )


def _speculation_to_pb(speculation: Speculation | None) -> pb.Speculation | None:
    if speculation is None:
        return None
    return pb.Speculation(
        drafted_tokens=speculation.drafted_tokens,
        accepted_tokens=speculation.accepted_tokens,
        decode_steps=speculation.decode_steps,
    )


def _timings_to_pb(timings: Timings) -> pb.Timings:
    return pb.Timings(
        queue_ms=timings.queue_ms,
        prefill_ms=timings.prefill_ms,
        decode_ms=timings.decode_ms,
        ttft_ms=timings.ttft_ms,
        e2e_ms=timings.e2e_ms,
    )


def score_result_to_pb(result: ScoreResult) -> pb.ScoreResponse:
    """The scores of one prompt's candidates."""
    return pb.ScoreResponse(
        request_id=result.request_id,
        scores=[
            pb.CandidateScore(
                index=score.index,
                logprob=score.logprob,
                tokens=[_logprob_to_pb(token) for token in score.tokens],
                probability=score.probability,
                calibration_logprob=score.calibration_logprob,
            )
            for score in result.scores
        ],
        usage=pb.Usage(
            prompt_tokens=result.prompt_tokens, completion_tokens=result.candidate_tokens
        ),
        timings=_timings_to_pb(result.timings),
    )


def _sequence_summary_to_pb(sequence: SequenceSummary) -> pb.SequenceSummary:
    match = sequence.stop_match
    return pb.SequenceSummary(
        index=sequence.index,
        finish_reason=_FINISH_REASON[sequence.finish_reason],
        completion_tokens=sequence.completion_tokens,
        stop_string=match if isinstance(match, str) else None,
        stop_token_id=match if isinstance(match, int) else None,
    )


def spec_to_pb(spec: BackendSpec) -> pb.GetModelResponse:
    """What the backend says of itself; limits of the engine and the server are the caller's."""
    return pb.GetModelResponse(
        name=spec.model_name,
        architecture=spec.architecture,
        backend=spec.name,
        device=spec.device,
        dtype=spec.dtype,
        num_parameters=spec.num_parameters,
        vocab_size=spec.vocab_size,
        max_context=spec.max_context,
        max_sequences=spec.max_sequences,
        max_batch_size=spec.max_batch_size,
        block_size=spec.block_size,
        num_kv_blocks=spec.num_kv_blocks,
        eos_token_id=spec.eos_token_ids[0] if spec.eos_token_ids else None,
        parity=_parity_to_pb(spec.parity),
    )


def _parity_to_pb(parity: ParityVerdict) -> pb.ParityVerdict:
    return pb.ParityVerdict(
        status=_PARITY[parity.status],
        max_relative_error=parity.max_relative_error,
        tokens_compared=parity.tokens_compared,
        tokens_agreed=parity.tokens_agreed,
        detail=parity.detail,
    )
