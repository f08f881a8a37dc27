"""Between the client's types and the messages, for the sync and the async client alike."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import FieldDescriptor
from grpc_health.v1 import health_pb2

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service import client_types as types

_FLOAT32_MAX = 3.4028234663852886e38
_INTEGER_RANGE = {
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_GenerateMessage = TypeVar("_GenerateMessage", pb.GenerateRequest, pb.GenerateStreamRequest)


# --- requests ---


class _BadValueError(Exception):
    """A value that its field cannot hold; the message says what it can."""


def generate_request(
    message_type: type[_GenerateMessage],
    prompt: types.Prompt,
    request_id: str,
    options: Mapping[str, Any],
) -> _GenerateMessage:
    """The message of a call.

    Raises TypeError for an option there is not, and InvalidRequestError naming every value that
    its field cannot hold. What the model allows is the server's to check.
    """
    violations: list[types.FieldViolation] = []
    message = message_type()
    _assign_prompt(violations, message, prompt)
    _assign(violations, "request_id", lambda: setattr(message, "request_id", _text(request_id)))
    _fill_sampling_params(message.sampling_params, options, violations)
    _raise_if_any(violations)
    return message


def score_request(
    prompt: types.Prompt,
    candidates: Sequence[types.Prompt],
    calibration_prompt: types.Prompt | None,
    request_id: str,
) -> pb.ScoreRequest:
    """The message of a Score call.

    Raises InvalidRequestError naming every value that its field cannot hold. How many candidates
    there may be, and how long, is the server's to check.
    """
    violations: list[types.FieldViolation] = []
    message = pb.ScoreRequest()
    _assign_prompt(violations, message, prompt)
    _assign(violations, "request_id", lambda: setattr(message, "request_id", _text(request_id)))
    # One text is a sequence of texts to Python: its characters.
    if isinstance(candidates, str) or not isinstance(candidates, Iterable):
        violations.append(
            types.FieldViolation("candidates", f"must be a list of candidates, got {candidates!r}")
        )
    else:
        for position, candidate in enumerate(candidates):
            path = f"candidates[{position}]."
            _assign_prompt(violations, message.candidates.add(), candidate, prefix=path)
    if calibration_prompt is not None:
        _assign_prompt(violations, message, calibration_prompt, name_prefix="calibration_")
    _raise_if_any(violations)
    return message


def text_request(text: str) -> pb.TokenizeRequest:
    """Raises InvalidRequestError for what is not Unicode text."""
    violations: list[types.FieldViolation] = []
    message = pb.TokenizeRequest()
    _assign(violations, "text", lambda: setattr(message, "text", _text(text)))
    _raise_if_any(violations)
    return message


def ids_request(ids: Iterable[int]) -> pb.DetokenizeRequest:
    """Raises InvalidRequestError for what is not an id."""
    violations: list[types.FieldViolation] = []
    message = pb.DetokenizeRequest()
    _extend(violations, "ids", message.ids, ids, _uint32)
    _raise_if_any(violations)
    return message


def _fill_sampling_params(
    message: pb.SamplingParams,
    options: Mapping[str, Any],
    violations: list[types.FieldViolation],
) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    for name, value in options.items():
        field = fields.get(name)
        if field is None:
            near = difflib.get_close_matches(name, fields)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(f"there is no sampling option {name!r}{hint}")
        if value is None:
            continue
        path = f"sampling_params.{name}"
        if name == "logit_bias":
            for key, bias in value.items():
                _assign(
                    violations,
                    f"{path}[{key}]",
                    lambda k=key, b=bias: operator.setitem(
                        message.logit_bias, _uint32(k), _float32(b)
                    ),
                )
        elif field.is_repeated:
            values = [value] if isinstance(value, str) else value
            convert = _text if name == "stop" else _uint32
            _extend(violations, path, getattr(message, name), values, convert)
        else:
            _assign(
                violations,
                path,
                lambda n=name, f=field, v=value: setattr(message, n, _scalar(f, v)),
            )


def _assign_prompt(
    violations: list[types.FieldViolation],
    message: Any,
    value: types.Prompt,
    *,
    prefix: str = "",
    name_prefix: str = "",
) -> None:
    """Fill the `text` or the `token_ids` of a message, whichever `value` is.

    `prefix` is the path of the message; `name_prefix` begins the names of the two fields.
    """
    if isinstance(value, str):
        name = f"{name_prefix}text"
        _assign(violations, prefix + name, lambda: setattr(message, name, _text(value)))
    else:
        name = f"{name_prefix}token_ids"
        ids = getattr(message, name)
        ids.SetInParent()
        _extend(violations, f"{prefix}{name}.ids", ids.ids, value, _uint32)


def _scalar(field: FieldDescriptor, value: Any) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise _BadValueError(f"must be True or False, got {value!r}")
        return value
    if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT:
        return _float32(value)
    return _integer(value, *_INTEGER_RANGE[field.cpp_type])


def _integer(value: Any, low: int, high: int) -> int:
    # True is an int to Python; as a count it is a mistake.
    if isinstance(value, bool):
        raise _BadValueError(f"must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise _BadValueError(f"must be an integer, got {value!r}") from None
    if not low <= number <= high:
        raise _BadValueError(f"must be in {low} to {high}, got {number}")
    return number


def _uint32(value: Any) -> int:
    return _integer(value, 0, 2**32 - 1)


def _float32(value: Any) -> float:
    if isinstance(value, bool | str | bytes):
        raise _BadValueError(f"must be a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _BadValueError(f"must be a number, got {value!r}") from None
    # float32 would make it infinite, which is not what the caller wrote.
    if math.isfinite(number) and abs(number) > _FLOAT32_MAX:
        raise _BadValueError(f"must fit float32, got {number}")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _BadValueError(f"must be text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadValueError(
            f"must be valid Unicode, got a lone surrogate at character {error.start}"
        ) from None
    return value


def _assign(violations: list[types.FieldViolation], path: str, assign: Any) -> None:
    try:
        assign()
    except _BadValueError as error:
        violations.append(types.FieldViolation(path, str(error)))


def _extend(
    violations: list[types.FieldViolation],
    path: str,
    target: Any,
    values: Iterable[Any],
    convert: Any,
) -> None:
    """Append until the first bad value: a list of another type has nothing but those."""
    try:
        iterator = iter(values)
    except TypeError:
        violations.append(types.FieldViolation(path, f"must be a list, got {values!r}"))
        return
    for position, value in enumerate(iterator):
        try:
            target.append(convert(value))
        except _BadValueError as error:
            violations.append(types.FieldViolation(f"{path}[{position}]", str(error)))
            return


def _raise_if_any(violations: list[types.FieldViolation]) -> None:
    if violations:
        raise types.InvalidRequestError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "; ".join(str(violation) for violation in violations),
            tuple(violations),
        )


# --- responses ---


def chunk_from_pb(chunk: pb.TokenChunk) -> types.TokenChunk:
    """One step of one sequence."""
    return types.TokenChunk(
        index=chunk.index,
        text=chunk.text,
        token_ids=tuple(chunk.token_ids),
        logprobs=_logprobs(chunk.logprobs),
        is_prompt=chunk.is_prompt,
    )


def generation_from_pb(response: pb.GenerateResponse) -> types.Generation:
    """A unary answer."""
    sequences = tuple(
        types.GeneratedSequence(
            index=sequence.index,
            text=sequence.text,
            token_ids=tuple(sequence.token_ids),
            logprobs=_logprobs(sequence.logprobs),
        )
        for sequence in response.sequences
    )
    return types.Generation(sequences=sequences, summary=summary_from_pb(response.summary))


def summary_from_pb(summary: pb.GenerationSummary) -> types.GenerationSummary:
    """The end of a request."""
    return types.GenerationSummary(
        request_id=summary.request_id,
        finish_reason=_finish_reason(summary.finish_reason),
        prompt_tokens=summary.usage.prompt_tokens,
        completion_tokens=summary.usage.completion_tokens,
        timings=_timings(summary.timings),
        sequences=tuple(
            types.SequenceSummary(
                index=sequence.index,
                finish_reason=_finish_reason(sequence.finish_reason),
                completion_tokens=sequence.completion_tokens,
                stop_match=_stop_match(sequence),
            )
            for sequence in summary.sequences
        ),
        seed=summary.seed,
        cached_prompt_tokens=summary.cached_prompt_tokens,
        speculation=types.Speculation(
            drafted_tokens=summary.speculation.drafted_tokens,
            accepted_tokens=summary.speculation.accepted_tokens,
            decode_steps=summary.speculation.decode_steps,
        )
        if summary.HasField("speculation")
        else None,
    )


def score_from_pb(response: pb.ScoreResponse) -> types.ScoreResult:
    """The scores of one prompt's candidates."""
    return types.ScoreResult(
        request_id=response.request_id,
        scores=tuple(
            types.CandidateScore(
                index=score.index,
                logprob=score.logprob,
                tokens=_logprobs(score.tokens),
                probability=score.probability,
                calibration_logprob=(
                    score.calibration_logprob if score.HasField("calibration_logprob") else None
                ),
            )
            for score in response.scores
        ),
        prompt_tokens=response.usage.prompt_tokens,
        candidate_tokens=response.usage.completion_tokens,
        timings=_timings(response.timings),
    )


def model_from_pb(model: pb.GetModelResponse) -> types.ModelInfo:
    """What is being served."""
    parity = model.parity
    return types.ModelInfo(
        name=model.name,
        architecture=model.architecture,
        backend=model.backend,
        device=model.device,
        dtype=model.dtype,
        num_parameters=model.num_parameters,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        max_sequences=model.max_sequences,
        max_batch_size=model.max_batch_size,
        block_size=model.block_size,
        num_kv_blocks=model.num_kv_blocks,
        max_queue_size=model.max_queue_size,
        max_n=model.max_n,
        eos_token_id=model.eos_token_id if model.HasField("eos_token_id") else None,
        server_version=model.server_version,
        parity=types.ParityVerdict(
            status=_enum_name(pb.ParityVerdict.Status, parity.status, "STATUS_"),
            max_relative_error=parity.max_relative_error,
            tokens_compared=parity.tokens_compared,
            tokens_agreed=parity.tokens_agreed,
            detail=parity.detail,
        ),
    )


def health_from_pb(response: health_pb2.HealthCheckResponse) -> types.HealthStatus:
    """A service's status."""
    statuses = health_pb2.HealthCheckResponse.ServingStatus
    return types.HealthStatus(_enum_name(statuses, response.status, "", "unknown"))


def _timings(timings: pb.Timings) -> types.Timings:
    return types.Timings(
        queue_ms=timings.queue_ms,
        prefill_ms=timings.prefill_ms,
        decode_ms=timings.decode_ms,
        ttft_ms=timings.ttft_ms,
        e2e_ms=timings.e2e_ms,
    )


def _finish_reason(value: int) -> types.FinishReason:
    return types.FinishReason(_enum_name(pb.FinishReason, value, "FINISH_REASON_"))


def _enum_name(enum: Any, value: int, prefix: str, unknown: str = "unspecified") -> str:
    """The value's name in our spelling; `unknown` for one that only a newer server has."""
    try:
        name: str = enum.Name(value)
    except ValueError:
        return unknown
    return name.removeprefix(prefix).lower()


def _stop_match(sequence: pb.SequenceSummary) -> str | int | None:
    name = sequence.WhichOneof("stop_match")
    return None if name is None else getattr(sequence, name)


def _logprobs(logprobs: Iterable[pb.TokenLogprob]) -> tuple[types.TokenLogprob, ...]:
    return tuple(
        types.TokenLogprob(
            token_id=item.token_id,
            logprob=item.logprob if item.HasField("logprob") else None,
            top=tuple((top.token_id, top.logprob) for top in item.top),
        )
        for item in logprobs
    )
