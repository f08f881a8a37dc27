"""The engine in a process of its own, asked over its standard streams instead of gRPC.

    python -m gptjet.service.offline_worker --backend huggingface --model FOLDER --dtype float32

For the benchmarks, which may not import the engine: other libraries are timed without a network,
and so is ours. What the wire costs is the difference to the same request through the server.

One JSON line on standard input is one run: {"prompt": [ids], "output_tokens": n}, or {"prompts":
[[ids], ...], "output_tokens": n} for streams that run together. One line on standard output answers
it: {"tokens": [ids], "token_ms": [ms since the start, one a token], "e2e_ms", "peak_memory_bytes"},
for several prompts {"streams": [{"tokens", "token_ms"}, ...], "e2e_ms", "peak_memory_bytes"}. What
cannot be run is answered {"error": text}. The first line of all says {"ready": true} or {"error"}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjet.service.engine.errors import BackendLoadError, EngineError
from gptjet.service.engine.request import FinishReason, SamplingParams, new_request

if TYPE_CHECKING:
    from gptjet.service.engine.engine import Engine


class RunError(Exception):
    """A run cannot be made; the message is one line."""


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], output_tokens: int
) -> dict[str, Any]:
    """Greedy continuations of all prompts together, each of exactly `output_tokens` tokens.

    A token counts when the step that made it returns: where the server would hand it to the wire.
    Raises RunError where a prompt is refused or fails; nothing of the run stays in the engine.
    """
    params = SamplingParams(
        max_new_tokens=output_tokens, min_new_tokens=output_tokens, ignore_eos=True
    )
    started_ns = time.perf_counter_ns()
    keys: list[int] = []
    try:
        for prompt in prompts:
            keys.append(engine.add(new_request(tuple(prompt), params)))
        tokens: dict[int, list[int]] = {key: [] for key in keys}
        times_ns: dict[int, list[int]] = {key: [] for key in keys}
        while engine.has_work:
            outputs = engine.step()
            now_ns = time.perf_counter_ns()
            for key, output in outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise RunError(str(output.error))
                tokens[key] += output.token_ids
                times_ns[key] += [now_ns] * len(output.token_ids)
    except EngineError as error:
        raise RunError(str(error)) from error
    finally:
        for key in keys:
            engine.cancel(key)
    ended_ns = time.perf_counter_ns()
    return {
        "streams": [
            {
                "tokens": tokens[key],
                "token_ms": [(when - started_ns) / 1e6 for when in times_ns[key]],
            }
            for key in keys
        ],
        "e2e_ms": (ended_ns - started_ns) / 1e6,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def answer(engine: Engine, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The line that answers one that was read."""
    is_single = "prompt" in asked
    try:
        prompts = [asked["prompt"]] if is_single else asked["prompts"]
        made = generate(engine, prompts, int(asked["output_tokens"]))
    except RunError as error:
        return {"error": " ".join(str(error).split())}
    if is_single:
        (stream,) = made.pop("streams")
        made |= stream
    return made


def peak_memory_bytes() -> int | None:
    """Most memory this process ever held (Linux: VmHWM); None where the system does not say.

    Not getrusage: its figure begins with that of the process which started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def load_engine(flags: argparse.Namespace) -> Engine:
    """An engine that has made its first, slow steps. Raises BackendLoadError."""
    from gptjet.service.backends.factory import load_backend
    from gptjet.service.engine.config import EngineConfig
    from gptjet.service.engine.engine import Engine

    if flags.threads is not None:
        import torch

        # transformers' threads; the fused backend's are `cpu_threads`.
        torch.set_num_threads(flags.threads)
    loaded = load_backend(
        flags.backend,
        flags.model,
        device=flags.device,
        dtype=flags.dtype,
        max_sequences=flags.max_sequences,
        kv_cache_tokens=flags.kv_cache_tokens,
        kv_cache_dtype=flags.kv_cache_dtype,
        progress=False,
        cpu_threads=flags.threads,
    )
    loaded.backend.warm_up()
    return Engine(loaded.backend, loaded.tokenizer, EngineConfig(max_sequences=flags.max_sequences))


@contextlib.contextmanager
def _own_stdout() -> Iterator[Any]:
    """The protocol's own channel: what a library prints goes to standard error instead."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        yield channel


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer until the input ends. Exit codes: 0 done, 1 the model cannot be loaded."""
    parser = argparse.ArgumentParser(prog="python -m gptjet.service.offline_worker")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--model", required=True, help="a checkpoint folder, or 'embedded'")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="float32, int8, int4, as `gptjet serve`'s")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--max-sequences", type=int, default=16)
    parser.add_argument("--kv-cache-tokens", type=int, default=None)
    parser.add_argument("--kv-cache-dtype", default="auto", help="float16, float32, int8")
    flags = parser.parse_args(arguments)
    with _own_stdout() as channel:

        def say(fields: Mapping[str, Any]) -> None:
            channel.write(json.dumps(fields) + "\n")
            channel.flush()

        try:
            engine = load_engine(flags)
        except BackendLoadError as error:
            say({"error": " ".join(str(error).split())})
            return 1
        say({"ready": True, "num_parameters": engine.spec.num_parameters})
        try:
            for line in sys.stdin:
                say(answer(engine, json.loads(line)))
        finally:
            engine.backend.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
