"""Limits over a real wire: each is refused by its name, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import InternalError, QueueFullError, RetryPolicy, UnavailableError
from gptjet.service.rpc import watch

StartServer = Callable[..., Awaitable[Any]]

# HTTP/2's smallest window, 64 KiB, and no probing for a larger one: so that a caller who does not
# read holds the server up after some hundred messages and not after megabytes.
SMALL_WINDOW = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024),
    ("grpc.use_local_subchannel_pool", 1),
]


def long_stream_request(max_new_tokens: int = 400) -> pb.GenerateStreamRequest:
    """One of many and large messages: 16 sequences with twenty log-probabilities a token."""
    params = pb.SamplingParams(max_new_tokens=max_new_tokens, n=16, logprobs=20)
    return pb.GenerateStreamRequest(text="a", sampling_params=params)


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def assert_nothing_left(running: Any) -> None:
    inner = running.server.engine.engine
    assert not inner.has_work
    assert running.server.engine._admission.tokens_in_flight == 0
    manager = inner.scheduler.block_manager
    manager.check_invariants()
    assert manager.num_free_blocks == manager.num_blocks


# --- callers who do not read ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"slow_reader_timeout_s": 0.5}, "took nothing for 0.5 s (slow_reader_timeout_s)"),
        ({"max_unread_tokens": 200}, "more than 200 tokens wait for it (max_unread_tokens)"),
    ],
    ids=["seconds", "tokens"],
)
async def test_a_caller_that_does_not_read_is_cut_off_by_name_and_stalls_nobody(
    start_server: StartServer, settings: dict[str, Any], words: str
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=0.5), **settings)
    async with grpc.aio.insecure_channel(running.target, options=SMALL_WINDOW) as channel:
        stub: Any = pb_grpc.TextGenerationStub(channel)
        call = stub.GenerateStream(long_stream_request())
        assert (await call.read()).chunk.text
        # It reads no more. The others do not feel it.
        reading = running.new_client()
        text = (await reading.generate("a", max_new_tokens=100)).text
        assert len(text) == 100
        line = await running.request_line(method="GenerateStream")
        assert line["code"] == "RESOURCE_EXHAUSTED"
        assert words in line["error"]
        await running.until(lambda: running.server.engine.num_running == 0)
        assert_nothing_left(running)
        # Who reads on after all is told why it ends.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_the_end(call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert words in str(caught.value.details())


async def test_a_slow_reader_that_goes_on_reading_gets_everything(
    start_server: StartServer,
) -> None:
    backend = MockBackend()
    running = await start_server(
        backend=backend, max_unread_tokens=1_000_000, slow_reader_timeout_s=60.0
    )
    steps = 0
    decode = backend.decode

    def counted(batch: Any) -> Any:
        nonlocal steps
        steps += 1
        return decode(batch)

    backend.decode = counted  # type: ignore[method-assign]
    texts = [""] * 16
    num_messages = 0
    async with grpc.aio.insecure_channel(running.target, options=SMALL_WINDOW) as channel:
        stub: Any = pb_grpc.TextGenerationStub(channel)
        call = stub.GenerateStream(long_stream_request(300))
        await running.until(lambda: steps >= 299)
        await running.until(lambda: running.server.engine.num_running == 0)  # it is done long ago
        summary = None
        async for message in call:
            if message.HasField("summary"):
                summary = message.summary
                continue
            num_messages += 1
            texts[message.chunk.index] += message.chunk.text
    expected = "".join(chr(ord("a") + (1 + i) % 26) for i in range(300))
    assert texts == [expected] * 16
    assert summary.usage.completion_tokens == 16 * 300
    assert num_messages < 16 * 300 / 2  # what waited came together


# --- calls and connections ---


async def test_one_call_too_many_is_refused_by_name_and_probes_are_answered(
    start_server: StartServer,
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=25), max_concurrent_rpcs=2)
    streams = [running.client.generate_stream("a", max_new_tokens=400) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(QueueFullError, match=r"2 calls are being served \(max_concurrent_rpcs\)"):
        await running.client.get_model()
    async with grpc.aio.insecure_channel(running.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    streams[0].cancel()
    await running.until(lambda: running.server._rpcs._active == 1)
    await running.client.get_model()


async def test_calls_of_other_services_are_bounded_by_twice_the_setting(
    start_server: StartServer,
) -> None:
    running = await start_server(max_concurrent_rpcs=2)
    async with grpc.aio.insecure_channel(running.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        held: list[Any] = []

        async def hold() -> None:
            held.append(stub.Watch(health_pb2.HealthCheckRequest()))
            assert (await held[-1].read()).status == health_pb2.HealthCheckResponse.SERVING

        async def code() -> grpc.StatusCode:
            try:
                await stub.Check(health_pb2.HealthCheckRequest())
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        async def until(wanted: grpc.StatusCode) -> None:
            async with asyncio.timeout(20):
                while await code() is not wanted:
                    await asyncio.sleep(0.02)

        for _ in range(3):
            await hold()
        assert await code() is grpc.StatusCode.OK
        await hold()
        await until(grpc.StatusCode.RESOURCE_EXHAUSTED)
        held[0].cancel()
        await until(grpc.StatusCode.OK)
        for call in held:
            call.cancel()
    await running.client.get_model()


async def test_calls_beyond_a_connections_streams_wait_and_are_served(
    start_server: StartServer,
) -> None:
    backend = MockBackend(decode_ms=2)
    running = await start_server(backend=backend, max_concurrent_streams=4)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, running.server._rpcs._active)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    # gRPC refuses (REFUSED_STREAM) a call that comes just as another ends, so the caller retries.
    client = running.new_client(retry=RetryPolicy(max_attempts=5))
    await client.get_model()  # the limit is known to a caller once the connection is there
    calls = (client.generate("a", max_new_tokens=20) for _ in range(30))
    assert {answer.text for answer in await asyncio.gather(*calls)} == {"bcdefghijklmnopqrstu"}
    watching.cancel()
    assert 1 < most <= 4


async def test_one_connection_too_many_is_closed_and_the_others_are_served(
    start_server: StartServer,
) -> None:
    running = await start_server(max_connections=2)
    await running.client.get_model()
    second, third = running.new_client(), running.new_client(retry=None)
    await second.get_model()
    with pytest.raises(UnavailableError):
        await third.get_model(timeout_s=10)
    await second.close()

    async def is_let_in() -> bool:
        try:
            await third.get_model(timeout_s=5)
        except UnavailableError:
            return False
        return True

    async with asyncio.timeout(20):
        while not await is_let_in():
            await asyncio.sleep(0.05)
    await running.client.get_model()


async def test_a_half_open_connection_is_closed(start_server: StartServer) -> None:
    running = await start_server(handshake_timeout_s=0.5)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
    async with asyncio.timeout(20):
        while await reader.read(4096):  # the server's own settings come first
            pass
    writer.close()
    # On a busy machine, a handshake may itself take as long; the next one is tried then.
    await running.new_client().get_model()


async def test_an_idle_connection_is_closed_and_its_caller_comes_back(
    start_server: StartServer,
) -> None:
    running = await start_server(max_connection_idle_s=0.5)
    async with grpc.aio.insecure_channel(running.target) as channel:
        stub: Any = pb_grpc.TextGenerationStub(channel)
        await stub.GetModel(pb.GetModelRequest())
        async with asyncio.timeout(20):
            while (state := channel.get_state()) is grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(state)
        assert state is grpc.ChannelConnectivity.IDLE
        await stub.GetModel(pb.GetModelRequest())


async def test_an_old_connection_is_replaced_without_a_failed_call(
    start_server: StartServer,
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=1), max_connection_age_s=1.0)
    stream = running.client.generate_stream("a", max_new_tokens=400)  # older than the connection

    def peers() -> set[str]:
        return {line["peer"] for line in running.logs if line["event"] == "request"}

    async with asyncio.timeout(60):
        while len(peers()) < 3:
            await running.client.generate("a", max_new_tokens=5)
    assert len([chunk async for chunk in stream]) > 0
    assert stream.summary is not None


async def test_a_caller_that_pings_too_often_is_disconnected(start_server: StartServer) -> None:
    """The server's keepalive policy; gRPC's own client pings no faster than once in 10 s."""
    running = await start_server(min_ping_interval_s=60.0)
    with socket.create_connection(("127.0.0.1", running.server.port), timeout=20) as raw:
        await asyncio.to_thread(ping_until_closed, raw)
    await running.client.get_model()


def ping_until_closed(raw: socket.socket) -> None:
    raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
    received = b""
    ping = b"\0\0\x08\x06\0\0\0\0\0" + b"12345678"
    for _ in range(50):
        with contextlib.suppress(OSError):  # closed: why can still be read
            raw.sendall(ping)
        try:
            more = raw.recv(65536)
        except OSError:
            break
        received += more
        if not more or b"too_many_pings" in received:
            break
        time.sleep(0.02)
    assert b"too_many_pings" in received


async def test_an_rpc_whose_watching_fails_is_told_so_and_leaves_its_place(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_server(max_concurrent_rpcs=1, metrics_port=0)

    def broken(*_: Any) -> Any:
        raise KeyError("a bug where none can be")

    with monkeypatch.context() as patch:
        patch.setattr(watch, "_trace_id", broken)
        for _ in range(3):
            with pytest.raises(InternalError, match="error id"):
                await running.client.generate("a")
    assert (await running.client.generate("a", max_new_tokens=2)).text == "bc"
    async with asyncio.timeout(20):
        await running.server._rpcs.idle.wait()
    metrics = running.server.observability.metrics
    assert metrics.registry.get_sample_value("gptjet_rpcs_active") == 0
