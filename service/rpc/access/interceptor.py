"""In front of every RPC: who calls, whether they may, and what they have left."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

import grpc

from gptjet.service.engine.errors import EngineError
from gptjet.service.log import get_logger
from gptjet.service.rpc.access.errors import PermissionDeniedError, UnauthenticatedError
from gptjet.service.rpc.access.quota import QuotaBook
from gptjet.service.rpc.access.tokens import Scope, Token
from gptjet.service.rpc.interceptors import RequestRecord, current_record
from gptjet.service.rpc.status import to_status

logger = get_logger(__name__)

_MAX_LOGGED_METHOD = 128
_REFUSALS_PER_MINUTE = 60
_MINUTE_S = 60.0

_Details: TypeAlias = grpc.HandlerCallDetails
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
# gRPC's class is generic in its stub only.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_FACTORIES: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}

Authenticate = Callable[[Any, datetime], Token]
"""The token that an RPC's metadata shows; raises UnauthenticatedError."""


class RefusalLog:
    """Logs what was refused: so many a minute, as a stranger can cause any number of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s = clock()
        self._written = 0
        self._left_out = 0

    def __call__(self, record: RequestRecord) -> None:
        """Write a line, or count it."""
        now_s = self._clock()
        if now_s - self._since_s >= _MINUTE_S:
            if self._left_out:
                logger.warning("more refusals", left_out=self._left_out, within_s=_MINUTE_S)
            self._since_s, self._written, self._left_out = now_s, 0, 0
        if self._written >= _REFUSALS_PER_MINUTE:
            self._left_out += 1
            return
        self._written += 1
        logger.warning(
            "refused",
            method=record.method[:_MAX_LOGGED_METHOD],
            code=record.code.name,
            error=record.error,
            peer=record.peer,
        )


@dataclass(slots=True, eq=False)
class _RunningCall:
    """An RPC that was let in, and what ends it: `timeout` has no time of its own."""

    shown: Any
    scope: Scope | None
    timeout: asyncio.Timeout
    objection: EngineError | None = None

    def end(self, objection: EngineError) -> None:
        """Have its task end with this as soon as the event loop comes to it."""
        if not self.timeout.expired():
            self.objection = objection
            self.timeout.reschedule(asyncio.get_running_loop().time())


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets an RPC through to its handler once its token is good and has the right and the quota.

    authenticate  finds the caller's token
    scopes        what a service asks of a token, by the service's full name; a service that is not
                  listed, and a method that nobody serves, asks for a good token and no more
    open_services services that ask for nothing
    quotas        counts the RPCs of the services in `scopes`; None: without limits
    on_refused    called with each RPC that is refused for want of a token or a right

    An RPC without a good token is refused before anything of its request is read. One with a good
    token is asked again when its request is there: a caller may send the headers long before it.
    And by `end_refused`, for as long as it runs.
    Stands behind the RequestInterceptor, whose record it fills in.
    """

    def __init__(
        self,
        authenticate: Authenticate,
        scopes: Mapping[str, Scope],
        *,
        open_services: frozenset[str] = frozenset(),
        quotas: QuotaBook | None = None,
        on_refused: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self._authenticate = authenticate
        self._scopes = scopes
        self._open_services = open_services
        self._quotas = quotas
        self._on_refused = RefusalLog() if on_refused is None else on_refused
        self._running: set[_RunningCall] = set()

    def end_refused(self) -> int:
        """End the running RPCs whose token is good no more or has lost the right; their number.

        Each ends with the status that a new one would be refused with. Reflection goes on.
        """
        ended = 0
        for call in self._running:
            try:
                self._let_in(call.shown, call.scope)
            except (UnauthenticatedError, PermissionDeniedError) as error:
                call.end(type(error)(f"ended while it ran: {error}"))
                ended += 1
        return ended

    async def intercept_service(
        self, continuation: Callable[[_Details], Awaitable[Any]], handler_call_details: _Details
    ) -> Any:
        """The handler behind the checks; another that refuses where they fail."""
        method = handler_call_details.method
        service = method.removeprefix("/").rpartition("/")[0]
        if service in self._open_services:
            return await continuation(handler_call_details)
        # The types call it metadata of call credentials; it is what the caller sent.
        shown: Any = handler_call_details.invocation_metadata or ()
        scope = self._scopes.get(service)
        try:
            self._let_in(shown, scope)
        except (UnauthenticatedError, PermissionDeniedError) as error:
            return self._refusing(method, error)
        handler: _Handler | None = await continuation(handler_call_details)
        # Reflection, the one service whose requests stream, shows the public contract and no more.
        if handler is None or (scope is None and handler.request_streaming):
            return handler
        return self._checking(handler, shown, scope)

    def _let_in(self, shown: Any, scope: Scope | None) -> Token:
        token = self._authenticate(shown, datetime.now(UTC))
        if scope is not None:
            token.require(scope)
        return token

    def _refusing(self, method: str, error: EngineError) -> Any:
        """A handler that takes every kind of RPC, as it reads no request before it answers."""
        status = to_status(error)
        assert status is not None

        async def refuse(_requests: Any, context: _Context) -> None:
            record = RequestRecord(
                method=method.removeprefix("/"), peer=context.peer(), counted=True
            )
            record.code, record.error = status.code, status.message
            record.refused_by = status.refused_by
            self._on_refused(record)
            await context.abort(status.code, status.message, status.trailing_metadata())

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _checking(self, handler: _Handler, shown: Any, scope: Scope | None) -> Any:
        """`handler`, if the token is still good, and within its quotas where it needs a scope.

        Both are asked when the RPC runs and not when its handler is looked up. In between lies as
        long as the caller likes, and the token may be revoked or expire, or lose its scope. And the
        RPC can be cancelled, and nobody would give the quotas back.
        """
        quotas = None if scope is None else self._quotas
        streams = handler.response_streaming
        behaviour = _behaviour_of(handler)

        async def serve(request: Any, context: _Context) -> Any:
            token = self._let_in(shown, scope)
            _note_caller(token)
            with contextlib.ExitStack() as admitted:
                if quotas is not None:
                    admitted.enter_context(quotas.quota_of(token).admitted())
                return await self._run_while_let_in(shown, scope, _run(behaviour, request, context))

        factory = _FACTORIES[handler.request_streaming, streams]
        return factory(serve, handler.request_deserializer, handler.response_serializer)

    async def _run_while_let_in(
        self, shown: Any, scope: Scope | None, work: Coroutine[Any, Any, Any]
    ) -> Any:
        """What `work` returns, unless `end_refused` ends it: then why, raised."""
        call = _RunningCall(shown, scope, asyncio.timeout(None))
        try:
            async with call.timeout:
                self._running.add(call)
                try:
                    return await work
                finally:
                    self._running.discard(call)
        except TimeoutError:
            if call.objection is None:
                raise
            raise call.objection from None


def _behaviour_of(handler: _Handler) -> Any:
    return next(
        behaviour
        for behaviour in (
            handler.unary_unary,
            handler.unary_stream,
            handler.stream_unary,
            handler.stream_stream,
        )
        if behaviour is not None
    )


async def _run(behaviour: Any, request: Any, context: _Context) -> Any:
    if not inspect.isasyncgenfunction(behaviour):
        return await behaviour(request, context)
    # Written here and not yielded: see RequestInterceptor.
    responses: AsyncIterator[Any]
    async with aclosing(behaviour(request, context)) as responses:
        async for response in responses:
            await context.write(response)
    return None


def _note_caller(token: Token) -> None:
    record = current_record()
    record.caller = token.name
