"""grpc.health.v1, with a Watch that a caller who does not read cannot use to hold up the server.

grpcio-health-checking's own servicer writes to a watcher under the lock that `set` needs, so one
stalled watcher would keep a draining server from saying so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """The status of a fixed set of services, all NOT_SERVING at first, set together."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = services
        self._status: int = NOT_SERVING
        self._changed = asyncio.Event()
        self._ended = False

    @property
    def is_serving(self) -> bool:
        """Whether the status is SERVING."""
        return self._status == SERVING

    def set_status(self, status: int) -> None:
        """Set the status of every service and wake the watchers; event-loop thread only."""
        if status == self._status:
            return
        self._status = status
        # Watchers hold the old event and are woken by it; later ones wait for the next change.
        self._changed.set()
        self._changed = asyncio.Event()

    def end_watches(self) -> None:
        """End every Watch, which otherwise lasts as long as its caller wants."""
        self._ended = True
        self._changed.set()

    async def Check(  # noqa: N802 - the name is gRPC's
        self,
        request: health_pb2.HealthCheckRequest,
        context: Any,
    ) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a service that is not here, as the protocol has it."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=self._status)

    # types-grpcio-health-checking does not know List's messages yet, hence Any.
    async def List(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        """The status of every service."""
        status = health_pb2.HealthCheckResponse(status=self._status)
        response_type: Any = health_pb2.HealthListResponse  # type: ignore[attr-defined]
        return response_type(statuses=dict.fromkeys(self._services, status))

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        _context: Any,
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and whenever it changes."""
        known = request.service in self._services
        told = None
        while True:
            changed = self._changed
            status = self._status if known else SERVICE_UNKNOWN
            if status != told:
                yield health_pb2.HealthCheckResponse(status=status)
                told = status
            if self._ended:
                return
            await changed.wait()
