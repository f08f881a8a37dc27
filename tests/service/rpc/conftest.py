"""`gptjet serve` as a process of its own, with the mock backend and what goes wrong in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptjet.service.client import Client, HealthStatus

PATIENCE_S = 60.0


class ServeProcess:
    """One `gptjet serve`; what it logs is in `log`."""

    def __init__(self, folder: Path, model: str, flags: tuple[str, ...]) -> None:
        self.log = folder / "log"
        self._port_file = folder / "port"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GPTJET_")}
        command = [sys.executable, "-m", "gptjet.service.cli", "serve", "--backend", "mock"]
        command += ["--model", model, "--port-file", str(self._port_file), "--log-level", "info"]
        if "--port" not in flags:
            command += ["--port", "0"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *flags], stderr=log, env=environment | {"OMP_NUM_THREADS": "1"}
            )

    def wait_until_serving(self) -> int:
        """Its port, once it serves."""
        end = time.monotonic() + PATIENCE_S
        while True:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            if "serving" in self.text() and self._port_file.exists():
                return int(self._port_file.read_text(encoding="ascii"))
            time.sleep(0.02)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.wait_until_serving()}"

    def connect(self) -> Client:
        return Client(self.target, retry=None, timeout_s=PATIENCE_S)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for_health(self, client: Client, wanted: HealthStatus) -> None:
        end = time.monotonic() + PATIENCE_S
        while client.health() is not wanted:
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)


Serve = Callable[..., ServeProcess]


@pytest.fixture
def serve_process(tmp_path: Path) -> Iterator[Serve]:
    """`serve_process("mock:decode_ms=5", "--max-sequences", "4")`."""
    started: list[ServeProcess] = []

    def start(model: str = "mock", *flags: str) -> ServeProcess:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(ServeProcess(folder, model, flags))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()
