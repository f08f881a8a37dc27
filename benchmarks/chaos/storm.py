"""A thousand streams at once, half of them left at random moments: nothing may stay behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

from gptjet.benchmarks.chaos.scenario import Findings, Plan
from gptjet.benchmarks.chaos.server import ChaosServer
from gptjet.benchmarks.chaos.streams import FINISHED, LEFT
from gptjet.benchmarks.server_process import environment_without_settings
from gptjet.service.client import Client

_STREAMS, _PROCESSES, _TOKENS, _WITHIN_S = 1000, 4, 48, 8.0
_STORMS = 3
_IDLE_S, _STORM_TIMEOUT_S = 10.0, 600.0
_MEMORY_GROWTH = 0.05
_PROBE = tuple(range(10, 30))


def run(plan: Plan) -> Findings:
    """Storms to warm up (allocators and pools grow to their size once), then the counted ones."""
    found = Findings()
    streams = plan.count(_STREAMS, least=_PROCESSES)
    # A KV cache that the first storms fill: what they have not written takes no memory yet.
    flags = (
        f"--max-queue-size={2 * streams}",
        "--max-sequences=64",
        "--kv-cache-tokens=8192",
        "--log-level=warning",
    )
    with ChaosServer(*flags) as server:
        expected = probe(server.target)
        warm_up(server, streams, plan)
        before_mib, before_files = server.memory_mib(), server.open_files()
        ends: Counter[str] = Counter()
        for index in range(_STORMS):
            ends += storm(server.target, streams, plan, seed=plan.seed + index)
            plan.report(f"  storm {index + 1} of {_STORMS}: {dict(ends)} so far")
        held = server.wait_until_idle(_IDLE_S)
        after_mib = server.memory_mib()
        found.figures = {
            "streams": streams,
            "storms": _STORMS,
            "ends": dict(ends),
            "held_after": held,
            "memory_before_mib": round(before_mib, 1),
            "memory_after_mib": round(after_mib, 1),
            "open_files": [before_files, server.open_files()],
        }
        strays = {end: n for end, n in ends.items() if end not in (FINISHED, LEFT)}
        found.equal("streams that ended in another way than asked", strays, {})
        found.equal("all streams accounted for", sum(ends.values()), streams * _STORMS)
        for name, value in held.items():
            found.equal(name, value, 0)
        growth = 100 * (after_mib / before_mib - 1)
        found.at_most("memory after the storms", growth, 100 * _MEMORY_GROWTH, " % more")
        found.equal("the same request, the same tokens", probe(server.target), expected)
        found.equal("exit code after SIGTERM", server.stop(), 0)
    return found


def warm_up(server: ChaosServer, streams: int, plan: Plan) -> None:
    """Storms before the counted ones, until memory has stopped to grow (at most three)."""
    last = server.memory_mib()
    for _ in range(3):
        storm(server.target, streams, plan, seed=plan.seed + 1000)
        server.wait_until_idle(_IDLE_S)
        now = server.memory_mib()
        if now <= last * 1.02:
            return
        last = now


def probe(target: str) -> tuple[int, ...]:
    """The greedy tokens of one fixed request."""
    with Client(target) as client:
        stream = client.generate_stream(_PROBE, max_new_tokens=32, ignore_eos=True)
        return tuple(token for chunk in stream for token in chunk.token_ids)


def storm(target: str, streams: int, plan: Plan, *, seed: int) -> Counter[str]:
    """One storm from several processes at once; how its streams ended."""
    share, rest = divmod(streams, _PROCESSES)
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "gptjet.benchmarks.chaos.streams"),
                *("--target", target, "--streams", str(share + (index < rest))),
                *("--tokens", str(_TOKENS), "--within-s", str(_WITHIN_S * plan.scale)),
                *("--seed", str(seed * _PROCESSES + index)),
                *("--timeout-s", str(_STORM_TIMEOUT_S)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=environment_without_settings(),
        )
        for index in range(_PROCESSES)
    ]
    ends: Counter[str] = Counter()
    try:
        for worker in workers:
            answer, _ = worker.communicate(timeout=_STORM_TIMEOUT_S)
            if worker.returncode:
                raise RuntimeError(f"a load process ended with {worker.returncode}")
            ends.update(json.loads(answer.splitlines()[-1])["ends"])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return ends
