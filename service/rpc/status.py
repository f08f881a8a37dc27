"""The one table from our errors to gRPC statuses with google.rpc details; nothing else maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from gptjet.service.engine.errors import (
    BackendLoadError,
    EngineError,
    EngineStepError,
    EngineUnavailableError,
    InvalidRequestError,
    OutOfMemoryError,
    QueueFullError,
    QueueTimeError,
    SlowReaderError,
    TokensInFlightError,
)
from gptjet.service.rpc.access.errors import (
    PermissionDeniedError,
    QuotaExceededError,
    UnauthenticatedError,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message

# A status travels in HTTP/2 trailers, of which peers accept 8 KiB: what a caller can make longer
# by sending more bad fields has to be cut here, or the reply itself is refused.
MAX_VIOLATIONS = 16
MAX_FIELD_CHARACTERS = 64
MAX_DESCRIPTION_CHARACTERS = 160
MAX_MESSAGE_CHARACTERS = 512

DETAILS_KEY = "grpc-status-details-bin"
# gRPC's own retries wait this long instead of their backoff.
PUSHBACK_KEY = "grpc-retry-pushback-ms"
# What a google.rpc.ErrorInfo of ours says.
ERROR_DOMAIN = "gptjet"
POLICY_BLOCKED_REASON = "POLICY_BLOCKED"


class DeadlineExceededError(EngineError):
    """The caller's deadline passed before the request was finished."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before the request was finished")


class TooManyRpcsError(EngineError):
    """As many calls as there may be are being served; try again after `retry_after_s` seconds."""

    def __init__(self, max_concurrent_rpcs: int) -> None:
        self.retry_after_s = 1.0
        super().__init__(
            f"{max_concurrent_rpcs} calls are being served (max_concurrent_rpcs); "
            f"try again in {self.retry_after_s:.1f} s"
        )


class MessageTooLargeError(EngineError):
    """The request has more bytes than the server takes."""

    def __init__(self, num_bytes: int, max_message_bytes: int) -> None:
        super().__init__(
            f"the request has {num_bytes} bytes; at most {max_message_bytes} are taken "
            "(max_message_bytes)"
        )


class InternalError(EngineError):
    """A bug of ours; the traceback is in the log beside `error_id`."""

    def __init__(self, error_id: str) -> None:
        super().__init__(f"internal error; the server's log has it under error id {error_id}")
        self.error_id = error_id


class PolicyBlockedError(EngineError):
    """A rule of the operator's policy, or a reviewer, does not let a text in or out.

    It names the rule and the place, never the text.
    """

    def __init__(self, message: str, rule: str, direction: str, field: str) -> None:
        super().__init__(message)
        self.rule = rule
        self.direction = direction
        self.field = field


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """What a failed RPC ends with. `refused_by` is a word of REFUSED_BY where it was refused."""

    code: grpc.StatusCode
    message: str
    details: tuple[Message, ...] = ()
    retry_after_s: float | None = field(default=None)
    refused_by: str | None = None

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The google.rpc.Status as gRPC carries it, and the retry time for gRPC's own retries."""
        metadata: list[tuple[str, str | bytes]] = []
        if self.details:
            status = status_pb2.Status(code=self.code.value[0], message=self.message)
            for detail in self.details:
                packed = any_pb2.Any()
                packed.Pack(detail)
                status.details.append(packed)
            metadata.append((DETAILS_KEY, status.SerializeToString()))
        if self.retry_after_s is not None:
            metadata.append((PUSHBACK_KEY, str(round(self.retry_after_s * 1000))))
        return tuple(metadata)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _invalid(error: EngineError) -> Sequence[Message]:
    assert isinstance(error, InvalidRequestError)
    bad_request = error_details_pb2.BadRequest()
    for violation in error.violations[:MAX_VIOLATIONS]:
        bad_request.field_violations.add(
            field=_cut(violation.field, MAX_FIELD_CHARACTERS),
            description=_cut(violation.description, MAX_DESCRIPTION_CHARACTERS),
        )
    return (bad_request,)


def _retry_after(error: EngineError) -> Sequence[Message]:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(getattr(error, "retry_after_s", 0.0) * 1000))
    return (error_details_pb2.RetryInfo(retry_delay=delay),)


def _quota(error: EngineError) -> Sequence[Message]:
    assert isinstance(error, QuotaExceededError)
    failure = error_details_pb2.QuotaFailure()
    failure.violations.add(
        subject=f"token:{error.subject}",
        description=f"{error.quota} is {error.limit}",
        quota_id=error.quota,
        quota_value=error.limit,
    )
    if error.retry_after_s is None:
        return (failure,)
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(error.retry_after_s * 1000))
    return (failure, error_details_pb2.RetryInfo(retry_delay=delay))


def _blocked(error: EngineError) -> Sequence[Message]:
    assert isinstance(error, PolicyBlockedError)
    metadata = {"rule": error.rule, "direction": error.direction, "field": error.field}
    return (
        error_details_pb2.ErrorInfo(
            reason=POLICY_BLOCKED_REASON, domain=ERROR_DOMAIN, metadata=metadata
        ),
    )


def _none(_error: EngineError) -> Sequence[Message]:
    return ()


_TABLE: dict[type, tuple[grpc.StatusCode, Callable[[EngineError], Sequence[Message]]]] = {
    InvalidRequestError: (grpc.StatusCode.INVALID_ARGUMENT, _invalid),
    QueueFullError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _retry_after),
    QuotaExceededError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _quota),
    UnauthenticatedError: (grpc.StatusCode.UNAUTHENTICATED, _none),
    PermissionDeniedError: (grpc.StatusCode.PERMISSION_DENIED, _none),
    QueueTimeError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _retry_after),
    TokensInFlightError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _retry_after),
    TooManyRpcsError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _retry_after),
    MessageTooLargeError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _none),
    SlowReaderError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _none),
    OutOfMemoryError: (grpc.StatusCode.RESOURCE_EXHAUSTED, _none),
    EngineUnavailableError: (grpc.StatusCode.UNAVAILABLE, _retry_after),
    DeadlineExceededError: (grpc.StatusCode.DEADLINE_EXCEEDED, _none),
    EngineStepError: (grpc.StatusCode.INTERNAL, _none),
    InternalError: (grpc.StatusCode.INTERNAL, _none),
    PolicyBlockedError: (grpc.StatusCode.PERMISSION_DENIED, _blocked),
    # `serve` stops on this one before any RPC can see it.
    BackendLoadError: (grpc.StatusCode.FAILED_PRECONDITION, _none),
}


# What refused an RPC whose code says no more than that it was: a full queue and a used-up quota are
# both RESOURCE_EXHAUSTED, but only one of them is the server's. For metrics and their alerts.
REFUSED_BY: dict[type, str] = {
    UnauthenticatedError: "authentication",
    PermissionDeniedError: "scope",
    PolicyBlockedError: "policy",
    QuotaExceededError: "quota",
    MessageTooLargeError: "message_size",
    SlowReaderError: "slow_reader",
    QueueFullError: "queue",
    QueueTimeError: "queue_time",
    TokensInFlightError: "tokens_in_flight",
    TooManyRpcsError: "concurrent_rpcs",
    OutOfMemoryError: "memory",
    EngineUnavailableError: "unavailable",
}


def to_status(error: Exception) -> RpcStatus | None:
    """The gRPC status of an error of ours; None for what is not in the table, and so a bug."""
    for cls in type(error).__mro__:
        if cls in _TABLE:
            assert isinstance(error, EngineError)
            code, details = _TABLE[cls]
            return RpcStatus(
                code=code,
                message=_cut(str(error), MAX_MESSAGE_CHARACTERS),
                details=tuple(details(error)),
                retry_after_s=getattr(error, "retry_after_s", None),
                refused_by=REFUSED_BY.get(cls),
            )
    return None
