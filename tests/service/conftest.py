"""A server of the mock backend on a loopback port, and what it logs."""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog

from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import AsyncClient
from gptjet.service.config import ServerConfig
from gptjet.service.engine.tokenizer import ByteTokenizer
from gptjet.service.rpc.server import Server

PATIENCE_S = 20.0


@dataclass
class Running:
    """A server in this event loop; `client` never retries."""

    server: Server
    backend: MockBackend
    client: AsyncClient
    logs: list[MutableMapping[str, Any]]
    extra_clients: list[AsyncClient] = field(default_factory=list)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def new_client(self, **options: Any) -> AsyncClient:
        client = AsyncClient(self.target, **options)
        self.extra_clients.append(client)
        return client

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that is certain to come; not a measure of how fast it comes."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.005)

    async def request_line(self, **fields: Any) -> MutableMapping[str, Any]:
        """The request line with these fields, waiting for it: it is written after the answer."""

        def found() -> list[MutableMapping[str, Any]]:
            return [
                line
                for line in self.logs
                if line["event"] == "request" and fields.items() <= line.items()
            ]

        await self.until(lambda: bool(found()))
        return found()[0]


StartServer = Callable[..., Awaitable[Running]]


@pytest.fixture
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """Every structlog event of the test, as dictionaries."""
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
async def start_server(logs: list[MutableMapping[str, Any]]) -> AsyncIterator[StartServer]:
    """`await start_server(backend=..., tokenizer=..., attach=True, **settings)`."""
    started: list[Running] = []

    async def start(
        *,
        backend: MockBackend | None = None,
        tokenizer: Any = None,
        attach: bool = True,
        **settings: Any,
    ) -> Running:
        defaults: dict[str, Any] = {"port": 0, "model": "toy", "backend": "mock"}
        server = Server(ServerConfig(**defaults | settings))
        await server.start()
        client = AsyncClient(f"127.0.0.1:{server.port}", retry=None, timeout_s=PATIENCE_S)
        running = Running(server, backend or MockBackend(), client, logs)
        started.append(running)
        if attach:
            await server.attach(running.backend, tokenizer or ByteTokenizer())
        return running

    yield start
    for running in started:
        for client in (running.client, *running.extra_clients):
            await client.close()
        await running.server.drain(0.0)


@pytest.fixture
def own_logging() -> Iterator[None]:
    """`serve` configures logging for its process; put it back."""
    root, ours = logging.getLogger(), logging.getLogger("gptjet")
    before = (root.handlers, root.level, ours.level)
    yield
    structlog.reset_defaults()
    root.handlers, root.level, ours.level = before


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate and its key."""

    cert: Path
    key: Path


@pytest.fixture(scope="session")
def make_certificate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Certificate]:
    """`make_certificate("localhost")`: a certificate for that name, valid for a day."""
    openssl = shutil.which("openssl")
    assert openssl, "the TLS tests need the openssl command"

    def make(name: str) -> Certificate:
        folder = tmp_path_factory.mktemp("tls")
        made = Certificate(folder / "cert.pem", folder / "key.pem")
        command = [openssl, "req", "-x509", "-nodes", "-days", "1", "-subj", f"/CN={name}"]
        command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        command += ["-addext", f"subjectAltName=DNS:{name}"]
        command += ["-keyout", str(made.key), "-out", str(made.cert)]
        subprocess.run(command, check=True, capture_output=True)
        return made

    return make
