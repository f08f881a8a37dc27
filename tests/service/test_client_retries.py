"""The client against scripted servers that fail on purpose: what it retries, what it raises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
from gptjet.service.client import (
    AsyncClient,
    CancelledError,
    Client,
    FinishReason,
    GptjetError,
    PermissionDeniedError,
    QueueFullError,
    ResourceExhaustedError,
    RetryPolicy,
    UnauthenticatedError,
    UnavailableError,
)
from gptjet.service.engine.errors import EngineUnavailableError
from gptjet.service.engine.errors import QueueFullError as EngineQueueFullError
from gptjet.service.rpc.status import to_status

QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.01)


class Scripted(pb_grpc.TextGenerationServicer):
    """Fails `failures` times with `error`, then answers "ok". Counts the attempts that arrive."""

    def __init__(
        self, failures: int, error: Exception, code: grpc.StatusCode | None = None
    ) -> None:
        self.failures = failures
        self.error = error
        self.code = code
        self.attempts = 0

    async def _fail(self, context: Any) -> None:
        self.attempts += 1
        if self.attempts <= self.failures:
            if self.code is not None:
                await context.abort(self.code, "scripted")
            status = to_status(self.error)
            assert status is not None
            await context.abort(status.code, status.message, status.trailing_metadata())

    async def Generate(self, request: Any, context: Any) -> pb.GenerateResponse:  # noqa: N802
        await self._fail(context)
        return pb.GenerateResponse(sequences=[pb.GeneratedSequence(text="ok")])

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        await self._fail(context)
        yield pb.GenerateStreamResponse(chunk=pb.TokenChunk(text="ok"))
        yield pb.GenerateStreamResponse(
            summary=pb.GenerationSummary(finish_reason=77)  # type: ignore[arg-type]
        )
        if request.text == "fail later":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    async def Tokenize(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def Detokenize(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError


@pytest.fixture
async def serve_scripted() -> AsyncIterator[Callable[[Scripted], Awaitable[str]]]:
    servers = []

    async def start(servicer: Scripted) -> str:
        server = grpc.aio.server()
        pb_grpc.add_TextGenerationServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(None)


UNAVAILABLE = EngineUnavailableError("the model is loading", retry_after_s=0.01)
FULL = EngineQueueFullError(1, retry_after_s=0.01)


async def test_unavailable_is_retried(serve_scripted: Any) -> None:
    servicer = Scripted(3, UNAVAILABLE)
    async with AsyncClient(await serve_scripted(servicer), retry=QUICK) as client:
        assert (await client.generate("a")).text == "ok"
    assert servicer.attempts == 4


async def test_unavailable_without_a_time_to_come_back_is_retried_with_backoff(
    serve_scripted: Any,
) -> None:
    servicer = Scripted(2, UNAVAILABLE, grpc.StatusCode.UNAVAILABLE)
    async with AsyncClient(await serve_scripted(servicer), retry=QUICK) as client:
        assert (await client.generate("a")).text == "ok"
    assert servicer.attempts == 3


async def test_stream_is_retried_before_its_first_message_and_never_after(
    serve_scripted: Any,
) -> None:
    servicer = Scripted(2, UNAVAILABLE)
    async with AsyncClient(await serve_scripted(servicer), retry=QUICK) as client:
        stream = client.generate_stream("a")
        assert [token.text async for token in stream] == ["ok"]
        assert servicer.attempts == 3
        with pytest.raises(UnavailableError, match="gone"):
            async for _ in client.generate_stream("fail later"):
                pass
    assert servicer.attempts == 4


async def test_sync_client_retries_too(serve_scripted: Any) -> None:
    servicer = Scripted(2, UNAVAILABLE)
    target = await serve_scripted(servicer)

    def use() -> str:
        with Client(target, retry=QUICK) as client:
            return client.generate("a").text

    assert await asyncio.to_thread(use) == "ok"
    assert servicer.attempts == 3


async def test_retries_end_and_can_be_turned_off(serve_scripted: Any) -> None:
    for retry, attempts in ((QUICK, 5), (RetryPolicy(max_attempts=2), 2), (None, 1)):
        servicer = Scripted(99, UNAVAILABLE)
        async with AsyncClient(await serve_scripted(servicer), retry=retry) as client:
            with pytest.raises(UnavailableError, match="the model is loading") as caught:
                await client.generate("a")
        assert caught.value.retry_after_s == 0.01
        assert servicer.attempts == attempts


async def test_full_queue_is_retried_only_when_asked(serve_scripted: Any) -> None:
    servicer = Scripted(1, FULL)
    async with AsyncClient(await serve_scripted(servicer), retry=QUICK) as client:
        with pytest.raises(QueueFullError) as caught:
            await client.generate("a")
    assert caught.value.retry_after_s == 0.01
    servicer = Scripted(1, FULL)
    target = await serve_scripted(servicer)
    async with AsyncClient(target, retry=QUICK, retry_queue_full=True) as client:
        assert (await client.generate("a")).text == "ok"
    assert servicer.attempts == 2


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhaustedError),
        (grpc.StatusCode.CANCELLED, CancelledError),
        (grpc.StatusCode.UNAUTHENTICATED, UnauthenticatedError),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDeniedError),
        (grpc.StatusCode.DATA_LOSS, GptjetError),
    ],
)
async def test_status_without_details_is_still_an_error_of_ours(
    serve_scripted: Any, code: grpc.StatusCode, expected: type[GptjetError]
) -> None:
    async with AsyncClient(await serve_scripted(Scripted(1, UNAVAILABLE, code))) as client:
        with pytest.raises(GptjetError) as caught:
            await client.generate("a")
    assert type(caught.value) is expected
    assert (caught.value.code, caught.value.message) == (code, "scripted")
    assert caught.value.retry_after_s is None
    assert str(caught.value) == f"{code.name}: scripted"


async def test_finish_reason_of_a_newer_server_is_unspecified(serve_scripted: Any) -> None:
    async with AsyncClient(await serve_scripted(Scripted(0, UNAVAILABLE))) as client:
        stream = client.generate_stream("a")
        async for _ in stream:
            pass
    assert stream.summary is not None
    assert stream.summary.finish_reason is FinishReason.UNSPECIFIED
