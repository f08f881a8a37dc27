"""A server in a process of its own, with whatever standard error a test gives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptjet.service.client import Client

PATIENCE_S = 60.0

SCRIPT = """
import sys
from pathlib import Path
from gptjet.service.backends.factory import LoadedModel
from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.tokenizer import ByteTokenizer
from gptjet.service.config import load_config
from gptjet.service.rpc.process import run

def load(config):
    return LoadedModel(MockBackend(), ByteTokenizer())

config = load_config(port=0, port_file=Path(sys.argv[1]), log_format="json")
sys.exit(run(config, loader=load))
"""


class Process:
    """A server of the mock backend; settings come from the environment."""

    def __init__(self, folder: Path, stderr: Any, settings: dict[str, str]) -> None:
        self.port_file = folder / "port"
        clean = {name: value for name, value in os.environ.items() if "GPTJET_" not in name}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(self.port_file)],
            stderr=stderr,
            env=clean | {"OMP_NUM_THREADS": "1"} | settings,
        )

    def connect(self) -> Client:
        end = time.monotonic() + PATIENCE_S
        while not self.port_file.exists():
            assert self.process.poll() is None, "it ended"
            assert time.monotonic() < end, "no port file"
            time.sleep(0.05)
        port = int(self.port_file.read_text(encoding="ascii"))
        client = Client(f"127.0.0.1:{port}", retry=None, timeout_s=20)
        client.wait_until_serving(PATIENCE_S)
        return client

    def stop(self) -> int:
        """Ask it to drain; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """`start_process(stderr, GPTJET_MAX_N="2", ...)`."""
    started: list[Process] = []

    def start(stderr: Any, **settings: str) -> Process:
        started.append(Process(tmp_path, stderr, settings))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()
