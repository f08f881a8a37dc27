"""The table from our errors to gRPC statuses."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from gptjet.service.config import ServerConfig
from gptjet.service.engine import errors
from gptjet.service.engine.errors import FieldViolation
from gptjet.service.observability.metrics import CALLERS_FAULTS, SERVERS_LIMITS, USUAL_CODES
from gptjet.service.rpc import status
from gptjet.service.rpc.access import errors as access
from gptjet.service.rpc.status import to_status

EXAMPLES = [
    (errors.InvalidRequestError(FieldViolation("a", "b")), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.QueueFullError(3, 1.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.EngineUnavailableError("loading"), grpc.StatusCode.UNAVAILABLE),
    (errors.EngineStepError("id", "x"), grpc.StatusCode.INTERNAL),
    (errors.OutOfMemoryError("id", "x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.QueueTimeError(60.0, 1.0), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.TokensInFlightError(5, 6, 10, 1.0), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.SlowReaderError("too slow"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (status.TooManyRpcsError(3), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (status.MessageTooLargeError(5, 4), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.BackendLoadError("x"), grpc.StatusCode.FAILED_PRECONDITION),
    (access.UnauthenticatedError("x"), grpc.StatusCode.UNAUTHENTICATED),
    (access.PermissionDeniedError("x"), grpc.StatusCode.PERMISSION_DENIED),
    (
        access.QuotaExceededError("requests_per_minute", 3, "web", "too many", 1.5),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ),
    (status.DeadlineExceededError(), grpc.StatusCode.DEADLINE_EXCEEDED),
    (status.InternalError("id"), grpc.StatusCode.INTERNAL),
    (
        status.PolicyBlockedError("prompt: blocked", "r", "input", "prompt"),
        grpc.StatusCode.PERMISSION_DENIED,
    ),
]


# A server that could not load answers nobody.
_SERVED = set(grpc.StatusCode) - {grpc.StatusCode.FAILED_PRECONDITION}


@pytest.mark.parametrize(
    ("error", "setting"),
    [
        (errors.QueueFullError(3, 1.0), "max_queue_size"),
        (errors.QueueTimeError(60.0, 1.0), "max_queue_time_s"),
        (errors.TokensInFlightError(5, 6, 10, 1.0), "max_tokens_in_flight"),
        (status.TooManyRpcsError(3), "max_concurrent_rpcs"),
        (status.MessageTooLargeError(5, 4), "max_message_bytes"),
    ],
)
def test_every_limit_is_refused_by_the_name_of_its_setting(
    error: errors.EngineError, setting: str
) -> None:
    result = to_status(error)
    assert result is not None
    assert f"({setting})" in result.message
    assert setting in ServerConfig.model_fields


@pytest.mark.parametrize(("error", "code"), EXAMPLES)
def test_code_and_message(error: errors.EngineError, code: grpc.StatusCode) -> None:
    result = to_status(error)
    assert result is not None
    assert result.code is code
    assert result.message == str(error)


def test_every_code_and_everything_that_refuses_has_its_series_from_the_start() -> None:
    """So that the first one of a kind is an increase, and an alert's ratio has all its parts."""
    results = [to_status(error) for error, code in EXAMPLES if code in _SERVED]
    assert {result.code.name for result in results if result} <= set(USUAL_CODES)
    assert {"OK", "CANCELLED"} <= set(USUAL_CODES)
    assert set(CALLERS_FAULTS).isdisjoint(SERVERS_LIMITS)
    assert {result.refused_by for result in results if result} - {None} == {
        *CALLERS_FAULTS,
        *SERVERS_LIMITS,
    }
    # Codes that do not say by themselves whose doing it was.
    unclear = {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED"}
    for result in results:
        assert result is not None
        assert (result.refused_by is not None) is (result.code.name in unclear), result


def test_every_error_a_caller_can_meet_has_a_row() -> None:
    modules = (errors.__name__, access.__name__, status.__name__)
    known = {*errors.EngineError.__subclasses__(), *errors.EngineStepError.__subclasses__()}
    ours = {cls for cls in known if cls.__module__ in modules}
    assert ours == {type(error) for error, _ in EXAMPLES}


def test_error_of_another_kind_is_a_bug_rather_than_guessed() -> None:
    assert to_status(errors.EngineError("bare")) is None
    assert to_status(KeyError("x")) is None


def test_retry_time_stands_in_the_details_and_in_grpcs_own_key() -> None:
    result = to_status(errors.QueueFullError(3, 1.5))
    assert result is not None
    (detail,) = result.details
    assert isinstance(detail, error_details_pb2.RetryInfo)
    assert detail.retry_delay.ToMilliseconds() == 1500
    assert dict(result.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"


def test_longest_status_fits_the_eight_kibibytes_that_peers_accept() -> None:
    many = (FieldViolation("f" * 999, "d" * 999) for _ in range(999))
    result = to_status(errors.InvalidRequestError(*many))
    assert result is not None
    carried = sum(len(value) * 4 / 3 for _, value in result.trailing_metadata())
    assert carried + len(result.message) < 8000
