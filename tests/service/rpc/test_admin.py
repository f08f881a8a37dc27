"""gptjet.v1.Admin: who gets in, and what a server does when it is told."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from gptjet.proto.v1 import admin_pb2 as pb
from gptjet.proto.v1 import admin_pb2_grpc as pb_grpc
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import Client, HealthStatus, QuotaExceededError, UnavailableError
from gptjet.service.client_admin import AdminClient
from gptjet.service.config import ConfigError, ServerConfig, load_config
from gptjet.service.rpc.access.tokens import new_token
from gptjet.service.rpc.access.tokens_file import editing
from gptjet.service.rpc.listen import ListenError
from gptjet.service.rpc.server import Server

PATIENCE_S = 60.0


def add_token(path: Path, name: str, **fields: Any) -> str:
    text, kept = new_token(name, **fields)
    with editing(path, create=True) as tokens:
        tokens.append(kept)
    return text


@pytest.fixture
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its address must be short."""
    return tmp_path_factory.mktemp("s") / "admin.sock"


class Admin:
    """A stub on a server's administration socket."""

    def __init__(self, target: str, token: str | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self.stub: Any = pb_grpc.AdminStub(self._channel)
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)

    async def __call__(self, method: str, request: Any) -> Any:
        return await getattr(self.stub, method)(request, metadata=self.metadata, timeout=20)

    async def __aenter__(self) -> Admin:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()


async def test_administration_is_off_unless_asked_for(start_server: Any) -> None:
    running = await start_server()
    channel = grpc.aio.insecure_channel(running.target)
    with pytest.raises(grpc.RpcError) as caught:
        await pb_grpc.AdminStub(channel).GetStatus(pb.GetStatusRequest(), timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    await channel.close()


async def test_the_socket_is_its_owners_alone_and_goes_with_the_server(
    start_server: Any, socket_path: Path
) -> None:
    before = os.umask(0)
    try:
        running = await start_server(admin_socket=socket_path)
    finally:
        os.umask(before)
    mode = socket_path.lstat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert [path.name for path in socket_path.parent.iterdir()] == ["admin.sock"]
    async with Admin(f"unix:{socket_path}") as admin:
        status = await admin("GetStatus", pb.GetStatusRequest())
    assert status.state == pb.SERVER_STATE_SERVING
    await running.server.drain(0.0)
    assert list(socket_path.parent.iterdir()) == []


async def test_a_later_server_takes_the_socket_over_and_keeps_it(
    start_server: Any, socket_path: Path
) -> None:
    first = await start_server(admin_socket=socket_path, model="first")
    await start_server(admin_socket=socket_path, model="second")
    for _ in range(2):
        async with Admin(f"unix:{socket_path}") as admin:
            assert (await admin("GetStatus", pb.GetStatusRequest())).model == "second"
        await first.server.drain(0.0)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("none/admin.sock", "No such file"),
        ("a_file", "is there, and is no socket"),
        ("x" * 90, "must be at most 90 bytes"),
    ],
)
async def test_a_socket_that_cannot_be_is_one_clear_line(
    socket_path: Path, path: str, reason: str
) -> None:
    (socket_path.parent / "a_file").write_text("keep me")
    server = Server(ServerConfig(port=0, admin_socket=socket_path.parent / path))
    with pytest.raises(ListenError, match=reason) as caught:
        await server.start()
    assert "--admin-socket" in str(caught.value)
    await server.drain(0.0)
    assert (socket_path.parent / "a_file").read_text() == "keep me"


async def test_a_taken_admin_port_names_the_flag_that_changes_it(
    start_server: Any, tmp_path: Path
) -> None:
    add_token(tmp_path / "t", "op", scopes=["admin"])
    running = await start_server()
    config = ServerConfig(port=0, tokens_file=tmp_path / "t", admin_port=running.server.port)
    server = Server(config)
    with pytest.raises(ListenError, match="is in use; choose another with --admin-port"):
        await server.start()
    await server.drain(0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"admin_port": 1}, "admin_port: tokens_file must be given, too"),
        (
            {"token_requests_per_minute": 1, "token_concurrent_streams": 2},
            "token_requests_per_minute and token_concurrent_streams: tokens_file must be given",
        ),
        (
            {"admin_port": 1, "tokens_file": "t", "admin_host": "0.0.0.0"},
            "admin_host must be 127.0.0.1, ::1 or localhost without tls_cert, got '0.0.0.0'",
        ),
    ],
)
def test_settings_that_would_leave_a_door_open_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(**settings)
    assert message in str(caught.value)


async def test_the_port_is_behind_tls_where_the_server_is(
    start_server: Any, make_certificate: Any, tmp_path: Path
) -> None:
    ours = make_certificate("gptjet.test")
    token = add_token(tmp_path / "t", "op", scopes=["admin"])
    running = await start_server(
        tls_cert=ours.cert, tls_key=ours.key, tokens_file=tmp_path / "t", admin_port=0
    )
    target = f"127.0.0.1:{running.server.admin_port}"
    async with Admin(target, token) as plain:
        with pytest.raises(grpc.RpcError) as caught:
            await plain("GetStatus", pb.GetStatusRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    credentials = grpc.ssl_channel_credentials(ours.cert.read_bytes())
    options = [("grpc.ssl_target_name_override", "gptjet.test")]
    async with grpc.aio.secure_channel(target, credentials, options) as channel:
        status = await pb_grpc.AdminStub(channel).GetStatus(
            pb.GetStatusRequest(), metadata=(("authorization", f"Bearer {token}"),), timeout=20
        )
    assert list(status.certificate.names) == ["gptjet.test"]
    assert status.certificate.not_after.ToDatetime(UTC) > datetime.now(UTC)
    assert not status.certificate.client_certificates_required


async def test_status_says_what_runs_and_who_uses_it(
    start_server: Any, socket_path: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "t"
    expires = datetime(2199, 1, 1, tzinfo=UTC)
    web = add_token(tokens, "web", concurrent_streams=3, tokens_per_minute=1000, expires=expires)
    add_token(tokens, "old", expires=datetime.now(UTC) - timedelta(days=1))
    running = await start_server(
        tokens_file=tokens,
        admin_socket=socket_path,
        attach=False,
        token_requests_per_minute=7,
        access_reload_s=3600.0,
    )
    async with Admin(f"unix:{socket_path}") as admin:
        status = await admin("GetStatus", pb.GetStatusRequest())
        assert (status.state, status.backend) == (pb.SERVER_STATE_LOADING, "")
        from gptjet.service.engine.tokenizer import ByteTokenizer

        await running.server.attach(MockBackend(decode_ms=5), ByteTokenizer())
        client = running.new_client(token=web, retry=None)
        stream = client.generate_stream("abc", max_new_tokens=400)
        await anext(stream)
        status = await admin("GetStatus", pb.GetStatusRequest())
        assert (status.state, status.backend, status.model) == (
            pb.SERVER_STATE_SERVING,
            "mock",
            "toy",
        )
        assert (status.running, status.waiting) == (1, 0)
        assert status.address == running.target
        assert status.uptime_s > 0
        assert not status.HasField("certificate")
        first, second = status.tokens
        assert (first.name, first.usable, list(first.scopes)) == ("web", True, ["generate"])
        assert first.expires.ToDatetime(UTC) == expires
        assert (first.concurrent_streams, first.max_concurrent_streams) == (1, 3)
        assert (first.requests_per_minute, first.requests_left) == (7, 6)
        assert first.tokens_per_minute == 1000
        assert 597 <= first.tokens_left < 700
        assert (second.name, second.usable) == ("old", False)
        assert not second.HasField("max_concurrent_streams")
        assert "sha256" not in str(status)
        stream.cancel()
        tokens.write_text("broken")
        (files,) = (await admin("Reload", pb.ReloadRequest())).files
        assert (files.kind, files.outcome) == ("tokens", pb.ReloadedFiles.OUTCOME_REFUSED)
        assert "not valid TOML" in files.reason
        status = await admin("GetStatus", pb.GetStatusRequest())
        assert status.tokens_refused == files.reason
        assert len(status.tokens) == 2


async def test_administration_is_not_under_the_quotas_of_callers(
    start_server: Any, tmp_path: Path
) -> None:
    """Else a limit for every token locks out whoever would raise it."""
    token = add_token(tmp_path / "t", "op", scopes=["generate", "admin"], requests_per_minute=1)
    running = await start_server(
        tokens_file=tmp_path / "t", admin_port=0, token_concurrent_streams=1
    )
    client = running.new_client(token=token, retry=None)
    stream = client.generate_stream("abc", max_new_tokens=400)
    await anext(stream)
    async with Admin(f"127.0.0.1:{running.server.admin_port}", token) as admin:
        for _ in range(3):
            (status,) = (await admin("GetStatus", pb.GetStatusRequest())).tokens
            assert (status.requests_left, status.concurrent_streams) == (0, 1)
    with pytest.raises(QuotaExceededError):
        await client.get_model()
    stream.cancel()


@pytest.fixture
def own_level() -> Iterator[None]:
    ours, root = logging.getLogger("gptjet"), logging.getLogger()
    before = (ours.level, root.level)
    yield
    ours.level, root.level = before


@pytest.mark.usefixtures("own_level")
async def test_the_log_level_changes_while_serving(start_server: Any, socket_path: Path) -> None:
    await start_server(admin_socket=socket_path)
    logging.getLogger("gptjet").setLevel(logging.INFO)
    async with Admin(f"unix:{socket_path}") as admin:

        async def level() -> int:
            return (await admin("GetLogLevel", pb.GetLogLevelRequest())).level

        assert await level() == pb.LOG_LEVEL_INFO
        for number, name in ((1, "debug"), (3, "warning"), (4, "error"), (2, "info")):
            before = await level()
            response = await admin("SetLogLevel", pb.SetLogLevelRequest(level=number))
            assert response.previous == before
            assert await level() == number
            assert logging.getLogger("gptjet.any").isEnabledFor(getattr(logging, name.upper())), (
                name
            )
        assert not logging.getLogger("gptjet.any").isEnabledFor(logging.DEBUG)
        # The libraries' chatter stays out, whatever ours is.
        assert logging.getLogger().level == logging.WARNING
        for wrong in (0, 9):
            with pytest.raises(grpc.RpcError, match="level: must be one of LOG_LEVEL_DEBUG"):
                await admin("SetLogLevel", pb.SetLogLevelRequest(level=wrong))
        assert await level() == pb.LOG_LEVEL_INFO


@pytest.mark.parametrize("grace_s", [-1.0, 3600.5, float("nan"), float("inf")])
async def test_a_grace_period_out_of_bounds_is_refused_and_nothing_drains(
    start_server: Any, socket_path: Path, grace_s: float
) -> None:
    running = await start_server(admin_socket=socket_path)
    async with Admin(f"unix:{socket_path}") as admin:
        with pytest.raises(grpc.RpcError, match="grace_s: must be 0 to 3600, got"):
            await admin("Drain", pb.DrainRequest(grace_s=grace_s))
    assert not running.server.stop_asked.is_set()


SCRIPT = """
import sys, time
from pathlib import Path
from gptjet.service.backends.factory import LoadedModel
from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.tokenizer import ByteTokenizer
from gptjet.service.config import load_config
from gptjet.service.rpc.process import run

class HeldBackend(MockBackend):
    # No decode step ends while the file is there.
    def decode(self, batch):
        while Path(sys.argv[3]).exists():
            time.sleep(0.01)
        return super().decode(batch)

config = load_config(port=0, port_file=Path(sys.argv[1]), admin_socket=Path(sys.argv[2]))
sys.exit(run(config, loader=lambda _: LoadedModel(HeldBackend(decode_ms=10), ByteTokenizer())))
"""


@pytest.fixture
def process(tmp_path: Path, socket_path: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPTJET_")}
    hold = tmp_path / "hold"
    hold.touch()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "port"), str(socket_path), str(hold)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as started:
        yield started
        started.kill()


def connect(process: subprocess.Popen[str], port_file: Path) -> Client:
    end = time.monotonic() + PATIENCE_S
    while not port_file.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    client = Client(f"127.0.0.1:{port_file.read_text().strip()}", retry=None, timeout_s=PATIENCE_S)
    client.wait_until_serving(PATIENCE_S)
    return client


def test_drain_ends_the_process_when_its_streams_have_ended(
    process: subprocess.Popen[str], tmp_path: Path, socket_path: Path
) -> None:
    """And the SIGTERM that a supervisor sends after it is the first signal, not the second."""
    with connect(process, tmp_path / "port") as client, AdminClient(f"unix:{socket_path}") as admin:
        stream = client.generate_stream("a", max_new_tokens=50)
        next(stream)
        drain = admin.drain()
        assert (drain.running, drain.waiting, drain.grace_s) == (1, 0, 30.0)
        while client.health() is not HealthStatus.NOT_SERVING:
            time.sleep(0.01)
        assert admin.status().state == "draining"
        assert admin.drain(0.0).grace_s == 30.0, "asking again changes nothing"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(UnavailableError, match="draining"):
            client.generate("a")
        (tmp_path / "hold").unlink()
        assert len(list(stream)) == 49
    assert process.wait(PATIENCE_S) == 0
    assert process.stderr is not None
    log = process.stderr.read()
    assert "all_finished=True" in log
    assert "Traceback" not in log
    assert not socket_path.exists()


def test_drain_without_grace_cuts_streams_off(
    process: subprocess.Popen[str], tmp_path: Path, socket_path: Path
) -> None:
    with connect(process, tmp_path / "port") as client, AdminClient(f"unix:{socket_path}") as admin:
        stream = client.generate_stream("a", max_new_tokens=500)
        next(stream)
        assert admin.drain(0.0).grace_s == 0.0
        (tmp_path / "hold").unlink()
        with pytest.raises(UnavailableError):
            list(stream)
    assert process.wait(PATIENCE_S) == 0
