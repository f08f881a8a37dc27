"""Worker: callers that stream one request after the other until they are told to stop.

    python -m gptjet.benchmarks.chaos.caller --target HOST:PORT --callers 4

Each keeps its connection, as a service that calls another does. A line on the standard input ends
it; then one JSON line says how many requests ended in which way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

from gptjet.service.client import AsyncClient, GptjetError

_TOKENS = 20


async def call_until(target: str, callers: int, stop: asyncio.Event) -> Counter[str]:
    """How the requests of so many callers ended."""
    ends: Counter[str] = Counter()

    async def one_caller() -> None:
        async with AsyncClient(target) as client:
            while not stop.is_set():
                try:
                    stream = client.generate_stream(
                        (1, 2, 3), max_new_tokens=_TOKENS, ignore_eos=True
                    )
                    async with stream:
                        received = sum([len(chunk.token_ids) async for chunk in stream])
                    ends["OK" if received == _TOKENS else "WRONG_LENGTH"] += 1
                except GptjetError as error:
                    ends[f"{error.code.name}: {error}"[:120]] += 1

    await asyncio.gather(*(one_caller() for _ in range(callers)))
    return ends


async def _run(target: str, callers: int) -> Counter[str]:
    stop = asyncio.Event()
    calling = asyncio.create_task(call_until(target, callers, stop))
    await asyncio.to_thread(sys.stdin.readline)
    stop.set()
    return await calling


def read_counts(process: subprocess.Popen[str]) -> Counter[str]:
    """Tell a caller to end, and return how its requests ended."""
    answer, _ = process.communicate("\n", timeout=60)
    return Counter(json.loads(answer.splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m gptjet.benchmarks.chaos.caller")
    parser.add_argument("--target", required=True)
    parser.add_argument("--callers", type=int, default=4)
    flags = parser.parse_args(arguments)
    print(json.dumps(asyncio.run(_run(flags.target, flags.callers))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
