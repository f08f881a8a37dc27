"""gptjet.v1.Admin: drain, reload, log level and status of the server it runs beside."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from gptjet.proto.v1 import admin_pb2 as pb
from gptjet.proto.v1 import admin_pb2_grpc as pb_grpc
from gptjet.service.engine.errors import FieldViolation, InvalidRequestError
from gptjet.service.log import current_level, get_logger, set_level
from gptjet.service.rpc.access.control import AccessControl, Outcome, Reloaded
from gptjet.service.rpc.access.quota import Quota
from gptjet.service.rpc.access.tokens import Token

if TYPE_CHECKING:
    import grpc

logger = get_logger(__name__)

ADMIN_SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Admin"].full_name

_MAX_GRACE_S = 3600.0
_OUTCOMES = {
    Outcome.UNCHANGED: pb.ReloadedFiles.OUTCOME_UNCHANGED,
    Outcome.RELOADED: pb.ReloadedFiles.OUTCOME_RELOADED,
    Outcome.REFUSED: pb.ReloadedFiles.OUTCOME_REFUSED,
}
_LEVELS = {
    pb.LOG_LEVEL_DEBUG: "debug",
    pb.LOG_LEVEL_INFO: "info",
    pb.LOG_LEVEL_WARNING: "warning",
    pb.LOG_LEVEL_ERROR: "error",
}
_STATES = {
    "loading": pb.SERVER_STATE_LOADING,
    "serving": pb.SERVER_STATE_SERVING,
    "draining": pb.SERVER_STATE_DRAINING,
    "failed": pb.SERVER_STATE_FAILED,
}
# gRPC's class is generic in its stub only.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Administered(Protocol):
    """What a server lets its administrator see and do."""

    @property
    def access(self) -> AccessControl:
        """Its certificates and tokens."""
        ...

    @property
    def state(self) -> str:
        """ "loading", "serving", "draining" or "failed"."""
        ...

    @property
    def running(self) -> int:
        """Requests that hold a KV cache."""
        ...

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        ...

    async def reload(self) -> list[Reloaded]:
        """Read again what may change; what became of each kind of file."""
        ...

    def ask_to_stop(self, grace_s: float | None) -> float:
        """Drain and end, as SIGTERM does; how long running requests have, in seconds."""
        ...

    def about(self) -> dict[str, Any]:
        """Of GetStatusResponse: server_version, uptime_s, model, backend, address."""
        ...


class AdminServicer(pb_grpc.AdminServicer):
    """Belongs to the event loop of the server that it administers."""

    def __init__(self, server: Administered) -> None:
        self._server = server

    async def Drain(  # noqa: N802 - the names are gRPC's
        self, request: pb.DrainRequest, _context: _Context
    ) -> pb.DrainResponse:
        """As SIGTERM does; answered before anything ends."""
        grace_s = request.grace_s if request.HasField("grace_s") else None
        # Asked so that NaN is refused, too.
        if grace_s is not None and not 0 <= grace_s <= _MAX_GRACE_S:
            raise InvalidRequestError(
                FieldViolation("grace_s", f"must be 0 to {_MAX_GRACE_S:g}, got {grace_s:g}")
            )
        server = self._server
        grace_s = server.ask_to_stop(grace_s)
        return pb.DrainResponse(running=server.running, waiting=server.waiting, grace_s=grace_s)

    async def Reload(  # noqa: N802
        self, _request: pb.ReloadRequest, _context: _Context
    ) -> pb.ReloadResponse:
        """Certificates, tokens and the policy, now."""
        results = await self._server.reload()
        return pb.ReloadResponse(
            files=[
                pb.ReloadedFiles(
                    kind=result.kind, outcome=_OUTCOMES[result.outcome], reason=result.reason
                )
                for result in results
            ]
        )

    async def GetLogLevel(  # noqa: N802
        self, _request: pb.GetLogLevelRequest, _context: _Context
    ) -> pb.GetLogLevelResponse:
        """Of our own lines."""
        return pb.GetLogLevelResponse(level=_level_to_pb(current_level()))

    async def SetLogLevel(  # noqa: N802
        self, request: pb.SetLogLevelRequest, _context: _Context
    ) -> pb.SetLogLevelResponse:
        """Until the process ends."""
        level = _LEVELS.get(request.level)
        if level is None:
            names = ", ".join(pb.LogLevel.Name(number) for number in _LEVELS)
            raise InvalidRequestError(
                FieldViolation("level", f"must be one of {names}, got {request.level}")
            )
        previous = current_level()
        set_level(level)
        # A warning, so that it is seen at any level but error: who turned the log off?
        logger.warning("log level changed", previous=previous, now=level)
        return pb.SetLogLevelResponse(previous=_level_to_pb(previous))

    async def GetStatus(  # noqa: N802
        self, _request: pb.GetStatusRequest, _context: _Context
    ) -> pb.GetStatusResponse:
        """Nothing of it is a secret, but all of it is the operator's."""
        server = self._server
        access = server.access
        response = pb.GetStatusResponse(
            state=_STATES[server.state],
            running=server.running,
            waiting=server.waiting,
            tokens_refused=access.refused.get("tokens", ""),
            **server.about(),
        )
        if access.certificates is not None:
            certificate = response.certificate
            certificate.names.extend(access.certificates.names)
            certificate.not_after.FromDatetime(access.certificates.not_after)
            certificate.client_certificates_required = (
                access.certificates.files.client_ca is not None
            )
            certificate.refused = access.refused.get("certificates", "")
        if access.tokens is not None:
            now = datetime.now(UTC)
            for token in access.tokens.tokens.token:
                response.tokens.append(
                    _token_to_pb(token, access.tokens.quotas.quota_of(token), now)
                )
        return response


def _token_to_pb(token: Token, quota: Quota, now: datetime) -> pb.TokenStatus:
    limits = quota.limits
    status = pb.TokenStatus(
        id=token.id,
        name=token.name,
        scopes=token.scopes,
        usable=token.objection(now) is None,
        concurrent_streams=quota.in_flight,
        max_concurrent_streams=limits.concurrent_streams,
        requests_per_minute=limits.requests_per_minute,
        requests_left=quota.requests_left,
        tokens_per_minute=limits.tokens_per_minute,
        tokens_left=quota.tokens_left,
    )
    if token.expires is not None:
        status.expires.FromDatetime(token.expires)
    return status


def _level_to_pb(name: str) -> pb.LogLevel:
    return next(number for number, level in _LEVELS.items() if level == name)
