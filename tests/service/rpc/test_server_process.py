"""`serve` as a process sees it: exit codes, signals, and one clear line where it cannot be."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from gptjet.service.client import Client, HealthStatus, TlsOptions, UnavailableError
from gptjet.service.config import ServerConfig
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.rpc.process import serve
from gptjet.service.rpc.server import Server

PATIENCE_S = 60.0

SCRIPT = """
import atexit, sys, time
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

def held_steps(config):
    return LoadedModel(HeldBackend(), ByteTokenizer())

def does_not_close(config):
    from gptjet.service.rpc.server import Server

    async def does_not_close(server):
        raise KeyError("a bug in an end")

    Server._close_governance = does_not_close
    return slow_steps(config)

def never_ends(config):
    while True:
        time.sleep(1)

atexit.register(print, "interpreter shut down", file=sys.stderr)
sys.exit(run(load_config(port=0, port_file=Path(sys.argv[1])), loader=globals()[sys.argv[2]]))
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, folder: Path, loader: str) -> None:
        self.port_file, self.hold = folder / "port", folder / "hold"
        self.hold.touch()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GPTJET_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(self.port_file), loader, str(self.hold)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )

    def connect(self) -> Client:
        end = time.monotonic() + PATIENCE_S
        while not self.port_file.exists():
            assert self.process.poll() is None, self.stderr()
            assert time.monotonic() < end, "no port file"
            time.sleep(0.05)
        port = int(self.port_file.read_text(encoding="ascii"))
        return Client(f"127.0.0.1:{port}", retry=None, timeout_s=PATIENCE_S)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def stderr(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[Callable[[str], Process]]:
    started: list[Process] = []

    def start(loader: str) -> Process:
        started.append(Process(tmp_path, loader))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()
        assert server.process.stderr is not None
        server.process.stderr.close()


def test_sigterm_drains_and_exits_0(start_process: Callable[[str], Process]) -> None:
    server = start_process("held_steps")
    with server.connect() as client:
        client.wait_until_serving(PATIENCE_S)
        stream = client.generate_stream("a", max_new_tokens=300)
        next(stream)
        server.signal(signal.SIGTERM)
        while client.health() is not HealthStatus.NOT_SERVING:
            time.sleep(0.01)
        with pytest.raises(UnavailableError, match="draining"):
            client.generate("a")
        server.hold.unlink()
        assert len(list(stream)) == 299
        assert stream.summary is not None
        assert server.wait() == 0
    log = server.stderr()
    assert "all_finished=True" in log
    assert "interpreter shut down" in log
    assert "Traceback" not in log
    assert not server.port_file.exists()


def test_a_bug_while_draining_is_logged_and_exit_code_1(
    start_process: Callable[[str], Process],
) -> None:
    server = start_process("does_not_close")
    with server.connect() as client:
        client.wait_until_serving(PATIENCE_S)
    server.signal(signal.SIGTERM)
    assert server.wait() == 1
    log = server.stderr()
    (line,) = errors_in(log)
    assert "draining failed" in line
    assert "KeyError: 'a bug in an end'" in line
    assert log.index("draining failed") < log.index("does_not_close") < log.index("exit_code=1")
    assert log.count("Traceback") == 1  # the log's, and none of the interpreter's
    assert not server.port_file.exists()


@pytest.mark.usefixtures("own_logging")
async def test_a_bug_in_the_end_of_a_failed_start_does_not_hide_why_it_failed(
    capfd: pytest.CaptureFixture[str], start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await start_server()

    async def broken(_server: Server, _grace_s: float | None = None) -> bool:
        raise KeyError("a bug in an end")

    structlog.reset_defaults()  # start_server captures what `serve` has to print
    with monkeypatch.context() as patch:
        patch.setattr(Server, "drain", broken)
        assert await serve(ServerConfig(port=first.server.port), loader=raise_bug) == 2
    bug, reason = errors_in(capfd.readouterr().err)
    assert "KeyError: 'a bug in an end'" in bug
    assert f"port {first.server.port} on 127.0.0.1 is in use" in reason


def test_second_signal_exits_at_once(start_process: Callable[[str], Process]) -> None:
    server = start_process("held_steps")
    with server.connect() as client:
        client.wait_until_serving(PATIENCE_S)
        stream = client.generate_stream("a", max_new_tokens=500)
        next(stream)
        server.signal(signal.SIGTERM)
        while client.health() is not HealthStatus.NOT_SERVING:
            time.sleep(0.01)
        server.signal(signal.SIGINT)
        assert server.wait() == 128 + signal.SIGINT


def test_sigterm_while_loading_exits_0(start_process: Callable[[str], Process]) -> None:
    server = start_process("never_ends")
    with server.connect() as client:
        assert client.health() is HealthStatus.NOT_SERVING
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    log = server.stderr()
    assert "Traceback" not in log
    # Under a thread that is still inside torch, that can crash, and the exit code be another.
    assert "interpreter shut down" not in log


@pytest.fixture
def own_logging() -> Iterator[None]:
    """`serve` configures logging for its process; put it back."""
    root, ours = logging.getLogger(), logging.getLogger("gptjet")
    before = (root.handlers, root.level, ours.level)
    yield
    structlog.reset_defaults()
    root.handlers, root.level, ours.level = before


def raise_load_error(config: ServerConfig) -> Any:
    raise BackendLoadError(f"{config.model}: model.safetensors is truncated:\n 3 of 9 bytes")


def raise_bug(config: ServerConfig) -> Any:
    raise ZeroDivisionError("a bug in the loader")


def errors_in(log: str) -> list[str]:
    return [line for line in log.splitlines() if "[error" in line]


HANGUP_SCRIPT = """
import asyncio, os, signal, sys
from pathlib import Path
from gptjet.service.config import load_config
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.rpc.process import run
from gptjet.service.rpc.server import Server

start = Server.start

async def start_with_hangups(server):
    os.kill(os.getpid(), signal.SIGHUP)
    await asyncio.sleep(0.1)
    await start(server)
    os.kill(os.getpid(), signal.SIGHUP)
    await asyncio.sleep(0.1)

def fails(config):
    raise BackendLoadError("no such model")

Server.start = start_with_hangups
cert, key = map(Path, sys.argv[1:])
sys.exit(run(load_config(port=0, tls_cert=cert, tls_key=key), loader=fails))
"""


def test_sighup_while_starting_reloads_what_is_there_and_ends_nothing(
    make_certificate: Any,
) -> None:
    certificate = make_certificate("localhost")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPTJET_")}
    done = subprocess.run(
        [sys.executable, "-c", HANGUP_SCRIPT, str(certificate.cert), str(certificate.key)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "no such model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("own_logging")
async def test_load_error_is_one_line_and_exit_code_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert await serve(ServerConfig(port=0, model="/m"), loader=raise_load_error) == 2
    log = capfd.readouterr().err
    (line,) = errors_in(log)
    assert "cannot serve: /m: model.safetensors is truncated: 3 of 9 bytes" in line
    assert "Traceback" not in log


@pytest.mark.usefixtures("own_logging")
async def test_bug_while_loading_is_exit_code_1_with_its_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert await serve(ServerConfig(port=0), loader=raise_bug) == 1
    log = capfd.readouterr().err
    assert "Traceback" in log
    assert "a bug in the loader" in log


@pytest.mark.usefixtures("own_logging")
async def test_port_in_use_is_one_line_and_exit_code_2(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, start_server: Any
) -> None:
    first = await start_server()
    port_file = tmp_path / "port"
    port_file.write_text("the first server's", encoding="ascii")
    config = ServerConfig(port=first.server.port, port_file=port_file)
    structlog.reset_defaults()  # start_server captures what `serve` has to print
    assert await serve(config, loader=raise_bug) == 2
    log = capfd.readouterr().err
    (line,) = errors_in(log)
    assert f"port {first.server.port} on 127.0.0.1 is in use" in line
    assert "Traceback" not in log
    assert port_file.read_text(encoding="ascii") == "the first server's"


@pytest.mark.usefixtures("own_logging")
async def test_port_that_only_grpc_could_share_is_in_use_too(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServerConfig(port=taken.getsockname()[1])
        assert await serve(config, loader=raise_bug) == 2
    (line,) = errors_in(capfd.readouterr().err)
    assert "is in use" in line


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid"),
        ({"host": "192.0.2.1"}, "cannot listen on 192.0.2.1"),
        ({"tls_cert": "{tmp}/none", "tls_key": "{tmp}/none"}, "No such file"),
        ({"tls_cert": "{tmp}/text", "tls_key": "{tmp}/text"}, "are not a certificate and its key"),
        ({"port_file": "{tmp}/none/port"}, "No such file"),
    ],
    ids=["name", "foreign_address", "no_certificate", "bad_certificate", "port_file"],
)
async def test_what_makes_listening_impossible_is_one_line_and_exit_code_2(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    (tmp_path / "text").write_text("no PEM", encoding="ascii")
    values: dict[str, Any] = {n: value.format(tmp=tmp_path) for n, value in settings.items()}
    assert await serve(ServerConfig(port=0, **values), loader=raise_bug) == 2
    (line,) = errors_in(capfd.readouterr().err)
    assert message in line


async def test_tls_and_client_certificates(start_server: Any, make_certificate: Any) -> None:
    ours, callers = make_certificate("gptjet.test"), make_certificate("caller")
    running = await start_server(
        tls_cert=ours.cert, tls_key=ours.key, tls_client_ca=callers.cert, host="127.0.0.1"
    )
    known = TlsOptions(
        root_ca=ours.cert,
        client_cert=callers.cert,
        client_key=callers.key.read_bytes(),
        server_name="gptjet.test",
    )
    good = running.new_client(tls=known, retry=None)
    assert (await good.generate("abc", max_new_tokens=2)).text == "de"
    for refused in (
        TlsOptions(root_ca=ours.cert, server_name="gptjet.test"),  # no certificate of its own
        TlsOptions(root_ca=callers.cert, server_name="gptjet.test"),  # does not trust ours
    ):
        client = running.new_client(tls=refused, retry=None)
        with pytest.raises(UnavailableError):
            await client.get_model(timeout_s=10)
    with pytest.raises(UnavailableError):
        await running.client.get_model(timeout_s=10)  # plain text
