"""The client's channel: options, retries, TLS; and gRPC's errors as the client's own."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service import client_types as types

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["TextGeneration"].full_name

# Sixteen sequences of a full context with twenty log-probabilities a token fit.
_MAX_RECEIVE_BYTES = 64 * 1024 * 1024
# A call is only retried while gRPC still holds its request.
_RETRY_BUFFER_BYTES = 4 * 1024 * 1024
PROBE_TIMEOUT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_DETAILS_KEY = "grpc-status-details-bin"
_POLICY_BLOCKED_REASON = "POLICY_BLOCKED"

_ERRORS: dict[grpc.StatusCode, type[types.GptjetError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: types.InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: types.ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: types.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: types.DeadlineExceededError,
    grpc.StatusCode.CANCELLED: types.CancelledError,
    grpc.StatusCode.INTERNAL: types.InternalError,
}


def channel_options(
    retry: types.RetryPolicy | None, retry_queue_full: bool, tls: types.TlsOptions | None
) -> list[tuple[str, Any]]:
    """gRPC's own settings."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
        ("grpc.per_rpc_retry_buffer_size", _RETRY_BUFFER_BYTES),
        # A connection of its own for each client: closing it closes it, and a load test that makes
        # several clients gets several connections.
        ("grpc.use_local_subchannel_pool", 1),
        # A server that is restarted is found again in seconds, not in gRPC's two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # During a long silence (a queue, a long prompt), notice that the server's machine is gone.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]
    if retry is not None:
        options.append(("grpc.service_config", _service_config(retry, retry_queue_full)))
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def _service_config(retry: types.RetryPolicy, retry_queue_full: bool) -> str:
    codes = ["UNAVAILABLE", *(["RESOURCE_EXHAUSTED"] if retry_queue_full else [])]
    policy = {
        "maxAttempts": retry.max_attempts,
        "initialBackoff": f"{retry.initial_backoff_s:.9f}s",
        "maxBackoff": f"{retry.max_backoff_s:.9f}s",
        "backoffMultiplier": retry.multiplier,
        "retryableStatusCodes": codes,
    }
    return json.dumps(
        {"methodConfig": [{"name": [{"service": SERVICE_NAME}], "retryPolicy": policy}]}
    )


def channel_credentials(tls: types.TlsOptions) -> grpc.ChannelCredentials:
    """Raises OSError for a file that cannot be read, ValueError for half a client certificate."""
    if (tls.client_cert is None) != (tls.client_key is None):
        raise ValueError("client_cert and client_key must be given together")
    return grpc.ssl_channel_credentials(
        root_certificates=_pem(tls.root_ca),
        private_key=_pem(tls.client_key),
        certificate_chain=_pem(tls.client_cert),
    )


def _pem(source: Path | bytes | None) -> bytes | None:
    return source.read_bytes() if isinstance(source, Path) else source


def deadline(timeout_s: float | None, default_s: float | None) -> float | None:
    """The timeout of a call as gRPC takes it: None, and infinity, mean none."""
    chosen = default_s if timeout_s is None else timeout_s
    return None if chosen is None or math.isinf(chosen) else chosen


def from_rpc_error(error: Any) -> types.GptjetError:
    """The client's error for gRPC's, with what google.rpc details say."""
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    violations: tuple[types.FieldViolation, ...] = ()
    retry_after_s: float | None = None
    bad_request, retry_info = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    error_info = error_details_pb2.ErrorInfo()
    for detail in _status(error).details:
        if detail.Unpack(bad_request):
            violations = tuple(
                types.FieldViolation(violation.field, violation.description)
                for violation in bad_request.field_violations
            )
        elif detail.Unpack(retry_info):
            retry_after_s = retry_info.retry_delay.ToMilliseconds() / 1000
        else:
            detail.Unpack(error_info)
    cls = _ERRORS.get(code, types.GptjetError)
    if error_info.reason == _POLICY_BLOCKED_REASON:
        cls = types.PolicyBlockedError
    if cls is types.ResourceExhaustedError and retry_after_s is not None:
        cls = types.QueueFullError
    return cls(code, message, violations, retry_after_s)


def _status(error: Any) -> Any:
    """The google.rpc.Status of an error; empty where there is none to be read."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()


class Patience:
    """How long `wait_until_serving` waits: pauses that grow, and an end."""

    def __init__(self, target: str, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self._pause_s = _FIRST_PAUSE_S

    @property
    def probe_timeout_s(self) -> float:
        """Timeout of the next probe."""
        return min(PROBE_TIMEOUT_S, max(self._end - time.monotonic(), _FIRST_PAUSE_S))

    def next_pause_s(self, last: str) -> float:
        """How long to pause after the answer `last`; raises UnavailableError at the end."""
        if time.monotonic() + self._pause_s > self._end:
            raise types.UnavailableError(
                grpc.StatusCode.UNAVAILABLE,
                f"{self._target} does not serve after {self._timeout_s:g} s: {last}",
            )
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return pause_s
