"""The engine in a process of its own, asked over its standard streams instead of gRPC.

    python -m gptjet.service.offline_worker --backend huggingface --model FOLDER --dtype float32

For the benchmarks, which may not import the engine: other libraries are timed without a network,
and so is ours. What the wire costs is the difference to the same request through the server.

One JSON line on standard input is one run: {"prompt": [ids], "output_tokens": n}, or {"prompts":
[[ids], ...], "output_tokens": n} for streams that run together. One line on standard output answers
it: {"tokens": [ids], "token_ms": [ms since the start, one a token], "e2e_ms", "peak_memory_bytes"},
for several prompts {"streams": [{"tokens", "token_ms"}, ...], "e2e_ms", "peak_memory_bytes"}. With
{"late": {"prompt": [ids], "after_tokens": k}} beside "prompts", another prompt comes once each
stream has k tokens, for one token of its own: {"late": {"added_ms", "ttft_ms"}}. What cannot be run
is answered {"error": text}. The first line of all says {"ready": true} or {"error"}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjet.service.engine.errors import BackendLoadError, EngineError
from gptjet.service.engine.request import FinishReason, SamplingParams, new_request

if TYPE_CHECKING:
    from gptjet.service.engine.engine import Engine


_LOOK_S = 0.01


class RunError(Exception):
    """A run cannot be made; the message is one line."""


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    output_tokens: int,
    late: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Greedy continuations of all prompts together, each of exactly `output_tokens` tokens.

    `late` is a prompt that comes later, and after how many tokens of each: see the module.

    A token counts when the step that made it returns: where the server would hand it to the wire.
    Raises RunError where a prompt is refused or fails; nothing of the run stays in the engine.
    """
    params = _exactly(output_tokens)
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
            if late is not None and _is_due(late, prompts, tokens):
                keys.append(engine.add(new_request(tuple(late["prompt"]), _exactly(1))))
                tokens[keys[-1]], times_ns[keys[-1]] = [], [now_ns]
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
    made = {}
    if late is not None:
        if len(keys) == len(prompts):
            raise RunError(f"the late prompt never came: after {late['after_tokens']} tokens")
        added_ns, first_ns = times_ns[keys.pop()]
        times = {"added_ms": (added_ns - started_ns) / 1e6, "ttft_ms": (first_ns - added_ns) / 1e6}
        made = {"late": times}
    return {
        **made,
        "streams": [
            {
                "tokens": tokens[key],
                "token_ms": [(when - started_ns) / 1e6 for when in times_ns[key]],
            }
            for key in keys
        ],
        "e2e_ms": (ended_ns - started_ns) / 1e6,
        "peak_memory_bytes": max(peak_memory_bytes() or 0, _loading.peak_bytes) or None,
    }


def _is_due(
    late: Mapping[str, Any], prompts: Sequence[object], tokens: Mapping[int, Sequence[int]]
) -> bool:
    """Whether the late prompt is to come now: it is not there, and all others are far enough."""
    least: int = late["after_tokens"]
    return len(tokens) == len(prompts) and min(map(len, tokens.values())) >= least


def _exactly(output_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=output_tokens, min_new_tokens=output_tokens, ignore_eos=True
    )


def answer(engine: Engine, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The line that answers one that was read."""
    is_single = "prompt" in asked
    try:
        prompts = [asked["prompt"]] if is_single else asked["prompts"]
        made = generate(engine, prompts, int(asked["output_tokens"]), asked.get("late"))
    except RunError as error:
        return {"error": " ".join(str(error).split())}
    if is_single:
        (stream,) = made.pop("streams")
        made |= stream
    return made


def peak_memory_bytes(pid: int | str = "self") -> int | None:
    """Most memory a process ever held (Linux: VmHWM); None where the system does not say.

    Not getrusage: its figure begins with that of the process which started this one.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


class _Loading:
    """Watches what loading takes in this process and its children together.

    peak_bytes  the most that this process had held plus the most that its children had, at any
                look while there was one: no less than what they ever held at once
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._done = threading.Event()

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_S):
            children = [peak_memory_bytes(pid) for pid in _children()]
            if any(children):
                together = sum(value or 0 for value in [peak_memory_bytes(), *children])
                self.peak_bytes = max(self.peak_bytes, together)


def _children() -> list[str]:
    """Ids of this process's children, whichever thread started them (Linux)."""
    found: list[str] = []
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += file.read_text(encoding="ascii").split()
    return found


_loading = _Loading()


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
        deterministic=flags.deterministic,
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
    parser.add_argument("--deterministic", action="store_true", help="as `gptjet serve`'s")
    flags = parser.parse_args(arguments)
    with _own_stdout() as channel:

        def say(fields: Mapping[str, Any]) -> None:
            channel.write(json.dumps(fields) + "\n")
            channel.flush()

        try:
            with _loading:
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
