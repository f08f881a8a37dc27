"""The client's channel: options, retries, TLS; and gRPC's errors as the client's own."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import sys
import time
from collections.abc import Iterable
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
# Visible ASCII, at most what a server takes of metadata besides everything else in it.
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
_DETAILS_KEY = "grpc-status-details-bin"
_POLICY_BLOCKED_REASON = "POLICY_BLOCKED"

_ERRORS: dict[grpc.StatusCode, type[types.GptjetError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: types.InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: types.ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: types.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: types.DeadlineExceededError,
    grpc.StatusCode.CANCELLED: types.CancelledError,
    grpc.StatusCode.INTERNAL: types.InternalError,
    grpc.StatusCode.UNAUTHENTICATED: types.UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: types.PermissionDeniedError,
}


def channel_options(
    retry: types.RetryPolicy | None,
    retry_queue_full: bool,
    tls: types.TlsOptions | None,
    token: str | None = None,
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
        # a server whose process is frozen: its system still takes what is sent
        ("grpc.http2.ping_timeout_ms", 10_000),
        # Without this it would be noticed for the first two pings of a silence only.
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if retry is not None:
        options.append(("grpc.service_config", _service_config(retry, retry_queue_full)))
    if token is not None and tls is None:
        # gRPC would send loopback, too, through the proxy that the environment names.
        options.append(("grpc.enable_http_proxy", 0))
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


def call_metadata(
    metadata: Iterable[tuple[str, str]], token: str | None
) -> tuple[tuple[str, str], ...]:
    """What is sent with every call: `metadata`, and the token where there is one."""
    bearer = () if token is None else (("authorization", f"Bearer {token}"),)
    return (*metadata, *bearer)


def check_token(
    token: str | None, target: str, tls: types.TlsOptions | None, allow_plaintext: bool
) -> None:
    """Raise ValueError for a token that no metadata can hold, without showing it.

    Raises PlaintextTokenError where it would leave this machine without TLS, unless allowed.
    """
    if token is None:
        return
    if not _TOKEN.fullmatch(token):
        raise ValueError("the token must be 1 to 4096 visible ASCII characters without spaces")
    if tls is None and not allow_plaintext and not is_local(target):
        raise types.PlaintextTokenError(target)


def is_local(target: str) -> bool:
    """Whether what is sent to a gRPC target stays on this machine; False where that is unclear."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    for prefix in ("dns:", "ipv4:", "ipv6:"):
        if target.startswith(prefix):
            target = target.removeprefix(prefix).removeprefix("///")
    # Several addresses (ipv4:a:1,b:2) are none of these, and so not local.
    host = target.rpartition(":")[0] if ":" in target else target
    host = host.removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


def with_trace_context(metadata: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """`metadata`, and the trace context of a caller that uses OpenTelemetry.

    Its own propagator decides what that is: W3C's traceparent, unless it was set up otherwise.
    """
    # A program that has no tracing pays nothing for it and needs no package.
    if "opentelemetry.trace" not in sys.modules:
        return metadata
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    given = {key for key, _ in metadata}
    found = ((key.lower(), value) for key, value in carrier.items())
    return (*metadata, *(pair for pair in found if pair[0] not in given))


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
    quota_failure, is_quota = error_details_pb2.QuotaFailure(), False
    error_info = error_details_pb2.ErrorInfo()
    for detail in _status(error).details:
        if detail.Unpack(bad_request):
            violations = tuple(
                types.FieldViolation(violation.field, violation.description)
                for violation in bad_request.field_violations
            )
        elif detail.Unpack(retry_info):
            retry_after_s = retry_info.retry_delay.ToMilliseconds() / 1000
        elif detail.Unpack(quota_failure):
            is_quota = True
        else:
            detail.Unpack(error_info)
    cls = _ERRORS.get(code, types.GptjetError)
    if error_info.reason == _POLICY_BLOCKED_REASON:
        cls = types.PolicyBlockedError
    if cls is types.ResourceExhaustedError:
        if is_quota:
            cls = types.QuotaExceededError
        elif retry_after_s is not None:
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
