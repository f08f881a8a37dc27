"""Calls gptjet.v1.Admin, the administration of a running server: on its own port, or its socket.

with AdminClient("127.0.0.1:50052", token=token) as admin:
    admin.reload()
    print(admin.status().state)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

import grpc

from gptjet.proto.v1 import admin_pb2 as pb
from gptjet.proto.v1 import admin_pb2_grpc as pb_grpc
from gptjet.service import client_channel as channels
from gptjet.service.client_types import TlsOptions

__all__ = ["AdminClient", "CertificateStatus", "Drain", "ReloadedFiles", "Status", "TokenStatus"]

DEFAULT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Drain:
    """What was under way when the drain began, and how long it has."""

    running: int
    waiting: int
    grace_s: float


@dataclass(frozen=True, slots=True)
class ReloadedFiles:
    """`outcome` of reading files of a kind again: unchanged, reloaded or refused (`reason`)."""

    kind: str
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """The certificate that callers are shown."""

    names: tuple[str, ...]
    not_after: datetime
    client_certificates_required: bool
    refused: str


@dataclass(frozen=True, slots=True)
class TokenStatus:
    """A bearer token and what is left of its quotas; None: unlimited, or never."""

    id: str
    name: str
    scopes: tuple[str, ...]
    expires: datetime | None
    usable: bool
    concurrent_streams: int
    max_concurrent_streams: int | None
    requests_per_minute: int | None
    requests_left: int | None
    tokens_per_minute: int | None
    tokens_left: int | None


@dataclass(frozen=True, slots=True)
class Status:
    """What a server is doing, what it holds and who uses it; see GetStatusResponse.

    `state` is loading, serving, draining or failed: its engine has, and the log says why.
    """

    state: str
    server_version: str
    uptime_s: float
    model: str
    backend: str
    address: str
    running: int
    waiting: int
    certificate: CertificateStatus | None
    tokens: tuple[TokenStatus, ...]
    tokens_refused: str


class AdminClient:
    """A connection to the administration of one server. The arguments are Client's.

    Methods raise GptjetError. Nothing is retried: what an administrator asks for is done once.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: TlsOptions | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        metadata: Sequence[tuple[str, str]] = (),
        token: str | None = None,
        allow_plaintext_token: bool = False,
    ) -> None:
        channels.check_token(token, target, tls, allow_plaintext_token)
        options = channels.channel_options(None, False, tls, token)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            credentials = channels.channel_credentials(tls)
            self._channel = grpc.secure_channel(target, credentials, options)
        self._timeout = channels.deadline(None, timeout_s)
        self._metadata = channels.call_metadata(metadata, token)
        self._stub = pb_grpc.AdminStub(self._channel)

    def drain(self, grace_s: float | None = None) -> Drain:
        """Begin what SIGTERM begins; None: with the server's own grace period."""
        response = self._call(self._stub.Drain, pb.DrainRequest(grace_s=grace_s))
        return Drain(response.running, response.waiting, response.grace_s)

    def reload(self) -> tuple[ReloadedFiles, ...]:
        """Have the certificates, the tokens file and the policy read again now."""
        response = self._call(self._stub.Reload, pb.ReloadRequest())
        return tuple(
            ReloadedFiles(
                files.kind,
                _word(pb.ReloadedFiles.Outcome, files.outcome, "OUTCOME_"),
                files.reason,
            )
            for files in response.files
        )

    def log_level(self) -> str:
        """debug, info, warning or error."""
        response = self._call(self._stub.GetLogLevel, pb.GetLogLevelRequest())
        return _word(pb.LogLevel, response.level, "LOG_LEVEL_")

    def set_log_level(self, level: str) -> str:
        """Log what is at least this severe until the process ends; returns the level before.

        Raises ValueError for a level that there is not.
        """
        number = _LEVELS.get(level)
        if number is None:
            raise ValueError(f"must be one of {', '.join(_LEVELS)}, got {level!r}")
        response = self._call(self._stub.SetLogLevel, pb.SetLogLevelRequest(level=number))
        return _word(pb.LogLevel, response.previous, "LOG_LEVEL_")

    def status(self) -> Status:
        """What the server is doing, what it holds and who uses it."""
        response = self._call(self._stub.GetStatus, pb.GetStatusRequest())
        return Status(
            state=_word(pb.ServerState, response.state, "SERVER_STATE_"),
            server_version=response.server_version,
            uptime_s=response.uptime_s,
            model=response.model,
            backend=response.backend,
            address=response.address,
            running=response.running,
            waiting=response.waiting,
            certificate=_certificate(response),
            tokens=tuple(_token(token) for token in response.tokens),
            tokens_refused=response.tokens_refused,
        )

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise channels.from_rpc_error(error) from error


_LEVELS: Mapping[str, pb.LogLevel] = {
    "debug": pb.LOG_LEVEL_DEBUG,
    "info": pb.LOG_LEVEL_INFO,
    "warning": pb.LOG_LEVEL_WARNING,
    "error": pb.LOG_LEVEL_ERROR,
}


def _word(enum: Any, number: int, prefix: str) -> str:
    """ "SERVER_STATE_DRAINING" as "draining"; "unspecified" for what this client does not know."""
    name = enum.Name(number) if number in enum.values() else f"{prefix}UNSPECIFIED"
    return str(name).removeprefix(prefix).lower()


def _certificate(response: pb.GetStatusResponse) -> CertificateStatus | None:
    if not response.HasField("certificate"):
        return None
    certificate = response.certificate
    return CertificateStatus(
        names=tuple(certificate.names),
        not_after=certificate.not_after.ToDatetime(UTC),
        client_certificates_required=certificate.client_certificates_required,
        refused=certificate.refused,
    )


def _token(token: pb.TokenStatus) -> TokenStatus:
    def limit(field: Any) -> int | None:
        return getattr(token, field) if token.HasField(field) else None

    return TokenStatus(
        id=token.id,
        name=token.name,
        scopes=tuple(token.scopes),
        expires=token.expires.ToDatetime(UTC) if token.HasField("expires") else None,
        usable=token.usable,
        concurrent_streams=token.concurrent_streams,
        max_concurrent_streams=limit("max_concurrent_streams"),
        requests_per_minute=limit("requests_per_minute"),
        requests_left=limit("requests_left"),
        tokens_per_minute=limit("tokens_per_minute"),
        tokens_left=limit("tokens_left"),
    )
