"""Quotas of a running server: what a caller is told, and that nothing leaks however it leaves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import (
    AsyncClient,
    DeadlineExceededError,
    GptjetError,
    InternalError,
    InvalidRequestError,
    QueueFullError,
    QuotaExceededError,
)
from gptjet.service.rpc.access import quota
from gptjet.service.rpc.access.quota import Quota

MakeToken = Callable[..., str]


@pytest.fixture(autouse=True)
def _no_refill(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the quotas stands still, so that what is left can be counted."""
    init = quota.QuotaBook.__init__
    monkeypatch.setattr(
        quota.QuotaBook, "__init__", lambda self, default: init(self, default, lambda: 0)
    )


class Guarded:
    """A server with one token, its client, and what is left of its quotas."""

    def __init__(self, running: Any, token: str) -> None:
        self.running = running
        self.token = token
        self.client: AsyncClient = running.new_client(token=token, retry=None, timeout_s=20.0)

    @property
    def quota(self) -> Quota:
        tokens = self.running.server.access.tokens
        return tokens.quotas.quota_of(tokens.tokens.token[0])

    async def until_idle(self) -> None:
        await self.running.until(lambda: self.quota.in_flight == 0)


@pytest.fixture
def guarded(start_server: Any, tokens_file: Path, make_token: MakeToken) -> Any:
    """`await guarded(limits={...}, **server settings)`"""

    async def start(limits: dict[str, int], **settings: Any) -> Guarded:
        token = make_token("web", **limits)
        return Guarded(await start_server(tokens_file=tokens_file, **settings), token)

    return start


async def test_a_finished_request_is_charged_its_prompt_and_its_output(guarded: Any) -> None:
    server = await guarded({"tokens_per_minute": 1000, "requests_per_minute": 10})
    await server.client.generate("abc", max_new_tokens=5)  # 3 + 5
    stream = server.client.generate_stream("abcd", max_new_tokens=6, n=2)  # 4 + 12
    assert len([chunk async for chunk in stream]) == 12
    # Stops early: 2 prompt tokens and the "c" that was delivered, not the 100 it reserved.
    assert (await server.client.generate("ab", max_new_tokens=100, stop=["d"])).text == "c"
    await server.client.score("ab", ["c", "de"])  # 2 + 3
    await server.client.score("ab", ["c", "de"], calibration_prompt="x")  # (2 + 3) + (1 + 3)
    await server.client.tokenize("abc")
    await server.until_idle()
    lines = [line for line in server.running.logs if line["event"] == "request"]
    output = sum(line.get("output_tokens", 0) for line in lines)
    assert 5 + 12 + 1 <= output <= 5 + 12 + 2, "the stop string's own token may be counted"
    assert server.quota.tokens_left == 1000 - (3 + 4 + 2) - output - 5 - 9
    assert server.quota.requests_left == 10 - 6


async def test_the_refusal_carries_retry_info_and_the_quota_that_failed(guarded: Any) -> None:
    server = await guarded({"tokens_per_minute": 60, "requests_per_minute": 2})
    channel = grpc.aio.insecure_channel(server.running.target)
    generate = channel.unary_unary("/gptjet.v1.TextGeneration/Generate")
    request = pb.GenerateRequest(
        text="ab", sampling_params=pb.SamplingParams(max_new_tokens=40)
    ).SerializeToString()

    async def refused() -> tuple[Any, Any, Any]:
        with pytest.raises(grpc.RpcError) as caught:
            await generate(request, metadata=(("authorization", f"Bearer {server.token}"),))
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(error.trailing_metadata())
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        failure, retry = error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(failure)
        (violation,) = failure.violations
        has_retry = len(status.details) == 2 and status.details[1].Unpack(retry)
        return violation, retry.retry_delay.ToMilliseconds() if has_retry else None, trailers

    await generate(request, metadata=(("authorization", f"Bearer {server.token}"),))
    violation, retry_ms, trailers = await refused()
    assert violation.subject == "token:web"
    assert (violation.quota_id, violation.quota_value) == ("tokens_per_minute", 60)
    assert "tokens_per_minute" in violation.description
    assert retry_ms == 24_000  # 18 are left of 60, 24 are missing, one comes each second
    assert trailers["grpc-retry-pushback-ms"] == "24000"
    violation, retry_ms, _ = await refused()
    assert (violation.quota_id, violation.quota_value) == ("requests_per_minute", 2)
    assert retry_ms == 30_000
    await channel.close()


async def test_a_request_that_no_wait_would_let_in_is_told_so(guarded: Any) -> None:
    server = await guarded({"tokens_per_minute": 50})
    with pytest.raises(QuotaExceededError, match="more than a minute allows") as caught:
        await server.client.generate("abc", max_new_tokens=48)
    assert caught.value.retry_after_s is None
    assert (await server.client.generate("abc", max_new_tokens=47)).text


async def test_limits_of_the_server_hold_for_tokens_without_their_own(
    guarded: Any, make_token: MakeToken
) -> None:
    server = await guarded({"requests_per_minute": 1}, token_requests_per_minute=2)
    await server.client.get_model()
    with pytest.raises(QuotaExceededError, match=r"token web: .*requests_per_minute = 1"):
        await server.client.get_model()
    other = server.running.new_client(token=make_token("other"), retry=None)
    await server.running.server.access.reload()
    for _ in range(2):
        await other.get_model()
    with pytest.raises(QuotaExceededError, match=r"token other: .*requests_per_minute = 2"):
        await other.get_model()


async def test_health_and_reflection_are_not_charged(guarded: Any) -> None:
    server = await guarded({"requests_per_minute": 1, "concurrent_streams": 1})
    for _ in range(5):
        await server.client.health()
    await server.client.get_model()


async def test_a_place_is_free_again_however_the_rpc_ends(guarded: Any) -> None:
    """One place, so that the second leak would be seen by the next request."""
    backend = MockBackend(decode_ms=5)
    server = await guarded(
        {"concurrent_streams": 1, "tokens_per_minute": 100_000}, backend=backend, max_queue_size=1
    )
    client = server.client

    async def finished() -> None:
        await client.generate("a", max_new_tokens=2)

    async def cancelled_at_once() -> None:
        task = asyncio.create_task(client.generate("a", max_new_tokens=400))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def cancelled_in_the_middle() -> None:
        stream = client.generate_stream("a", max_new_tokens=400)
        await anext(stream)
        stream.cancel()

    async def too_late() -> None:
        with pytest.raises(DeadlineExceededError):
            await client.generate("a", max_new_tokens=400, timeout_s=0.05)

    async def invalid() -> None:
        with pytest.raises(InvalidRequestError):
            await client.generate("a", max_new_tokens=10_000)

    async def undecodable() -> None:
        channel = grpc.aio.insecure_channel(server.running.target)
        with pytest.raises(grpc.RpcError):
            await channel.unary_unary("/gptjet.v1.TextGeneration/Generate")(
                b"\xff\xff", metadata=(("authorization", f"Bearer {server.token}"),)
            )
        await channel.close()

    async def failing() -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("the card fell out")

        decode, backend.decode = backend.decode, broken  # type: ignore[method-assign]
        try:
            with pytest.raises(InternalError):
                await client.generate("a", max_new_tokens=5)
        finally:
            backend.decode = decode  # type: ignore[method-assign]

    async def connection_lost() -> None:
        leaving = server.running.new_client(token=server.token, retry=None)
        stream = leaving.generate_stream("a", max_new_tokens=400)
        await anext(stream)
        await leaving.close()

    ways = (
        *(finished, cancelled_at_once, cancelled_in_the_middle, too_late, invalid),
        *(undecodable, failing, connection_lost),
    )
    for way in ways * 2:
        await way()
        # The server has seen, when it answers this, what was sent before and perhaps given up.
        await client.health()
        await server.until_idle()
        assert server.quota.in_flight == 0, way.__name__
    await server.running.until(lambda: not backend.cached)


async def test_one_more_than_the_concurrent_streams_is_refused(guarded: Any) -> None:
    server = await guarded({"concurrent_streams": 2}, backend=MockBackend(decode_ms=25))
    streams = [server.client.generate_stream("a", max_new_tokens=400) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(QuotaExceededError, match=r"2 RPCs are in flight \(concurrent_streams = 2"):
        await server.client.get_model()
    streams[0].cancel()
    await server.running.until(lambda: server.quota.in_flight == 1)
    await server.client.get_model()
    streams[1].cancel()


async def test_what_the_engine_refuses_gets_its_reservation_back(guarded: Any) -> None:
    server = await guarded(
        {"tokens_per_minute": 1000},
        backend=MockBackend(decode_ms=25, max_sequences=1),
        max_sequences=1,
        max_queue_size=1,
    )
    for refused in ({"max_new_tokens": 400, "temperature": -1.0}, {"max_new_tokens": 510}):
        with pytest.raises(InvalidRequestError):
            await server.client.generate("abc", **refused)
    assert server.quota.tokens_left == 1000
    running = server.client.generate_stream("abc", max_new_tokens=300)
    await anext(running)
    waiting = server.client.generate_stream("abc", max_new_tokens=300)
    await server.running.until(lambda: server.running.server.waiting == 1)
    assert server.quota.tokens_left == 1000 - 606
    with pytest.raises(QueueFullError):
        await server.client.generate("abc", max_new_tokens=300)
    assert server.quota.tokens_left == 1000 - 606
    waiting.cancel()
    running.cancel()
    await server.until_idle()
    lines = [line for line in server.running.logs if line.get("output_tokens") is not None]
    assert server.quota.tokens_left == 1000 - 6 - sum(line["output_tokens"] for line in lines)


async def test_what_is_cancelled_while_it_waits_costs_its_prompt_or_the_whole_score(
    guarded: Any,
) -> None:
    """As quota.py says: work that a caller queues and drops is not free."""
    server = await guarded(
        {"tokens_per_minute": 1000},
        backend=MockBackend(decode_ms=25, max_sequences=1),
        max_sequences=1,
    )
    other = server.running.server
    stream = server.client.generate_stream("abc", max_new_tokens=400)
    await anext(stream)
    for cost, call in (
        (4, server.client.generate("abcd", max_new_tokens=300)),
        (2 + 3, server.client.score("ab", ["c", "de"])),
    ):
        in_flight, before = server.quota.in_flight, _used(server)
        task = asyncio.create_task(call)
        await server.running.until(lambda: other.waiting == 1)
        task.cancel()
        await server.running.until(lambda n=in_flight: server.quota.in_flight == n)
        assert _used(server) - before == cost
        await server.running.until(lambda: other.waiting == 0)
    stream.cancel()
    await server.until_idle()


def _used(server: Any) -> int:
    """Tokens charged beside those of the stream that runs, which has reserved its own."""
    return 1000 - 403 - server.quota.tokens_left


async def test_random_traffic_leaks_no_place_and_is_charged_what_it_got(guarded: Any) -> None:
    """200 requests that finish, are cancelled, time out or are refused, at random; then the log's
    own counts, which nothing of the quotas writes, say what must be left."""
    everything = 10**7
    server = await guarded(
        {"concurrent_streams": 20, "tokens_per_minute": everything},
        backend=MockBackend(decode_ms=1),
        max_queue_size=8,
    )
    chance = random.Random(8)

    async def one(index: int) -> None:
        await asyncio.sleep(chance.random() * 0.5)
        task = asyncio.create_task(
            server.client.generate(
                "a" * chance.randint(1, 20),
                request_id=f"r{index}",
                max_new_tokens=chance.choice([1, 5, 60, 300, 2000]),
                n=chance.randint(1, 3),
                timeout_s=chance.choice([0.02, 0.2, 20.0]),
            )
        )
        if chance.random() < 0.5:
            await asyncio.sleep(chance.random() * 0.2)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async with asyncio.TaskGroup() as group:
        for index in range(200):
            group.create_task(one(index))
    await server.until_idle()
    await server.running.until(lambda: server.running.server._rpcs.idle.is_set())
    lines = [line for line in server.running.logs if line["event"] == "request"]
    codes = {line["code"] for line in lines}
    assert {"OK", "CANCELLED", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"} <= codes
    # The engine took those that have a count of output tokens.
    charged = sum(
        line["prompt_tokens"] + line["output_tokens"] for line in lines if "output_tokens" in line
    )
    assert server.quota.tokens_left == everything - charged
    with pytest.raises(GptjetError):
        await server.client.generate("a", max_new_tokens=0)
    assert server.quota.in_flight == 0
