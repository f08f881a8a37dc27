"""Around every RPC: requests that do not parse, errors to statuses, one log line at the end."""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import structlog
from google.protobuf import descriptor_pool

from gptjet.service.engine.errors import EngineError, InvalidRequestError
from gptjet.service.engine.request import FinishReason, RequestSummary
from gptjet.service.engine.score import ScoreResult
from gptjet.service.log import get_logger
from gptjet.service.observability.setup import Observability
from gptjet.service.rpc.status import (
    InternalError,
    MessageTooLargeError,
    RpcStatus,
    TooManyRpcsError,
    to_status,
)
from gptjet.service.rpc.watch import OTHER, RpcWatch
from gptjet.service.rpc.wire import explain_undecodable

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

logger = get_logger(__name__)

_DEADLINE_SLACK_NS = 20_000_000
# A caller who does not read does not take the status either; it is left to the connection then.
_ABORT_TIMEOUT_S = 1.0

# gRPC's classes are generic in their stubs only.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(slots=True)
class RequestRecord:
    """What is known of one RPC when it ends; the servicer fills in what only it knows.

    `counted` says that it is one of our service's and not a probe; its `method` has no prefix then.
    `caller` is the name of the bearer token it came with. `trace` is what its engine request
    carries for whoever makes spans of it; `label` is the method in metrics, and `refused_by` what
    refused it.
    """

    method: str
    peer: str
    counted: bool
    started_ns: int = field(default_factory=time.monotonic_ns)
    deadline_ns: int | None = None
    code: grpc.StatusCode = grpc.StatusCode.OK
    error: str | None = None
    refused_by: str | None = None
    request_id: str | None = None
    trace_id: str | None = None
    span_id: str | None = None
    trace: Any = None
    caller: str | None = None
    label: str = OTHER
    prompt: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    candidates: int | None = None
    candidate_tokens: int | None = None
    finish_reason: FinishReason | None = None
    summary: RequestSummary | None = None
    score: ScoreResult | None = None

    @property
    def deadline_reached(self) -> bool:
        """The caller has stopped waiting, or is about to.

        Its clock started before ours and the wire rounds a timeout up, so its cancellation arrives
        a little before the deadline that we know.
        """
        if self.deadline_ns is None:
            return False
        slack_ns = _DEADLINE_SLACK_NS + (self.deadline_ns - self.started_ns) // 100
        return time.monotonic_ns() >= self.deadline_ns - slack_ns

    def leave(self) -> FinishReason:
        """Note why an RPC ends that is not finished, if that is not known yet, and return it."""
        if self.finish_reason is None:
            reached = self.deadline_reached
            self.finish_reason = FinishReason.DEADLINE if reached else FinishReason.CANCELLED
        return self.finish_reason

    def fields(self) -> dict[str, object]:
        """The log line: what does not apply is left out."""
        fields: dict[str, object] = {
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "span_id": self.span_id,
            "method": self.method,
            "code": self.code.name,
            "finish_reason": self.finish_reason and self.finish_reason.value,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "candidates": self.candidates,
            "candidate_tokens": self.candidate_tokens,
            **self._timings(),
            "peer": self.peer,
            "caller": self.caller,
            "error": self.error,
            "prompt": self.prompt,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _timings(self) -> dict[str, object]:
        total_ms = round((time.monotonic_ns() - self.started_ns) / 1e6, 3)
        if self.score is not None:
            timings = self.score.timings
            return {
                "queue_ms": round(timings.queue_ms, 3),
                "prefill_ms": round(timings.prefill_ms, 3),
                "decode_ms": round(timings.decode_ms, 3),
                "e2e_ms": total_ms,
            }
        if self.summary is None:
            return {"e2e_ms": total_ms}
        timings = self.summary.timings
        # The first token of each sequence is prefill's, so decode made one fewer each.
        decoded = self.summary.completion_tokens - len(self.summary.sequences)
        has_rate = decoded > 0 and timings.decode_ms > 0
        return {
            "queue_ms": round(timings.queue_ms, 3),
            "prefill_ms": round(timings.prefill_ms, 3),
            "ttft_ms": round(timings.ttft_ms, 3),
            "decode_ms": round(timings.decode_ms, 3),
            "e2e_ms": total_ms,
            "tokens_per_s": round(decoded / timings.decode_ms * 1e3, 2) if has_rate else None,
        }


_current: ContextVar[RequestRecord] = ContextVar("gptjet_request_record")


def current_record() -> RequestRecord:
    """The record of the RPC that the calling task serves."""
    return _current.get()


def log_record(record: RequestRecord) -> None:
    """One line a request; probes and reflection, which come every few seconds, only at debug."""
    write = logger.info if record.counted else logger.debug
    write("request", **record.fields())


@dataclass(frozen=True, slots=True)
class _Unusable:
    """Stands in for a request whose bytes did not parse, or were too many."""

    error: EngineError


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """Ends every RPC with one status and one record, which the log, metrics and spans are made of.

    `idle` is set while no RPC of `counted_service` is being served. More than `max_rpcs` of it are
    refused, and so are requests of more than `max_message_bytes`: gRPC's own limit does not name
    the setting.
    """

    def __init__(
        self,
        counted_service: str,
        observability: Observability,
        *,
        max_rpcs: int = sys.maxsize,
        max_message_bytes: int = sys.maxsize,
    ) -> None:
        self._max_rpcs = max_rpcs
        self._max_message_bytes = max_message_bytes
        self._counted_prefix = counted_service + "/"
        self.watch = RpcWatch(log_record, observability, self._counted_prefix)
        self._active = 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handlers that take one request; reflection's stream is left as it is."""
        handler: _Handler | None = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        method = handler_call_details.method.removeprefix("/")
        deserializer = _explaining(handler.request_deserializer, method, self._max_message_bytes)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, handler.unary_stream),
                deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary), deserializer, handler.response_serializer
        )

    def _unary(self, method: str, behaviour: Any) -> Any:
        async def serve(request: Any, context: _Context) -> Any:
            async with self._observed(method, request, context):
                return await behaviour(request, context)

        return serve

    def _stream(self, method: str, behaviour: Any) -> Any:
        # A coroutine that writes, never a generator: a generator whose caller goes away while a
        # message is being sent is not told until it is garbage collected, its sequences with it.
        async def serve(request: Any, context: _Context) -> None:
            async with self._observed(method, request, context):
                if not inspect.isasyncgenfunction(behaviour):
                    await behaviour(request, context)
                    return
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)

        return serve

    @asynccontextmanager
    async def _observed(self, method: str, request: Any, context: _Context) -> AsyncIterator[None]:
        counted = method.startswith(self._counted_prefix)
        record = RequestRecord(
            method=method.removeprefix(self._counted_prefix), peer=context.peer(), counted=counted
        )
        remaining_s: float | None = context.time_remaining()
        if remaining_s is not None:
            record.deadline_ns = record.started_ns + round(remaining_s * 1e9)
        token = _current.set(record)
        self._count(counted)
        bound: Mapping[str, Token[Any]] = {}
        try:
            bound = self.watch.begin(record, method, request, context.invocation_metadata())
            if isinstance(request, _Unusable):
                raise request.error
            if counted and self._active > self._max_rpcs:
                raise TooManyRpcsError(self._max_rpcs)
            yield
        except grpc.aio.AbortError:
            record.code, record.error = context.code(), context.details()
            raise
        except asyncio.CancelledError:
            late = record.leave() is FinishReason.DEADLINE
            record.code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:  # noqa: BLE001 - a bug is logged, and its caller told an id
            status = to_status(error) or _internal(error, method)
            record.code, record.error = status.code, status.message
            record.refused_by = status.refused_by
            if status.code is grpc.StatusCode.INTERNAL and record.finish_reason is not None:
                record.finish_reason = FinishReason.ERROR
            await _abort(context, status)
        finally:
            _current.reset(token)
            self._count(counted, -1)
            self.watch.end(record)
            structlog.contextvars.reset_contextvars(**bound)

    def _count(self, counted: bool, change: int = 1) -> None:
        if not counted:
            return
        self._active += change
        if self._active:
            self.idle.clear()
        else:
            self.idle.set()


async def _abort(context: _Context, status: RpcStatus) -> None:
    try:
        async with asyncio.timeout(_ABORT_TIMEOUT_S):
            await context.abort(status.code, status.message, status.trailing_metadata())
    except TimeoutError:
        # Ends the handler. The status is sent when the caller reads, or never.
        raise asyncio.CancelledError from None


def _internal(error: Exception, method: str) -> RpcStatus:
    """A bug: the log gets the traceback, the caller an id to ask for."""
    error_id = uuid.uuid4().hex[:12]
    logger.error("internal error", error_id=error_id, method=method, exc_info=error)
    status = to_status(InternalError(error_id))
    assert status is not None
    return status


def _explaining(
    deserializer: Callable[[bytes], Any] | None, method: str, max_bytes: int
) -> Callable[[bytes], Any] | None:
    """`deserializer`, but bytes that do not parse, or are too many, come out as what is wrong.

    Left to gRPC, they would end as INTERNAL without a word about the field.
    """
    if deserializer is None:
        return None
    request_type = _request_type(method)

    def deserialize(data: bytes) -> Any:
        if len(data) > max_bytes:
            return _Unusable(MessageTooLargeError(len(data), max_bytes))
        try:
            return deserializer(data)
        except Exception:
            if request_type is None:
                raise
            return _Unusable(InvalidRequestError(explain_undecodable(data, request_type)))

    return deserialize


def _request_type(method: str) -> Descriptor | None:
    service, _, name = method.rpartition("/")
    try:
        return descriptor_pool.Default().FindServiceByName(service).methods_by_name[name].input_type
    except KeyError:
        return None
