"""grpc.health.v1 and reflection, through grpcio's own clients."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

StartServer = Callable[..., Awaitable[Any]]
SERVICE = "gptjet.v1.TextGeneration"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_check_follows_the_servers_life(start_server: StartServer, service: str) -> None:
    running = await start_server(attach=False)
    async with grpc.aio.insecure_channel(running.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        assert (await stub.Check(request)).status == NOT_SERVING
        from gptjet.service.engine.tokenizer import ByteTokenizer

        await running.server.attach(running.backend, ByteTokenizer())
        assert (await stub.Check(request)).status == SERVING


async def test_watch_tells_of_every_change(start_server: StartServer) -> None:
    from gptjet.service.engine.tokenizer import ByteTokenizer

    running = await start_server(attach=False)
    async with grpc.aio.insecure_channel(running.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert (await watch.read()).status == NOT_SERVING
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        await running.server.attach(running.backend, ByteTokenizer())
        assert (await watch.read()).status == SERVING
        draining = asyncio.create_task(running.server.drain(0.0))
        assert (await watch.read()).status == NOT_SERVING
        await draining


async def test_unknown_service_is_not_found(start_server: StartServer) -> None:
    running = await start_server()
    async with grpc.aio.insecure_channel(running.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    listed = await list_health(running.target)
    assert listed == {"": SERVING, SERVICE: SERVING}


async def list_health(target: str) -> dict[str, int]:
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthListRequest()  # type: ignore[attr-defined]
        answer = await stub.List(request)
    return {name: response.status for name, response in answer.statuses.items()}


async def test_reflection_describes_the_service(start_server: StartServer) -> None:
    running = await start_server()

    def describe() -> tuple[list[str], list[str]]:
        with grpc.insecure_channel(running.target) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            service = DescriptorPool(database).FindServiceByName(SERVICE)
            return list(database.get_services()), [method.name for method in service.methods]

    services, methods = await asyncio.to_thread(describe)
    assert {SERVICE, "grpc.health.v1.Health"} <= set(services)
    expected = ["Generate", "GenerateStream", "Score", "Tokenize", "Detokenize", "GetModel"]
    assert methods == expected


async def test_reflection_can_be_turned_off(start_server: StartServer) -> None:
    running = await start_server(reflection=False)

    def services() -> Any:
        with grpc.insecure_channel(running.target) as channel:
            return ProtoReflectionDescriptorDatabase(channel).get_services()

    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(services)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
