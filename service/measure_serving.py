"""What the engine and gRPC add to the fused backend, on random weights, printed as JSON lines.

    python -m gptjet.service.measure_serving --streams 32 --lengths 512:128

The same requests go to the engine in this process and through gRPC from another one, in turns, so
that what changes on the machine meanwhile meets both. Greedy, no prefix shared, none cut short.

    serving    one path ("engine" or "grpc"), streams at once, and raw times of each stream
    grpc_cost  ms a token, and to the first one, that gRPC adds to a stream alone
    error      why it stopped
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

Record = dict[str, Any]

_CLIENT_TIMEOUT_S = 240


class IdTokenizer:
    """Ids without a text: what a random model says is nothing to read."""

    eos_token_id = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """A byte an id, as far as the vocabulary goes."""
        return [byte % self.vocab_size for byte in text.encode()]

    def decode(self, token_ids: Sequence[int]) -> str:
        """One character an id."""
        return "x" * len(token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """That character, as text that a detokenizer has work with."""
        del token_id
        return b"x"


def prompts_of(vocab_size: int, streams: int, length: int) -> list[tuple[int, ...]]:
    """Prompts that begin differently, so that the prefix cache has none of them."""
    return [
        tuple((17 * stream + 31 * place + 3) % vocab_size for place in range(length))
        for stream in range(streams)
    ]


async def measure(flags: argparse.Namespace) -> AsyncIterator[Record]:
    """Yield the records. Raises BackendLoadError, and ImportError where there is no gRPC."""
    from gptjet.service.backends.fused import measure as fused
    from gptjet.service.config import ServerConfig
    from gptjet.service.log import configure_logging
    from gptjet.service.rpc.server import Server

    configure_logging("warning")
    subject = fused.subject_of(flags.geometry, flags.weight_type, flags.device)
    tokens = sum(flags.lengths)
    backend = await asyncio.to_thread(
        fused.build_backend, subject, max_sequences=flags.streams, max_tokens=tokens
    )
    config = ServerConfig(
        host="127.0.0.1",
        port=0,
        model="random",
        backend="fused",
        max_sequences=flags.streams,
        prefix_cache=False,
    )
    server = Server(config)
    await server.start()
    try:
        await server.attach(backend, IdTokenizer(backend.spec.vocab_size))
        alone: dict[str, list[list[float]]] = {"engine": [], "grpc": []}
        for streams in dict.fromkeys((1, flags.streams)):
            for turn in range(flags.repeats + 1):
                for path in ("engine", "grpc"):
                    record = await _run(path, server, flags, streams)
                    if not turn:
                        continue  # both have run once: everything is warm
                    if streams == 1:
                        alone[path].append(record["times_ms"][0])
                    yield {**record, "backend": subject.backend}
            if streams == 1:
                yield {"backend": subject.backend, **grpc_cost(alone["engine"], alone["grpc"])}
    finally:
        await server.drain(0.0)


def grpc_cost(engine: Sequence[Sequence[float]], grpc: Sequence[Sequence[float]]) -> Record:
    """Of runs that took turns: medians of what a token, and the first, took longer through gRPC.

    Each run is ms to the first token, then between tokens.
    """

    def per_token(run: Sequence[float]) -> float:
        return sum(run[1:]) / max(1, len(run) - 1)

    pairs = list(zip(engine, grpc, strict=True))
    return {
        "kind": "grpc_cost",
        "runs": len(pairs),
        "added_ms_per_token": round(
            statistics.median(per_token(b) - per_token(a) for a, b in pairs), 5
        ),
        "added_ttft_ms": round(statistics.median(b[0] - a[0] for a, b in pairs), 5),
    }


async def _run(path: str, server: Any, flags: argparse.Namespace, streams: int) -> Record:
    prompts = prompts_of(server.engine.spec.vocab_size, streams, flags.lengths[0])
    if path == "engine":
        started = time.perf_counter()
        times = await asyncio.gather(
            *(_engine_stream(server.engine, ids, flags.lengths[1]) for ids in prompts)
        )
        seconds = time.perf_counter() - started
    else:
        answer = await _ask_client(server.port, prompts, flags.lengths[1])
        times, seconds = answer["times_ms"], answer["seconds"]
    if any(len(run) != flags.lengths[1] for run in times):
        raise RuntimeError(f"{path}: a stream ended early")
    return {
        "kind": "serving",
        "path": path,
        "streams": streams,
        "input_tokens": flags.lengths[0],
        "output_tokens": flags.lengths[1],
        "seconds": round(seconds, 5),
        "tokens_per_s": round(streams * flags.lengths[1] / seconds, 3),
        "times_ms": [[round(ms, 4) for ms in run] for run in times],
    }


async def _engine_stream(engine: Any, ids: tuple[int, ...], output_tokens: int) -> list[float]:
    from gptjet.service.engine.request import SamplingParams, new_request

    params = SamplingParams(max_new_tokens=output_tokens, ignore_eos=True)
    times, last = [], time.perf_counter()
    async for output in engine.submit(new_request(ids, params)):
        now = time.perf_counter()
        for _ in output.token_ids:
            times.append(1000 * (now - last))
            last = now
        if output.error is not None:
            raise output.error
    return times


async def _ask_client(port: int, prompts: list[tuple[int, ...]], output_tokens: int) -> Record:
    """A client in a process of its own: one in this process would share the engine's interpreter.

    It is told what to ask on its standard input, and answers with one line.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "gptjet.service.measure_serving", "--client", str(port)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    question = json.dumps({"prompts": prompts, "output_tokens": output_tokens}).encode()
    try:
        async with asyncio.timeout(_CLIENT_TIMEOUT_S):
            answer, _ = await process.communicate(question)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"the gRPC client ended with {process.returncode}")
    result: Record = json.loads(answer)
    return result


async def _be_client(port: int) -> Record:
    from gptjet.service.client import AsyncClient

    question = json.loads(sys.stdin.read())
    count = question["output_tokens"]

    async with AsyncClient(f"127.0.0.1:{port}", retry=None) as client:
        # The connection is made, and every module loaded, before the clock runs.
        await client.tokenize("x")

        async def stream(ids: list[int]) -> list[float]:
            times, last = [], time.perf_counter()
            async with client.generate_stream(ids, max_new_tokens=count, ignore_eos=True) as chunks:
                async for chunk in chunks:
                    now = time.perf_counter()
                    for _ in chunk.token_ids:
                        times.append(1000 * (now - last))
                        last = now
            return times

        started = time.perf_counter()
        times = await asyncio.gather(*(stream(ids) for ids in question["prompts"]))
        return {"seconds": time.perf_counter() - started, "times_ms": times}


def _lengths(text: str) -> tuple[int, int]:
    input_tokens, output_tokens = text.split(":")
    return int(input_tokens), int(output_tokens)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="what the engine and gRPC add, on random weights")
    parser.add_argument("--geometry", choices=("gpt-j-6b", "tiny"), default="gpt-j-6b")
    parser.add_argument("--weight-type", choices=("float16", "int8", "int4"), default="float16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--lengths", type=_lengths, default=(512, 128), help="input:output")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the records. Exit codes: 0 done, 1 failed, 2 this machine cannot run it."""
    flags = build_parser().parse_args(arguments)
    if flags.client is not None:
        print(json.dumps(asyncio.run(_be_client(flags.client))))
        return 0

    async def run() -> None:
        async for record in measure(flags):
            print(json.dumps(record), flush=True)

    from gptjet.service.engine.errors import BackendLoadError

    try:
        asyncio.run(run())
    except (BackendLoadError, ImportError) as error:
        print(json.dumps({"kind": "error", "message": str(error), "unavailable": True}), flush=True)
        return 2
    except Exception as error:  # noqa: BLE001 - the caller reads JSON lines, not tracebacks
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(json.dumps({"kind": "error", "message": message, "unavailable": False}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
