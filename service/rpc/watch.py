"""An RPC as its watchers see it: its ids on every log line, its log line, metrics and span."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextvars import Token
from typing import TYPE_CHECKING, Any

import structlog
from google.protobuf import descriptor_pool

from gptjet.service.engine.request import MAX_REQUEST_ID_LENGTH
from gptjet.service.observability.setup import Observability

if TYPE_CHECKING:
    from gptjet.service.rpc.interceptors import RequestRecord

# W3C Trace Context, section 3.2: version, trace-id, parent-id, flags; none of the ids is zero.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
_TRACEPARENT_KEY = "traceparent"

# OpenTelemetry's word for a method that there is not.
OTHER = "_OTHER"


class RpcWatch:
    """Follows every RPC from its arrival to its end. `write` makes the log line of one."""

    def __init__(
        self,
        write: Callable[[RequestRecord], None],
        observability: Observability,
        counted_prefix: str,
    ) -> None:
        """`counted_prefix` ("package.Service/") is left out of the methods' names in metrics."""
        self._write = write
        self._counted_prefix = counted_prefix
        self._metrics = observability.metrics
        self._tracing = observability.tracing

    def begin(
        self,
        record: RequestRecord,
        path: str,
        request: Any,
        metadata: Iterable[tuple[str, str | bytes]] | None,
    ) -> Mapping[str, Token[Any]]:
        """Give the RPC its ids, which are on every log line of its task from now on.

        path  "package.Service/Method"

        Returns what structlog's `reset_contextvars` takes to have them off again.
        """
        if record.counted and self._metrics is not None:
            self._metrics.rpc_started()  # first, as `end` comes even if what follows raises
        record.label = self._label(path)
        if not record.counted:
            return {}
        # The caller's own, or one of ours; what is too long for an id is refused later.
        given = str(getattr(request, "request_id", ""))[:MAX_REQUEST_ID_LENGTH]
        record.request_id = given or uuid.uuid4().hex
        pairs = list(metadata or ())
        if self._tracing is not None:
            name = OTHER if record.label == OTHER else path
            rpc = self._tracing.start_rpc(name, pairs, record.started_ns)
            record.trace, record.trace_id, record.span_id = rpc, rpc.trace_id, rpc.span_id
        else:
            record.trace_id = _trace_id(pairs)
        ids = {"request_id": record.request_id, "trace_id": record.trace_id}
        return structlog.contextvars.bind_contextvars(
            **{name: value for name, value in ids.items() if value is not None}
        )

    def describe(self, record: RequestRecord, request: Any) -> None:
        """Note on the span of an RPC what its engine request asks for."""
        if self._tracing is not None and record.trace is not None:
            self._tracing.describe(record.trace, request)

    def count_refused(self, record: RequestRecord) -> None:
        """Count an RPC that ended before `begin`, which then never comes; the log is the caller's.

        The record's method is the whole path.
        """
        if self._metrics is not None:
            label = self._label(record.method)
            self._metrics.rpc_ended(label, record.code.name, 0.0, counted=False)
            self._metrics.rpc_refused(record.refused_by)

    def _label(self, path: str) -> str:
        """The method in metrics: its callers cannot make up new ones."""
        service, _, name = path.rpartition("/")
        try:
            methods = descriptor_pool.Default().FindServiceByName(service).methods_by_name
        except KeyError:
            return OTHER
        return path.removeprefix(self._counted_prefix) if name in methods else OTHER

    def end(self, record: RequestRecord) -> None:
        """Log, count and end the span of an RPC."""
        self._write(record)
        if self._metrics is not None:
            duration_s = (time.monotonic_ns() - record.started_ns) / 1e9
            self._metrics.rpc_ended(
                record.label, record.code.name, duration_s, counted=record.counted
            )
            self._metrics.rpc_refused(record.refused_by)
        if self._tracing is not None and record.trace is not None:
            self._tracing.end_rpc(record.trace, record.code.name, _usage(record))


def _usage(record: RequestRecord) -> dict[str, Any]:
    """What the caller was sent; of a finished request the engine's summary says the same."""
    if record.output_tokens is None:
        return {}
    return {"gen_ai.usage.output_tokens": record.output_tokens}


def _trace_id(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The caller's trace id, so that its logs and ours are found together without any tracing."""
    for key, value in metadata:
        if key == _TRACEPARENT_KEY and isinstance(value, str):
            match = _TRACEPARENT.fullmatch(value)
            return match[1] if match else None
    return None
