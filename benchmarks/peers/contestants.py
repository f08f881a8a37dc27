"""Whoever can be timed on a checkpoint: a peer's worker process, or our own server and client."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from gptjet.benchmarks.config import LevelName
from gptjet.benchmarks.environment import without_paths
from gptjet.benchmarks.peers.environments import ROOT, PeerError, converted, find_peer
from gptjet.benchmarks.server_process import ServeCommand, ServerError, ServerProcess
from gptjet.service.client import Client

OURS = "gptjet"
"""`gptjet:BACKEND` is our server with that backend; other names are peers."""

_WORKER = Path(__file__).with_name("worker.py")
_START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class PeerRun:
    """One run. `token_ms` counts from the start, one value a token."""

    tokens: tuple[int, ...]
    token_ms: tuple[float, ...]
    e2e_ms: float
    peak_memory_bytes: int | None

    @property
    def ttft_ms(self) -> float:
        """Until the first token."""
        return self.token_ms[0]

    @property
    def tpot_ms(self) -> float:
        """Between tokens, on average."""
        return (self.token_ms[-1] - self.token_ms[0]) / max(1, len(self.token_ms) - 1)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """What a worker answered."""
        return cls(
            tuple(fields["tokens"]),
            tuple(fields["token_ms"]),
            fields["e2e_ms"],
            fields["peak_memory_bytes"],
        )


class Contestant(Protocol):
    """Something that answers a prompt greedily with a given number of tokens."""

    def run(self, prompt: Sequence[int], output_tokens: int) -> PeerRun:
        """One timed run. Raises PeerError."""
        ...


@contextlib.contextmanager
def start(
    name: str, model: Path, weight_type: str, threads: int, root: Path = ROOT
) -> Iterator[Contestant]:
    """Start a contestant by its name, and end it afterwards. Raises PeerError."""
    library, _, backend = name.partition(":")
    if library == OURS:
        with _our_server(backend or "huggingface", model, weight_type, threads) as ours:
            yield ours
        return
    peer = find_peer(name)
    folder = converted(peer, model, weight_type, root)
    command = [str(peer.python(root)), str(_WORKER.absolute()), name]
    with _WorkerProcess([*command, str(folder.absolute()), weight_type, str(threads)]) as worker:
        yield worker


class _WorkerProcess:
    """A peer's process: see worker.py."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if not self._read().get("ready"):
            raise PeerError("the worker began with something else than ready")

    def run(self, prompt: Sequence[int], output_tokens: int) -> PeerRun:
        """See Contestant."""
        assert self._process.stdin is not None
        asked = {"prompt": list(prompt), "output_tokens": output_tokens}
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError("the worker process has ended") from None
        return PeerRun.from_json(self._read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"the worker process ended with code {self._process.wait()}")
        fields: dict[str, Any] = json.loads(line)
        if "error" in fields:
            raise PeerError(without_paths(fields["error"]))
        return fields


class _OurServer:
    """Our server through our client: what a user gets, the API exchange included."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def run(self, prompt: Sequence[int], output_tokens: int) -> PeerRun:
        """See Contestant. The server's memory is another process's and not known here."""
        tokens: list[int] = []
        times_ns: list[int] = []
        started_ns = time.perf_counter_ns()
        with self._client.generate_stream(
            tuple(prompt),
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            ignore_eos=True,
            temperature=0.0,
        ) as stream:
            for chunk in stream:
                times_ns += [time.perf_counter_ns()] * len(chunk.token_ids)
                tokens += chunk.token_ids
        ended_ns = time.perf_counter_ns()
        token_ms = tuple((when - started_ns) / 1e6 for when in times_ns)
        return PeerRun(tuple(tokens), token_ms, (ended_ns - started_ns) / 1e6, None)


@contextlib.contextmanager
def _our_server(backend: str, model: Path, weight_type: str, threads: int) -> Iterator[Contestant]:
    del threads  # the server takes them from OMP_NUM_THREADS, which the caller set for everyone
    command = ServeCommand(model=str(model.absolute()), device="cpu")
    level = LevelName(backend=backend, weight_type=weight_type)
    try:
        with (
            ServerProcess(command, level, start_timeout_s=_START_TIMEOUT_S) as server,
            Client(server.target) as client,
        ):
            yield _OurServer(client)
    except ServerError as error:
        raise PeerError(str(error)) from error
