"""Spans of requests to a real server, kept in memory, and sent to a collector."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.semconv._incubating.attributes import (
    error_attributes,
    gen_ai_attributes,
    rpc_attributes,
)

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import Client
from gptjet.service.config import ServerConfig
from gptjet.service.engine.tokenizer import ByteTokenizer
from gptjet.service.observability.setup import Observability
from gptjet.service.observability.tracing import Tracing
from gptjet.service.rpc.server import Server

StartServer = Callable[..., Awaitable[Any]]
SERVICE = "gptjet.v1.TextGeneration"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


class Traced:
    """A server of the mock backend and the spans that it has ended."""

    def __init__(self, ratio: float = 1.0, backend: MockBackend | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBasedTraceIdRatio(ratio))
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        config = ServerConfig(port=0, model="toy", backend="mock")
        self.server = Server(config, Observability(tracing=Tracing(provider, "toy")))
        self.backend = backend or MockBackend()

    async def __aenter__(self) -> Traced:
        await self.server.start()
        await self.server.attach(self.backend, ByteTokenizer())
        self.channel = grpc.aio.insecure_channel(self.target)
        self.stub: Any = pb_grpc.TextGenerationStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.server.drain(0.0)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def generate(self, *metadata: tuple[str, str], **params: Any) -> Any:
        message = pb.GenerateRequest(
            text="abc", request_id="mine", sampling_params=pb.SamplingParams(**params)
        )
        return await self.stub.Generate(message, metadata=metadata)

    async def spans(self, count: int) -> dict[str, ReadableSpan]:
        """The spans by name, once there are so many."""
        async with asyncio.timeout(20):
            while len(found := self.exporter.get_finished_spans()) < count:
                await asyncio.sleep(0.01)
        assert len(found) == count, [span.name for span in found]
        return {span.name: span for span in found}


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_request_is_one_span_with_queue_prefill_and_decode_in_it() -> None:
    async with Traced(backend=MockBackend(prefill_ms=10, decode_ms=5)) as traced:
        await traced.generate(("traceparent", TRACEPARENT), max_new_tokens=4)
        spans = await traced.spans(4)
    rpc = spans[f"{SERVICE}/Generate"]
    assert rpc.kind is trace.SpanKind.SERVER
    assert rpc.parent is not None
    assert trace.format_span_id(rpc.parent.span_id) == PARENT_ID
    rpc_context = rpc.get_span_context()
    assert rpc_context is not None
    previous_end = times(rpc)[0]
    for name in ("queue", "prefill", "decode"):
        span = spans[name]
        context = span.get_span_context()
        assert context is not None
        assert trace.format_trace_id(context.trace_id) == TRACE_ID
        assert span.parent is not None
        assert span.parent.span_id == rpc_context.span_id
        start, end = times(span)
        assert start == pytest.approx(previous_end, abs=2)  # rounded to ns, phase by phase
        assert end > start
        previous_end = end
    assert previous_end <= times(rpc)[1]
    assert times(spans["prefill"])[1] - times(spans["prefill"])[0] >= 10_000_000
    assert times(spans["decode"])[1] - times(spans["decode"])[0] >= 3 * 5_000_000


async def test_spans_have_the_conventions_attributes_and_no_text() -> None:
    async with Traced() as traced:
        await traced.generate(
            max_new_tokens=4, temperature=0.5, top_k=7, seed=2**64 - 1, stop=["never said"]
        )
        spans = await traced.spans(4)
    found = attributes(spans[f"{SERVICE}/Generate"])
    time_to_first = found.pop("gen_ai.response.time_to_first_chunk")
    assert 0 < time_to_first < 20  # seconds
    assert found == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/Generate",
        "rpc.response.status_code": "OK",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "gptjet",
        "gen_ai.request.model": "toy",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.seed": -1,
        "gen_ai.response.id": "mine",
        "gen_ai.response.model": "toy",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    everything = str([attributes(span) for span in spans.values()])
    assert "abc" not in everything
    assert "never said" not in everything


def test_names_of_attributes_are_those_of_the_conventions() -> None:
    from gptjet.service.observability import tracing

    conventional = {
        value
        for module in (error_attributes, gen_ai_attributes, rpc_attributes)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    source = Path(tracing.__file__).read_text(encoding="utf-8")
    used = set(re.findall(r'"((?:rpc|gen_ai|error)\.[a-z_.]+)"', source))
    assert len(used) > 15
    assert used - conventional == set()


async def test_a_stream_that_its_caller_leaves_is_cancelled_and_has_its_phases() -> None:
    async with Traced(backend=MockBackend(decode_ms=20)) as traced:
        message = pb.GenerateStreamRequest(
            text="abc", sampling_params=pb.SamplingParams(max_new_tokens=500)
        )
        call = traced.stub.GenerateStream(message)
        await call.read()
        await call.read()
        call.cancel()
        spans = await traced.spans(4)
    rpc = spans[f"{SERVICE}/GenerateStream"]
    assert attributes(rpc)["rpc.response.status_code"] == "CANCELLED"
    # The caller's doing: no error of the server.
    assert rpc.status.status_code is trace.StatusCode.UNSET
    assert attributes(spans["decode"])["gen_ai.usage.output_tokens"] >= 2


async def test_a_refused_request_is_a_span_without_phases() -> None:
    async with Traced() as traced:
        with pytest.raises(grpc.RpcError):
            await traced.generate(top_p=2.0)
        (rpc,) = (await traced.spans(1)).values()
    assert attributes(rpc)["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert rpc.status.status_code is trace.StatusCode.UNSET


async def test_a_failed_step_is_an_error_of_the_span() -> None:
    class Broken(MockBackend):
        def decode(self, batch: Any) -> Any:
            raise RuntimeError("the device is gone")

    async with Traced(backend=Broken()) as traced:
        with pytest.raises(grpc.RpcError):
            await traced.generate(max_new_tokens=4)
        rpc = (await traced.spans(3))[f"{SERVICE}/Generate"]
    assert rpc.status.status_code is trace.StatusCode.ERROR
    assert attributes(rpc)["error.type"] == "INTERNAL"
    assert attributes(rpc)["gen_ai.response.finish_reasons"] == ("error",)


async def test_a_score_request_has_its_phases() -> None:
    async with Traced() as traced:
        message = pb.ScoreRequest(text="The cat")
        for text in (" sat", " ran away"):
            message.candidates.add(text=text)
        await traced.stub.Score(message)
        spans = await traced.spans(4)
    found = attributes(spans[f"{SERVICE}/Score"])
    assert (found["gptjet.candidates"], found["gptjet.candidate_tokens"]) == (2, 4 + 9)
    assert set(spans) == {f"{SERVICE}/Score", "queue", "prefill", "decode"}


async def test_probes_make_no_spans() -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with Traced() as traced:
        stub: Any = health_pb2_grpc.HealthStub(traced.channel)
        await stub.Check(health_pb2.HealthCheckRequest())
        await traced.generate(max_new_tokens=1)
        spans = await traced.spans(3)
    assert set(spans) == {f"{SERVICE}/Generate", "queue", "prefill"}


async def test_what_the_caller_does_not_sample_is_not_recorded() -> None:
    async with Traced() as traced:
        await traced.generate(("traceparent", TRACEPARENT[:-2] + "00"), max_new_tokens=2)
        await traced.generate(max_new_tokens=2)
        spans = await traced.spans(4)
    context = spans["queue"].get_span_context()
    assert context is not None
    assert trace.format_trace_id(context.trace_id) != TRACE_ID


async def test_the_ratio_is_for_those_without_a_trace_context() -> None:
    async with Traced(ratio=0.0) as traced:
        await traced.generate(max_new_tokens=2)
        await traced.generate(("traceparent", TRACEPARENT), max_new_tokens=2)
        spans = await traced.spans(4)
    context = spans["queue"].get_span_context()
    assert context is not None
    assert trace.format_trace_id(context.trace_id) == TRACE_ID


@pytest.mark.parametrize(
    "traceparent", ["", "nonsense", "00-" + "0" * 32 + f"-{PARENT_ID}-01", TRACEPARENT + "x"]
)
async def test_a_broken_trace_context_begins_a_trace(traceparent: str) -> None:
    async with Traced() as traced:
        await traced.generate(("traceparent", traceparent), max_new_tokens=2)
        rpc = (await traced.spans(4))[f"{SERVICE}/Generate"]
    assert rpc.parent is None


# --- the client ---


@pytest.fixture
def caller() -> trace.Tracer:
    return TracerProvider().get_tracer("test")


async def test_the_client_sends_the_context_of_the_span_it_is_called_in(
    caller: trace.Tracer,
) -> None:
    async with Traced() as traced:
        from gptjet.service.client import AsyncClient

        def ask() -> None:
            with Client(traced.target, retry=None) as client:
                client.generate("abc", max_new_tokens=1)
                with client.generate_stream("abc", max_new_tokens=1) as stream:
                    list(stream)

        with caller.start_as_current_span("outer") as outer:
            await asyncio.to_thread(ask)
            async with AsyncClient(traced.target, retry=None) as client:
                await client.tokenize("abc")
                stream = client.generate_stream("abc", max_new_tokens=1)
                assert [chunk.text async for chunk in stream] == ["d"]
        # Four RPCs; three with queue and prefill.
        async with asyncio.timeout(20):
            while len(spans := traced.exporter.get_finished_spans()) < 4 + 3 * 2:
                await asyncio.sleep(0.01)
    rpcs = [span for span in spans if span.name.startswith(SERVICE)]
    assert len(rpcs) == 4
    for span in rpcs:
        assert span.parent is not None
        assert span.parent.span_id == outer.get_span_context().span_id


async def test_a_traceparent_given_as_metadata_is_kept(caller: trace.Tracer) -> None:
    from gptjet.service.client_channel import with_trace_context

    given = (("traceparent", TRACEPARENT), ("x", "y"))
    with caller.start_as_current_span("outer"):
        assert with_trace_context(given) == given
        assert dict(with_trace_context(()))["traceparent"].startswith("00-")
    assert with_trace_context((("x", "y"),)) == (("x", "y"),)


def test_the_client_does_not_import_opentelemetry_by_itself() -> None:
    script = (
        "import sys\nfrom gptjet.service import client_channel\n"
        "assert client_channel.with_trace_context((('x', 'y'),)) == (('x', 'y'),)\n"
        "print('opentelemetry' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr


# --- a collector, and none ---


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_reach_a_collector_before_the_server_has_drained(
    start_server: StartServer,
) -> None:
    collector = Collector()
    receiver = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, receiver)
    port = receiver.add_insecure_port("127.0.0.1:0")
    receiver.start()
    try:
        running = await start_server(otlp_endpoint=f"http://127.0.0.1:{port}")
        await running.client.generate("abc", max_new_tokens=2)
        await running.request_line(method="Generate")
        await running.server.drain(0.0)
    finally:
        receiver.stop(None)
    (resource,) = [part for request in collector.requests for part in request.resource_spans]
    named = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert named["service.name"] == "gptjet"
    names = {span.name for scope in resource.scope_spans for span in scope.spans}
    assert names == {f"{SERVICE}/Generate", "queue", "prefill", "decode"}


async def test_a_collector_that_is_down_fails_no_request_and_holds_no_exit_up(
    start_server: StartServer,
) -> None:
    running = await start_server(otlp_endpoint="http://127.0.0.1:1")
    answer = await running.client.generate("abc", max_new_tokens=2)
    assert answer.text == "de"
    async with asyncio.timeout(30):
        await running.server.drain(0.0)
