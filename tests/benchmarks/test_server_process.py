"""Servers of a sweep as processes: they serve, say why they cannot, and die with the runner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptjet.benchmarks.config import LevelName
from gptjet.benchmarks.server_process import ServeCommand, ServerError, ServerProcess
from gptjet.service.client import Client

MOCK = LevelName(backend="mock", weight_type="fp32")

RUNNER = """
import json, time
from gptjet.benchmarks.config import LevelName
from gptjet.benchmarks.server_process import ServeCommand, ServerProcess
level = LevelName(backend="mock", weight_type="fp32")
server = ServerProcess(ServeCommand(model="embedded"), level, start_timeout_s=100)
print(json.dumps({"target": server.target, "pid": server.pid}), flush=True)
time.sleep(600)
"""
PATIENT = """
import json, signal, time
signal.signal(signal.SIGINT, lambda *_: print("heard", flush=True))
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_server_serves_and_dies_with_a_killed_runner() -> None:
    runner = subprocess.Popen([sys.executable, "-c", RUNNER], stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    try:
        told = json.loads(runner.stdout.readline())
        with Client(told["target"]) as client:
            assert client.get_model().backend == "mock"
        assert is_running(told["pid"])
    finally:
        runner.kill()
        runner.wait()
        runner.stdout.close()
    deadline = time.monotonic() + 60
    while is_running(told["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(told["pid"])


def test_ctrl_c_at_a_terminal_reaches_the_runner_and_not_its_server() -> None:
    """A terminal signals the whole process group; the run in progress is to end well all the same.

    A server that drained would fail it, and a sweep that goes on does not make failed runs again.
    """
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER.replace("import json, time", PATIENT)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert runner.stdout is not None
    try:
        told = json.loads(runner.stdout.readline())
        assert os.getpgid(told["pid"]) != os.getpgid(runner.pid)
        os.killpg(runner.pid, signal.SIGINT)
        assert runner.stdout.readline() == "heard\n"
        with Client(told["target"], retry=None) as client:
            assert client.generate([1, 2], max_new_tokens=2).summary.completion_tokens == 2
        assert is_running(told["pid"])
    finally:
        runner.kill()
        runner.wait()
        runner.stdout.close()


def test_a_server_that_cannot_start_says_why() -> None:
    command = ServeCommand(model="embedded", extra=("--no-such-flag",))
    with pytest.raises(ServerError, match=r"ended with code 2: .*no-such-flag"):
        ServerProcess(command, MOCK, start_timeout_s=60)


def test_a_server_that_does_not_come_up_in_time_is_given_up() -> None:
    with pytest.raises(ServerError, match="does not listen in time"):
        ServerProcess(ServeCommand(model="embedded"), MOCK, start_timeout_s=0.0)


def test_the_command_line_says_everything_the_level_is(tmp_path: Path) -> None:
    command = ServeCommand(model="m", device="cuda", extra=("--max-n=1",))
    line = command.arguments(LevelName(backend="fused", weight_type="fp16"), tmp_path / "p")
    assert {"--backend=fused", "--model=m", "--dtype=float16", "--device=cuda", "--max-n=1"} <= set(
        line
    )
    int8 = command.arguments(LevelName(backend="fused", weight_type="int8"), tmp_path / "p")
    assert "--dtype=int8" in int8


def test_the_callers_settings_do_not_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptjet.benchmarks.server_process import environment_without_settings

    monkeypatch.setenv("GPTJET_BACKEND", "nonsense")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "GPTJET_BACKEND" not in environment_without_settings()
    assert environment_without_settings()["OMP_NUM_THREADS"] == "2"
