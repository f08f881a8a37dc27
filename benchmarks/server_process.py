"""Starts `gptjet serve` for a level, waits until it serves, and stops it.

The server dies with the runner, even one that is killed: the kernel sends it SIGTERM
(prctl(PR_SET_PDEATHSIG), Linux). Nothing of the caller's GPTJET_* variables reaches it: a setting
that stands in no result file would make the results unexplainable.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from gptjet.benchmarks.config import LevelName
from gptjet.benchmarks.environment import without_paths
from gptjet.service.client import Client, GptjetError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""How `gptjet serve --dtype` spells a weight type; others are passed on under their own name."""

# A module's name, not an import: it is for starting, and the benchmarks room knows the client only.
_DIE_WITH_PARENT = "gptjet.service.die_with_parent"
_POLL_S = 0.05
_STOP_S = 20.0
_ERROR_LINES = 3


class ServerError(Exception):
    """A server did not start, or is not what was asked for; the message is for a person."""


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """How levels are served: `gptjet serve` of this interpreter, and its settings.

    module   run with `python -m`; a test puts a server of its own here
    model    what --model gets
    device   what --device gets: "cpu" or "cuda"
    extra    further flags, as the user gave them
    """

    model: str
    device: str = "auto"
    extra: tuple[str, ...] = ()
    module: str = "gptjet.service.cli"

    def arguments(self, level: LevelName, port_file: Path) -> list[str]:
        """The command line for one level."""
        return [
            sys.executable,
            "-m",
            self.module,
            "serve",
            f"--backend={level.backend}",
            f"--model={self.model}",
            f"--dtype={DTYPES.get(level.weight_type, level.weight_type)}",
            f"--device={self.device}",
            "--host=127.0.0.1",
            "--port=0",
            f"--port-file={port_file}",
            "--grace-s=1",
            "--log-level=warning",
            *self.extra,
        ]


class ServerProcess:
    """One running server. Use it as a context manager, or call `stop`."""

    def __init__(self, command: ServeCommand, level: LevelName, *, start_timeout_s: float) -> None:
        """Start it and return once it serves. Raises ServerError."""
        self._folder = tempfile.TemporaryDirectory(prefix="gptjet-sweep-")
        folder = Path(self._folder.name)
        self._log = folder / "server.log"
        port_file = folder / "port"
        started = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    _DIE_WITH_PARENT,
                    str(os.getpid()),
                    *command.arguments(level, port_file),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment_without_settings(),
                # Ctrl-C goes to a terminal's whole process group: the run in progress is to end
                # well, and not to be recorded as a failure of a server that drains.
                start_new_session=True,
            )
        try:
            self.target = self._wait(port_file, started + start_timeout_s)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - started

    @property
    def pid(self) -> int:
        """The server's process: the same one from its start on, `exec` keeps the id."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for one that does not end. Nothing happens to a stopped one."""
        if self.is_alive():
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
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
        self.stop()

    def _wait(self, port_file: Path, deadline: float) -> str:
        """The server's address, once its model is warm."""
        target: str | None = None
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise ServerError(
                    f"the server ended with code {self._process.returncode}: {self._last_words()}"
                )
            text = port_file.read_text() if port_file.exists() else ""
            if text.strip().isdigit():
                target = f"127.0.0.1:{text.strip()}"
                if is_serving(target):
                    return target
            time.sleep(_POLL_S)
        raise ServerError(
            f"the server {'is not serving' if target else 'does not listen'} in time: "
            f"{self._last_words()}"
        )

    def _last_words(self) -> str:
        """The end of its log, on one line, without paths."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return without_paths(" | ".join(lines[-_ERROR_LINES:]))[-1000:] or "it said nothing"


def is_serving(target: str) -> bool:
    """Whether grpc.health.v1 says SERVING there now."""
    with Client(target, retry=None) as client:
        try:
            return client.health(timeout_s=2.0).value == "serving"
        except GptjetError:
            return False


def parse_endpoints(values: Sequence[str]) -> dict[str, str]:
    """`NAME=HOST:PORT` -> {NAME: HOST:PORT}; NAME is a backend or backend/weight type.

    Raises ServerError for another shape.
    """
    endpoints = {}
    for value in values:
        name, equals, target = value.partition("=")
        host, colon, port = target.rpartition(":")
        if not (name and equals and host and colon and port.isdigit()):
            raise ServerError(f"--endpoint {value}: give NAME=HOST:PORT, such as fused=gpu1:50051")
        endpoints[name] = target
    return endpoints


def environment_without_settings() -> dict[str, str]:
    """This process's environment without GPTJET_*, for one whose settings are all in its flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GPTJET_")}
