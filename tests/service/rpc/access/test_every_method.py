"""With tokens on, nothing answers without a good one: every method of every service, or none."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from gptjet.proto.v1 import admin_pb2, text_generation_pb2
from gptjet.service.rpc.access.tokens_file import editing

MakeToken = Callable[..., str]

FILES: tuple[FileDescriptor, ...] = (
    text_generation_pb2.DESCRIPTOR,
    admin_pb2.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    reflection_pb2.DESCRIPTOR,
)
IN_THE_CONTRACTS = [
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
]
SERVED_BY_NOBODY = [
    "/gptjet.v1.TextGeneration/Unknown",
    "/gptjet.v1.TextGeneration/",
    "/gptjet.v1.textgeneration/Generate",
    "/gptjet.v1.TextGeneration/Generate/",
    "//gptjet.v1.TextGeneration/Generate",
    "/grpc.health.v1.Health/Unknown",
    "/grpc.health.v1.Health/../gptjet.v1.TextGeneration/Generate",
    "/grpc.health.v1.HealthX/Check",
    "/no.such.Service/Method",
    "/Method",
    "/",
    "//",
    "/" + "x" * 300,
]
HEALTH = "/grpc.health.v1.Health/"
MAIN, ADMIN = "main", "admin"


class Servers:
    """The ports of one server, and calls of any method with any credentials."""

    def __init__(self, running: Any) -> None:
        self.running = running
        self.channels = {
            MAIN: grpc.aio.insecure_channel(f"127.0.0.1:{running.server.port}"),
            ADMIN: grpc.aio.insecure_channel(f"127.0.0.1:{running.server.admin_port}"),
        }

    async def call(
        self,
        port: str,
        method: str,
        metadata: tuple[tuple[str, str], ...],
        request: bytes | None = None,
    ) -> grpc.StatusCode:
        """How a call ends. `request` None: the caller sends nothing, nor says that it will not."""
        channel = self.channels[port]
        if request is None:
            return await channel.stream_stream(method)(metadata=metadata, timeout=20).code()
        call: Any = channel.unary_stream(method)(request, metadata=metadata, timeout=20)
        answer = grpc.aio.EOF
        with contextlib.suppress(grpc.RpcError):
            answer = await call.read()
        if answer is grpc.aio.EOF:
            return await call.code()
        call.cancel()  # a health watch, let in, would go on for ever
        return grpc.StatusCode.OK


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every method of the handlers that servers are given from here on."""
    methods: list[str] = []
    add = grpc.aio._server.Server.add_generic_rpc_handlers

    def note(server: Any, handlers: Any) -> None:
        for handler in handlers:
            methods.extend(handler._method_handlers)
        add(server, handlers)

    monkeypatch.setattr(grpc.aio._server.Server, "add_generic_rpc_handlers", note)
    return methods


@pytest.fixture
async def servers(
    registered: list[str], start_server: Any, tokens_file: Path, make_token: MakeToken
) -> AsyncIterator[Callable[..., Any]]:
    """`await servers(**settings)`"""
    make_token("somebody")
    started: list[Servers] = []

    async def start(**settings: Any) -> Servers:
        running = await start_server(tokens_file=tokens_file, admin_port=0, **settings)
        started.append(Servers(running))
        return started[-1]

    yield start
    for server in started:
        for channel in server.channels.values():
            await channel.close()


@pytest.fixture
def bad_credentials(
    make_token: MakeToken, tokens_file: Path
) -> dict[str, tuple[tuple[str, str], ...]]:
    good = make_token("good")
    revoked = make_token("revoked")
    expired = make_token("expired", expires=datetime.now(UTC) - timedelta(seconds=1))
    with editing(tokens_file) as tokens:
        index = next(i for i, token in enumerate(tokens) if token.name == "revoked")
        tokens[index] = tokens[index].model_copy(update={"revoked": datetime.now(UTC)})
    wrong = good[:-1] + ("0" if good[-1] != "0" else "1")
    return {
        "none": (),
        "empty": (("authorization", ""),),
        "wrong": bearer(wrong),
        "revoked": bearer(revoked),
        "expired": bearer(expired),
        "basic": (("authorization", f"Basic {good}"),),
        "twice": bearer(good) * 2,
        "good and wrong": (*bearer(good), *bearer(wrong)),
        "another key": (("x-authorization", f"Bearer {good}"),),
        "in the path's place": (("token", good), ("bearer", good)),
        "seven thousand characters": bearer("a" * 7_000),
    }


async def test_every_method_is_refused_without_good_credentials(
    servers: Any, registered: list[str], bad_credentials: dict[str, tuple[tuple[str, str], ...]]
) -> None:
    server = await servers()
    # What is served is what the contracts say, so that no service is forgotten here.
    assert set(registered) == set(IN_THE_CONTRACTS)
    methods = [*IN_THE_CONTRACTS, *SERVED_BY_NOBODY]
    let_in = []
    for port in (MAIN, ADMIN):
        for method in methods:
            for name, metadata in bad_credentials.items():
                for request in (b"", b"\xff", None):
                    code = await server.call(port, method, metadata, request)
                    if code is not grpc.StatusCode.UNAUTHENTICATED:
                        let_in.append((port, method, name, request, code))
    assert let_in == []
    assert server.running.backend.cached == {}


async def test_a_good_token_gets_to_every_method_that_it_has_the_right_to(
    servers: Any, make_token: MakeToken
) -> None:
    tokens = {
        scope: bearer(make_token(f"has-{scope}", scopes=[scope])) for scope in ("generate", "admin")
    }
    both = bearer(make_token("both", scopes=["generate", "admin"]))
    server = await servers()
    needed = {"/gptjet.v1.TextGeneration/": "generate", "/gptjet.v1.Admin/": "admin"}
    for port, own in ((MAIN, "generate"), (ADMIN, "admin")):
        for method in [*IN_THE_CONTRACTS, *SERVED_BY_NOBODY]:
            scope = next((s for prefix, s in needed.items() if method.startswith(prefix)), None)
            served = scope == own or (port == MAIN and scope is None)
            for name, metadata in (*tokens.items(), ("both", both)):
                if method.endswith("/Drain") and name != "generate" and port == ADMIN:
                    continue  # it would do as it is told
                code = await server.call(port, method, metadata, b"")
                where = (port, method, name, code)
                if method in SERVED_BY_NOBODY:
                    denied, unknown = (
                        grpc.StatusCode.PERMISSION_DENIED,
                        grpc.StatusCode.UNIMPLEMENTED,
                    )
                    assert code in (unknown, denied), where
                elif scope == own and name not in (scope, "both"):
                    assert code is grpc.StatusCode.PERMISSION_DENIED, where
                elif not served:
                    assert code is grpc.StatusCode.UNIMPLEMENTED, where
                else:
                    assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), where


async def test_health_can_be_left_open_and_nothing_else_with_it(
    servers: Any, bad_credentials: dict[str, tuple[tuple[str, str], ...]]
) -> None:
    server = await servers(open_health=True)
    for metadata in bad_credentials.values():
        for method in [*IN_THE_CONTRACTS, *SERVED_BY_NOBODY]:
            code = await server.call(MAIN, method, metadata, b"")
            if method in IN_THE_CONTRACTS and method.startswith(HEALTH):
                assert code is grpc.StatusCode.OK, method
            elif method == f"{HEALTH}Unknown":
                assert code is grpc.StatusCode.UNIMPLEMENTED
            else:
                assert code is grpc.StatusCode.UNAUTHENTICATED, method
            code = await server.call(ADMIN, method, metadata, b"")
            assert code is grpc.StatusCode.UNAUTHENTICATED, method


async def test_without_a_tokens_file_nothing_is_asked_for(start_server: Any) -> None:
    running = await start_server()
    assert running.server.admin_port == 0
    assert (await running.client.generate("abc", max_new_tokens=2)).text == "de"


async def test_metadata_beyond_what_grpc_takes_is_refused_and_the_server_goes_on(
    servers: Any, make_token: MakeToken
) -> None:
    token = make_token("web")
    server = await servers()
    method = "/gptjet.v1.TextGeneration/GetModel"
    for length in (20_000, 1_000_000):
        code = await server.call(MAIN, method, bearer("a" * length), b"")
        assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE), length
    assert await server.call(MAIN, method, bearer(token), b"") is grpc.StatusCode.OK


async def test_refusals_are_logged_without_the_token_and_not_without_bound(
    servers: Any, make_token: MakeToken
) -> None:
    token = make_token("good")
    wrong = token[:-2] + "zz"
    server = await servers()
    for _ in range(100):
        await server.call(MAIN, "/gptjet.v1.TextGeneration/Generate", bearer(wrong), b"")
    await server.call(MAIN, "/gptjet.v1.TextGeneration/GetModel", bearer(token), b"")
    await server.running.request_line(method="GetModel", caller="good")
    refused = [line for line in server.running.logs if line["event"] == "refused"]
    assert len(refused) == 60
    assert refused[0]["method"] == "gptjet.v1.TextGeneration/Generate"
    assert (refused[0]["code"], refused[0]["error"]) == (
        "UNAUTHENTICATED",
        "the token is not valid",
    )
    secret = token.rpartition("_")[2]
    assert secret[:16] not in str(server.running.logs)
