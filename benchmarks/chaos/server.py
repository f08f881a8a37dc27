"""A server to do harm to: started as anyone starts it, watched from outside.

What it holds is read where an operator reads it: its Prometheus endpoint and /proc.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from gptjet.benchmarks.server_process import (
    ServerError,
    environment_without_settings,
    is_serving,
)

_POLL_S = 0.05
_STOP_S = 40.0
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{[^}]*\})?\s+(\S+)$")

# What a server that serves nobody shows as zero.
RUNNING = "gptjet_num_requests_running"
HELD = (RUNNING, "gptjet_num_requests_waiting", 'gptjet_kv_blocks{state="used"}')


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ChaosServer:
    """`gptjet serve` in a process of its own; a context manager that ends it.

    flags        its further flags
    environment  added to this process's, without its GPTJET_*
    stderr       where its log goes; a file in a temporary folder where None
    port         to listen on; 0 chooses one
    """

    def __init__(
        self,
        *flags: str,
        model: str = "embedded",
        backend: str = "fused",
        environment: Mapping[str, str] | None = None,
        stderr: IO[bytes] | int | None = None,
        port: int = 0,
        start_timeout_s: float = 180.0,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gptjet-chaos-")
        folder = Path(self._folder.name)
        port_file = folder / "port"
        self.log = folder / "server.log"
        self.metrics_port = free_port()
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self.log.open("wb")) if stderr is None else stderr
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "gptjet.service.cli", "serve"),
                    *(f"--backend={backend}", f"--model={model}", "--device=cpu"),
                    *("--host=127.0.0.1", f"--port={port}", f"--port-file={port_file}"),
                    f"--metrics-port={self.metrics_port}",
                    *flags,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=folder,
                env=environment_without_settings() | dict(environment or {}),
            )
        try:
            self.target = self._wait(port_file, time.monotonic() + start_timeout_s)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self._process.pid

    @property
    def port(self) -> int:
        """It listens on 127.0.0.1."""
        return int(self.target.rpartition(":")[2])

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def is_serving(self) -> bool:
        """Whether its health says so now."""
        return self.is_alive() and is_serving(self.target)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None where it still runs after so long."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> int | None:
        """SIGTERM; its exit code, None for one that had to be killed."""
        if self.is_alive():
            self.signal(signal.SIGTERM)
        code = self.wait(_STOP_S)
        self.kill()
        return code

    def kill(self) -> None:
        """End it now, and remove its files."""
        if self.is_alive():
            self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    # ---- what it holds --------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """See `parse_metrics`. Raises OSError where there is no answer."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return parse_metrics(answer.read().decode())

    def held(self) -> dict[str, float]:
        """Sequences and KV blocks in use, by metric. Raises KeyError for one that is missing."""
        metrics = self.metrics()
        return {name: metrics[name] for name in HELD}

    def wait_until_idle(self, timeout_s: float) -> dict[str, float]:
        """What is still held once nothing is, or after so long."""
        deadline = time.monotonic() + timeout_s
        held = self.held()
        while any(held.values()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            held = self.held()
        return held

    def memory_mib(self) -> float:
        """Resident memory of the process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        assert match is not None, "the process has ended"
        return int(match[1]) / 1024

    def open_files(self) -> int:
        """File descriptors that it has open."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def log_text(self) -> str:
        """What it has logged."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _wait(self, port_file: Path, deadline: float) -> str:
        while time.monotonic() < deadline:
            if not self.is_alive():
                words = self.log_text()[-800:] if self.log.exists() else ""
                raise ServerError(f"the server ended with {self._process.returncode}: {words}")
            text = port_file.read_text().strip() if port_file.exists() else ""
            if text.isdigit() and is_serving(f"127.0.0.1:{text}"):
                return f"127.0.0.1:{text}"
            time.sleep(_POLL_S)
        raise ServerError("the server did not serve in time")


def parse_metrics(text: str) -> dict[str, float]:
    """The samples of Prometheus' text format, by name with labels, and summed by name alone."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match and not line.startswith("#"):
            values[match[1]] = values.get(match[1], 0.0) + float(match[3])
            if match[2]:
                values[match[1] + match[2]] = float(match[3])
    return values
