"""A client without a server, and result files with invented latencies."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from gptjet.benchmarks import measure
from gptjet.benchmarks.config import load_config
from gptjet.benchmarks.geometry import config_of, geometry_from_config
from gptjet.service.client_types import (
    FinishReason,
    GenerationSummary,
    ModelInfo,
    ParityVerdict,
    SequenceSummary,
    Timings,
    TokenChunk,
)

ResultFile = Callable[..., Path]


TIMINGS = Timings(queue_ms=1, prefill_ms=2, decode_ms=3, ttft_ms=4, e2e_ms=5)
MODEL = ModelInfo(
    name="fake",
    architecture="fake",
    backend="mock",
    device="cpu",
    dtype="float32",
    num_parameters=0,
    vocab_size=100,
    max_context=64,
    max_sequences=1,
    max_batch_size=1,
    block_size=16,
    num_kv_blocks=4,
    max_queue_size=1,
    max_n=1,
    eos_token_id=7,
    server_version="0",
    parity=ParityVerdict(
        status="not_run", max_relative_error=0, tokens_compared=0, tokens_agreed=0, detail=""
    ),
)


class FakeStream:
    """Chunks of the given sizes; the clock is moved before each one arrives."""

    def __init__(self, clock: list[int], arrivals: Sequence[tuple[int, int]], prompt: int) -> None:
        self._clock, self._arrivals = clock, arrivals
        made = sum(tokens for _, tokens in arrivals)
        self.summary: GenerationSummary | None = GenerationSummary(
            request_id="r",
            finish_reason=FinishReason.LENGTH,
            prompt_tokens=prompt,
            completion_tokens=made,
            timings=TIMINGS,
            sequences=(
                SequenceSummary(index=0, finish_reason=FinishReason.LENGTH, completion_tokens=made),
            ),
            seed=1,
        )

    def __iter__(self) -> Iterator[TokenChunk]:
        for ms, tokens in self._arrivals:
            self._clock[0] += ms * 1_000_000
            yield TokenChunk(index=0, text="x", token_ids=tuple(range(tokens)))
        self._clock[0] += 1_000_000  # the summary, 1 ms after the last token


class FakeClient:
    """Answers every request with the same arrivals: (ms since the last one, tokens).

    Without any, with a token a millisecond. `change` is what the summary says instead; None: no
    summary at all. `error` is raised instead of an answer.
    """

    def __init__(
        self, arrivals: Sequence[tuple[int, int]] | None = None, monkeypatch: Any = None
    ) -> None:
        self.arrivals = arrivals
        self.clock = [0]
        self.options: dict[str, Any] = {}
        self.change: dict[str, Any] | None = {}
        self.error: Exception | None = None
        self.requests: list[list[int]] = []
        self.closed = False
        if monkeypatch is not None:
            monkeypatch.setattr(measure.time, "perf_counter_ns", lambda: self.clock[0])

    def generate_stream(
        self, prompt: Sequence[int], *, timeout_s: float | None = None, **options: Any
    ) -> AbstractContextManager[FakeStream]:
        self.options = options
        self.requests.append(list(prompt))
        if self.error is not None:
            raise self.error
        arrivals = self.arrivals or [(1, 1)] * int(options["max_new_tokens"])
        stream = FakeStream(self.clock, arrivals, len(prompt))
        assert stream.summary is not None
        stream.summary = None if self.change is None else replace(stream.summary, **self.change)
        return nullcontext(stream)

    def get_model(self) -> ModelInfo:
        return MODEL

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake_client() -> type[FakeClient]:
    """The class of a client without a server; it says it serves `fake_model`."""
    return FakeClient


@pytest.fixture
def fake_model() -> ModelInfo:
    """What the fake says it serves: vocabulary 100, context 64."""
    return MODEL


@pytest.fixture
def environment() -> dict[str, Any]:
    """As record_environment's, of no real machine."""
    return invented_environment()


def invented_environment() -> dict[str, Any]:
    """As record_environment's, of no real machine."""
    return {
        "recorded_at": "2026-01-02T03:04:05.000Z",
        "gpus": [],
        "cpu": {"model": "Invented CPU", "usable_cores": 2},
        "memory_gib": 16.0,
        "memory_available_gib": 12.0,
        "load_average": [0.1, 0.2, 0.3],
        "packages": {"torch": "0.0.0"},
        "git": {"commit": "0123456789abcdef", "modified": False},
    }


def result_writer(folder: Path) -> ResultFile:
    """`write(name, config="t4", levels={"huggingface/fp16": (80, 2), ...}, runs=5)` writes a file
    whose runs take ms a token and ms a 10 prompt tokens, times a seeded noise (2 %), and 0.5 ms.
    """

    def write(
        name: str,
        *,
        config: str = "t4",
        levels: dict[str, tuple[float, float]],
        runs: int = 5,
        inputs: Sequence[int] = (50, 200, 500, 1000),
        outputs: Sequence[int] = (50, 100, 150, 200),
        bandwidth: dict[str, Any] | None = None,
        extra: Sequence[tuple[str, dict[str, Any]]] = (),
        noise_sd: float = 0.02,
    ) -> Path:
        chosen = load_config(config)
        noise = random.Random(name)
        of = {"session": name, "hardware": chosen.hardware.name, "model": "gpt-j-6b"}
        records: list[tuple[str, dict[str, Any]]] = [
            (
                "session",
                {
                    **of,
                    "started_at": "2026-01-02T03:04:05.000Z",
                    "config": chosen.model_dump(mode="json"),
                    "hardware_verified": True,
                    "servers": "together",
                    "environment": invented_environment(),
                    "bandwidth": bandwidth,
                    "geometry": asdict(geometry_from_config(config_of("gpt-j-6b"))),
                    "identity": {},
                },
            )
        ]
        for level, times in levels.items():
            backend, _, weight_type = level.partition("/")
            records += [
                (
                    "sample",
                    {
                        **of,
                        "backend": backend,
                        "weight_type": weight_type,
                        "run": run,
                        **_invented_sample(
                            input_tokens, output_tokens, *times, noise.gauss(1, noise_sd)
                        ),
                    },
                )
                for input_tokens in inputs
                for output_tokens in outputs
                for run in range(runs)
            ]
        records += [(kind, {**of, **fields}) for kind, fields in extra]
        lines = [json.dumps({"schema": 1, "kind": kind, **fields}) for kind, fields in records]
        path = folder / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def _invented_sample(
    input_tokens: int, output_tokens: int, token_ms: float, prompt_ms: float, slow: float
) -> dict[str, Any]:
    ttft_ms = slow * (token_ms + prompt_ms * input_tokens / 10)
    gaps = [slow * token_ms] * (output_tokens - 1)
    e2e_ms = ttft_ms + sum(gaps) + 0.5
    return {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "block": 0,
        "position": 0,
        "started_at": "2026-01-02T03:04:06.000Z",
        "load": 0.1,
        "ttft_ms": ttft_ms,
        "itl_ms": gaps,
        "e2e_ms": e2e_ms,
        "server": {
            "queue_ms": 0.1,
            "prefill_ms": ttft_ms - 1,
            "decode_ms": sum(gaps),
            "ttft_ms": ttft_ms - 0.5,
            "e2e_ms": e2e_ms - 0.6,
        },
    }


@pytest.fixture
def write_results(tmp_path: Path) -> ResultFile:
    """See `result_writer`; into the test's own folder."""
    return result_writer(tmp_path)


@pytest.fixture(scope="session")
def write_shared_results(tmp_path_factory: pytest.TempPathFactory) -> ResultFile:
    """The same, for files that several tests read."""
    return result_writer(tmp_path_factory.mktemp("results"))


@contextmanager
def serve_mock(prefill_ms: float, decode_ms: float) -> Iterator[str]:
    """A server in this process, on a thread of its own, with a mock of known step times."""
    from gptjet.service.backends.mock import MockBackend
    from gptjet.service.config import ServerConfig
    from gptjet.service.engine.tokenizer import ByteTokenizer
    from gptjet.service.rpc.server import Server

    ready: list[str] = []
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        server = Server(ServerConfig(port=0))
        await server.start()
        await server.attach(
            MockBackend(prefill_ms=prefill_ms, decode_ms=decode_ms), ByteTokenizer()
        )
        ready.append(f"127.0.0.1:{server.port}")
        started.set()
        await stop.wait()
        await server.drain(0.0)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert started.wait(60)
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@pytest.fixture
def mock_server() -> Callable[[float, float], AbstractContextManager[str]]:
    """`with mock_server(prefill_ms, decode_ms) as target:`."""
    return serve_mock
