"""Spans of each request for OpenTelemetry: the RPC, and in it queue, prefill and decode.

Nothing is recorded while a request runs: the RPC's span is made when it arrives, the others from
the timings in its summary when it ends. Attributes follow OpenTelemetry's conventions for RPC and
for generative AI; what those have no name for is `gptjet.*`. Prompts and outputs are never in them.

Only imported where spans are asked for: `opentelemetry` is the extra gptjet[otel].
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from gptjet.service.engine.request import Request, RequestSummary, Timings
    from gptjet.service.engine.score import ScoreOutcome, ScoreRequest

# OpenTelemetry's conventions for gRPC servers: the other codes are the caller's doing.
_SERVER_ERRORS = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
)
_SHUTDOWN_S = 5.0
_NS_PER_MS = 1e6

_Attribute: TypeAlias = "str | int | float | bool | list[str]"


@dataclass(slots=True)
class RpcTrace:
    """One RPC's span; `Request.trace` while its request runs.

    offset_ns  what a `time.monotonic_ns()` is short of the Unix time, for the whole of a trace
    attributes  for the span's end
    """

    span: trace.Span
    offset_ns: int
    attributes: dict[str, _Attribute] = field(default_factory=dict)

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return trace.format_trace_id(self.span.get_span_context().trace_id)

    @property
    def span_id(self) -> str:
        """16 hexadecimal digits."""
        return trace.format_span_id(self.span.get_span_context().span_id)


class Tracing:
    """Makes the spans of one server; a RequestObserver."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        """`model` is the name it is served by."""
        self._provider = provider
        self._tracer = provider.get_tracer("gptjet")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def start_rpc(
        self, method: str, metadata: Iterable[tuple[str, str | bytes]], started_ns: int
    ) -> RpcTrace:
        """Start the span of an RPC (`package.Service/Method`), under its caller's if it has one."""
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        offset_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            method,
            # Not the task's context: what is not in the metadata is nobody's parent.
            context=self._propagator.extract(carrier, context=otel_context.Context()),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": method},
            start_time=started_ns + offset_ns,
        )
        return RpcTrace(span, offset_ns)

    def describe(self, rpc: RpcTrace, request: Request) -> None:
        """Note what a Generate or GenerateStream asks for."""
        if not rpc.span.is_recording():
            return
        params = request.sampling_params
        rpc.span.set_attributes(
            {
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": "gptjet",
                "gen_ai.request.model": self._model,
                "gen_ai.request.max_tokens": params.max_new_tokens,
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
                "gen_ai.request.top_k": params.top_k,
                "gen_ai.request.frequency_penalty": params.frequency_penalty,
                "gen_ai.request.presence_penalty": params.presence_penalty,
                "gen_ai.request.choice.count": params.n,
                "gen_ai.request.seed": _as_int64(request.seed),
                "gen_ai.response.id": request.request_id,
                "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            }
        )

    def end_rpc(self, rpc: RpcTrace, code: str, attributes: Mapping[str, _Attribute]) -> None:
        """End the span of an RPC with its gRPC status code, by name."""
        span = rpc.span
        if span.is_recording():
            span.set_attributes({"rpc.response.status_code": code, **rpc.attributes, **attributes})
            if code in _SERVER_ERRORS:
                span.set_attribute("error.type", code)
                span.set_status(trace.StatusCode.ERROR)
        span.end()

    def request_ended(self, request: Request, summary: RequestSummary, /) -> None:
        """Make the spans of the engine's part; see RequestObserver."""
        rpc = request.trace
        if not isinstance(rpc, RpcTrace) or not rpc.span.get_span_context().trace_flags.sampled:
            return
        timings = summary.timings
        # Of an RPC that its caller has left, the span has ended already: it has less to say.
        rpc.attributes |= {
            "gen_ai.response.model": self._model,
            "gen_ai.response.finish_reasons": [s.finish_reason.value for s in summary.sequences],
            "gen_ai.usage.output_tokens": summary.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": summary.cached_prompt_tokens,
        }
        prefill: dict[str, _Attribute] = {
            "gen_ai.usage.input_tokens": summary.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": summary.cached_prompt_tokens,
        }
        decode: dict[str, _Attribute] = {"gen_ai.usage.output_tokens": summary.completion_tokens}
        if timings.ttft_ms:
            rpc.attributes["gen_ai.response.time_to_first_chunk"] = timings.ttft_ms / 1e3
        if summary.speculation is not None:
            decode["gptjet.drafted_tokens"] = summary.speculation.drafted_tokens
            decode["gptjet.accepted_tokens"] = summary.speculation.accepted_tokens
        self._make_phases(rpc, request.arrival_ns, timings, prefill, decode)

    def score_ended(self, request: ScoreRequest, outcome: ScoreOutcome, /) -> None:
        """Make the spans of the engine's part; see RequestObserver."""
        rpc = request.trace
        if not isinstance(rpc, RpcTrace) or outcome.result is None:
            return
        if not rpc.span.get_span_context().trace_flags.sampled:
            return
        result = outcome.result
        rpc.attributes |= {
            "gen_ai.request.model": self._model,
            "gen_ai.response.id": result.request_id,
            "gen_ai.usage.input_tokens": result.prompt_tokens,
            "gptjet.candidates": len(result.scores),
            "gptjet.candidate_tokens": result.candidate_tokens,
        }
        self._make_phases(rpc, request.arrival_ns, result.timings, {}, {})

    def _make_phases(
        self,
        rpc: RpcTrace,
        arrival_ns: int,
        timings: Timings,
        prefill: Mapping[str, _Attribute],
        decode: Mapping[str, _Attribute],
    ) -> None:
        """Queue, prefill, decode, one after the other; those that were not reached are left out."""
        parent = trace.set_span_in_context(rpc.span, otel_context.Context())
        start_ns = arrival_ns + rpc.offset_ns
        for name, duration_ms, attributes in (
            ("queue", timings.queue_ms, {}),
            ("prefill", timings.prefill_ms, prefill),
            ("decode", timings.decode_ms, decode),
        ):
            if not duration_ms:
                continue
            span = self._tracer.start_span(
                name, context=parent, attributes=attributes, start_time=start_ns
            )
            start_ns += round(duration_ms * _NS_PER_MS)
            span.end(end_time=start_ns)

    def close(self) -> None:
        """Send what is left, for a few seconds at most. Blocks."""
        # In a thread: with a collector that is down it would take up to half a minute.
        sending = threading.Thread(target=self._provider.shutdown, name="otlp", daemon=True)
        sending.start()
        sending.join(_SHUTDOWN_S)


def otlp_provider(endpoint: str, sample_ratio: float, version: str) -> TracerProvider:
    """Spans to a collector, in batches from a thread; the OTEL_* variables say the rest.

    What cannot be sent is dropped: OTEL_BSP_MAX_QUEUE_SIZE bounds what waits.
    """
    defaults = Resource.create({SERVICE_VERSION: version})
    if str(defaults.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        defaults = defaults.merge(Resource({SERVICE_NAME: "gptjet"}))
    provider = TracerProvider(
        resource=defaults,
        sampler=ParentBasedTraceIdRatio(sample_ratio),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http:"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _as_int64(value: int) -> int:
    """An attribute is a signed number of 64 bits; a seed is one without a sign."""
    return value - 2**64 if value >= 2**63 else value
