"""Whoever can be timed on a checkpoint: a worker process of a peer or of ours, or our server.

`gptjet:BACKEND` is our server through our client, `engine:BACKEND` our engine in a worker process,
without a network, as the peers are; other names are peers.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from gptjet.benchmarks.config import LevelName
from gptjet.benchmarks.environment import without_paths
from gptjet.benchmarks.peers.environments import ROOT, PeerError, converted, find_peer, quantized
from gptjet.benchmarks.peers.worker import peak_memory_bytes
from gptjet.benchmarks.server_process import (
    DTYPES,
    ServeCommand,
    ServerError,
    ServerProcess,
    environment_without_settings,
)
from gptjet.service.client import Client, GptjetError

SERVER = "gptjet"
ENGINE = "engine"
DEFAULT_BACKEND = "huggingface"

# A module's name, not an import: the benchmarks room may not know the engine.
_OFFLINE_WORKER = "gptjet.service.offline_worker"
_WORKER = Path(__file__).with_name("worker.py")
_START_TIMEOUT_S = 600.0


# What may follow a backend's name after "+": flags of the worker, and its environment.
_FLAGS = {"deterministic": ["--deterministic"], "torch": []}
_VARIABLES = {"torch": {"CC": "/nonexistent/cc"}}


@dataclass(frozen=True, slots=True)
class LateRun:
    """A prompt that came while others ran. `added_ms` counts from their start, `ttft_ms` on."""

    added_ms: float
    ttft_ms: float


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


@runtime_checkable
class StreamsContestant(Contestant, Protocol):
    """One that runs several prompts at once, each a stream of its own."""

    def run_together(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[PeerRun]:
        """One run a prompt, in their order; all times count from one start. Raises PeerError."""
        ...


@runtime_checkable
class LateContestant(Contestant, Protocol):
    """One that takes a prompt while others run."""

    def run_beside(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int,
        late: Sequence[int],
        after_tokens: int,
    ) -> tuple[list[PeerRun], LateRun]:
        """Streams, and a prompt for one token that comes once each of them has `after_tokens`.

        Raises PeerError.
        """
        ...


@contextlib.contextmanager
def start(
    name: str,
    model: Path,
    weight_type: str,
    threads: int,
    root: Path = ROOT,
    *,
    kv_cache_tokens: int | None = None,
) -> Iterator[Contestant]:
    """Start a contestant by its name, and end it afterwards. Raises PeerError.

    `engine:BACKEND+deterministic` keeps that promise, `engine:BACKEND+torch` finds no compiler.

    kv_cache_tokens  of ours: what all its streams together may hold; None: what fits the machine
    """
    library, _, backend = name.partition(":")
    if library == SERVER:
        level = _level(name, backend, weight_type)
        model = quantized(model, weight_type, root)
        with _our_server(level, model, threads, kv_cache_tokens) as ours:
            yield ours
        return
    if library == ENGINE:
        backend, *options = backend.split("+")
        if unknown := [option for option in options if option not in _FLAGS]:
            raise PeerError(f"{name}: no option {unknown[0]!r}: {', '.join(_FLAGS)}")
        level = _level(name, backend, weight_type)
        model = quantized(model, weight_type, root)
        command = [sys.executable, "-m", _OFFLINE_WORKER, f"--backend={level.backend}"]
        command += [f"--model={model.absolute()}", f"--threads={threads}"]
        command += [f"--dtype={DTYPES.get(weight_type, weight_type)}"]
        command += [] if kv_cache_tokens is None else [f"--kv-cache-tokens={kv_cache_tokens}"]
        command += [flag for option in options for flag in _FLAGS[option]]
        variables = {k: v for option in options for k, v in _VARIABLES.get(option, {}).items()}
        with _EngineProcess(command, variables) as engine:
            yield engine
        return
    peer = find_peer(name)
    folder = converted(peer, model, weight_type, root)
    command = [str(peer.python(root)), str(_WORKER.absolute()), name]
    with _WorkerProcess([*command, str(folder.absolute()), weight_type, str(threads)]) as worker:
        yield worker


def _level(name: str, backend: str, weight_type: str) -> LevelName:
    try:
        return LevelName(backend=backend or DEFAULT_BACKEND, weight_type=weight_type)
    except ValueError:
        raise PeerError(f"{name}: no backend has such a name") from None


class _WorkerProcess:
    """A peer's process: see worker.py."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment_without_settings() | dict(variables or {}),
        )
        try:
            if not self._read().get("ready"):
                raise PeerError("the worker began with something else than ready")
        except BaseException:
            self.close()
            raise

    def run(self, prompt: Sequence[int], output_tokens: int) -> PeerRun:
        """See Contestant."""
        asked = {"prompt": list(prompt), "output_tokens": output_tokens}
        return PeerRun.from_json(self._ask(asked))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process: its input ends, and it has a while to follow."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError("the worker process has ended") from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"the worker process ended with code {self._process.wait()}")
        fields: dict[str, Any] = json.loads(line)
        if "error" in fields:
            raise PeerError(without_paths(fields["error"]))
        return fields


class _EngineProcess(_WorkerProcess):
    """Our engine's process: see gptjet.service.offline_worker."""

    def run_together(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[PeerRun]:
        """See StreamsContestant."""
        answered = self._ask(
            {"prompts": [list(prompt) for prompt in prompts], "output_tokens": output_tokens}
        )
        return [PeerRun.from_json({**answered, **stream}) for stream in answered["streams"]]

    def run_beside(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int,
        late: Sequence[int],
        after_tokens: int,
    ) -> tuple[list[PeerRun], LateRun]:
        """See LateContestant."""
        asked: dict[str, Any] = {"prompts": [list(prompt) for prompt in prompts]}
        asked["late"] = {"prompt": list(late), "after_tokens": after_tokens}
        answered = self._ask({**asked, "output_tokens": output_tokens})
        runs = [PeerRun.from_json({**answered, **stream}) for stream in answered["streams"]]
        return runs, LateRun(**answered["late"])


class _OurServer:
    """Our server through our client: what a user gets, the API exchange included."""

    def __init__(self, client: Client, pid: int) -> None:
        self._client = client
        self._pid = pid

    def run(self, prompt: Sequence[int], output_tokens: int) -> PeerRun:
        """See Contestant. The memory is the server's alone, without the client's."""
        try:
            return self._run(prompt, output_tokens, time.perf_counter_ns())
        except GptjetError as error:
            raise PeerError(str(error)) from error

    def run_together(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[PeerRun]:
        """See StreamsContestant. A thread a stream."""
        started_ns = time.perf_counter_ns()
        with ThreadPoolExecutor(len(prompts)) as threads:
            runs = [threads.submit(self._run, p, output_tokens, started_ns) for p in prompts]
            try:
                return [run.result() for run in runs]
            except GptjetError as error:
                raise PeerError(str(error)) from error

    def _run(self, prompt: Sequence[int], output_tokens: int, started_ns: int) -> PeerRun:
        tokens: list[int] = []
        times_ns: list[int] = []
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
        e2e_ms = (ended_ns - started_ns) / 1e6
        return PeerRun(tuple(tokens), token_ms, e2e_ms, peak_memory_bytes(self._pid))


@contextlib.contextmanager
def _our_server(
    level: LevelName, model: Path, threads: int, kv_cache_tokens: int | None
) -> Iterator[Contestant]:
    # transformers takes its threads from OMP_NUM_THREADS, which the caller set for everyone.
    extra = [f"--cpu-threads={threads}"]
    extra += [] if kv_cache_tokens is None else [f"--kv-cache-tokens={kv_cache_tokens}"]
    command = ServeCommand(model=str(model.absolute()), device="cpu", extra=tuple(extra))
    try:
        with (
            ServerProcess(command, level, start_timeout_s=_START_TIMEOUT_S) as server,
            Client(server.target) as client,
        ):
            yield _OurServer(client, server.pid)
    except ServerError as error:
        raise PeerError(str(error)) from error
