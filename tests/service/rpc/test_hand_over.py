"""A new process takes the port over from an old one under load, and no call fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptjet.service.client import Client, UnavailableError

Serve = Callable[..., Any]
LOAD = Path(__file__).with_name("hand_over_load.py")
PATIENCE_S = 60.0


@pytest.fixture
def load_process() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts hand_over_load.py."""
    started: list[subprocess.Popen[str]] = []

    def start(target: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(LOAD), target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"GRPC_VERBOSITY": "NONE"},
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool], log: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, log()
        time.sleep(0.02)


def until_busy(server: Any) -> None:
    """Until calls of the load have been served by this one, too."""
    before = num_served(server)
    until(lambda: num_served(server) > before + 20, server.text)


def num_served(server: Any) -> int:
    return str(server.text()).count("code=OK")


def finish(load: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = load.communicate("\n", timeout=PATIENCE_S)
    result: dict[str, Any] = json.loads(output)
    return result


def test_two_hand_overs_under_load_fail_no_call(
    serve_process: Serve, load_process: Callable[[str], subprocess.Popen[str]]
) -> None:
    flags = ("--reuse-port", "--max-connection-age-s", "2")
    model = "mock:decode_ms=2"
    server = serve_process(model, *flags)
    port = server.wait_until_serving()
    load = load_process(f"127.0.0.1:{port}")
    until_busy(server)
    for _ in range(2):
        successor = serve_process(model, *flags, "--port", str(port))
        successor.wait_until_serving()
        until_busy(successor)  # both serve
        until_busy(server)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.text()
        assert "all_finished=True" in server.text()
        assert "code=CANCELLED" not in server.text()
        server = successor
        until_busy(server)
    result = finish(load)
    assert result["failures"] == []
    assert all(result["counts"][kind] for kind in ("unary", "stream", "new_connection")), result


async def test_the_successors_port_file_stays_when_the_old_server_goes(
    start_server: Any, tmp_path: Path
) -> None:
    port_file = tmp_path / "port"
    settings = {"reuse_port": True, "port_file": port_file}
    first = await start_server(**settings)
    second = await start_server(**settings, port=first.server.port)
    await first.server.drain(0.0)
    assert port_file.read_text(encoding="ascii") == f"{second.server.port}\n"
    await second.server.drain(0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_successor_that_is_loading_gets_no_calls(serve_process: Serve) -> None:
    """It would refuse half of all callers; so it listens when it can serve."""
    port = serve_process("mock", "--reuse-port").wait_until_serving()
    loading = serve_process("mock:no=model", "--reuse-port", "--port", str(port))
    for _ in range(20):
        with Client(f"127.0.0.1:{port}", retry=None, timeout_s=PATIENCE_S) as client:
            assert client.generate("a", max_new_tokens=2).text == "bc"
    assert loading.wait() == 2
    assert "listening" not in loading.text()


def test_without_reuse_port_a_second_server_on_the_port_is_refused(serve_process: Serve) -> None:
    port = serve_process("mock", "--reuse-port").wait_until_serving()
    second = serve_process("mock", "--port", str(port))
    assert second.wait() == 2
    assert f"port {port} on 127.0.0.1 is in use" in second.text()


def test_a_hand_over_without_a_successor_finishes_what_runs(serve_process: Serve) -> None:
    server = serve_process("mock:decode_ms=10", "--reuse-port")
    target = server.target
    with Client(target, retry=None, timeout_s=PATIENCE_S) as client:
        stream = client.generate_stream("a", max_new_tokens=150)
        next(stream)
        server.signal(signal.SIGTERM)
        assert len(list(stream)) == 149
        assert stream.summary is not None
    assert server.wait() == 0
    with (
        Client(target, retry=None, timeout_s=PATIENCE_S) as client,
        pytest.raises(UnavailableError),
    ):
        client.generate("a")


def test_what_outlives_the_grace_period_of_a_hand_over_is_told_so(serve_process: Serve) -> None:
    server = serve_process("mock:decode_ms=50", "--reuse-port", "--grace-s", "0.5")
    with server.connect() as client:
        stream = client.generate_stream("a", max_new_tokens=400)
        next(stream)
        server.signal(signal.SIGTERM)
        with pytest.raises(UnavailableError, match="stopped before the request was finished"):
            list(stream)
    assert server.wait() == 0


def test_sigterm_under_full_load_drains(
    serve_process: Serve, load_process: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Without reuse_port: what runs finishes, what comes is told why, nothing is lost."""
    server = serve_process("mock:decode_ms=5", "--max-sequences", "8")
    target = server.target
    load = load_process(target)
    until_busy(server)
    with Client(target, retry=None, timeout_s=PATIENCE_S) as client:
        # Long enough that the load meets the server while it drains.
        stream = client.generate_stream("a", max_new_tokens=400)
        next(stream)
        server.signal(signal.SIGTERM)
        assert len(list(stream)) == 399
        assert stream.summary is not None
    assert server.wait() == 0
    log = server.text()
    assert "all_finished=True" in log
    assert "Traceback" not in log
    result = finish(load)
    # A call is either served or told that this server drains (or has gone): no other error.
    unexpected = [f for f in result["failures"] if "UNAVAILABLE" not in f]
    assert unexpected == []
    assert any("draining" in failure for failure in result["failures"])
