"""Callers that behave badly without meaning to: they stop reading, freeze, or are killed."""

from __future__ import annotations

import itertools
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from gptjet.benchmarks.chaos.scenario import Findings, Plan
from gptjet.benchmarks.chaos.server import RUNNING, ChaosServer
from gptjet.benchmarks.server_process import environment_without_settings
from gptjet.service.client import Client

# A step of the mock, so that a good reader's inter-token latency is known.
_DECODE_MS = 5
_MODEL = f"mock:decode_ms={_DECODE_MS},context=2048"
_READER_TOKENS = 300
_START_S = 60.0


def run_slow(plan: Plan) -> Findings:
    """Slow readers beside a good one: they are cut off, it notices nothing, memory stays."""
    found = Findings()
    streams, timeout_s = plan.count(16, least=2), 3.0
    flags = (f"--slow-reader-timeout-s={timeout_s}", "--log-level=warning")
    with ChaosServer(*flags, backend="mock", model=_MODEL) as server:
        alone = good_reader_itl_ms(server.target)
        before_mib = server.memory_mib()
        with _worker("slow_reader", server, streams=streams, tokens=2000) as reader:
            _answer(reader)
            beside = good_reader_itl_ms(server.target)
            peak_mib = server.memory_mib()
            cut_after = _seconds_until(lambda: not server.held()[RUNNING], 60 * timeout_s)
            assert reader.stdin is not None
            reader.stdin.write("\n")
            reader.stdin.flush()
            ends = _answer(reader)["ends"]
        held = server.wait_until_idle(5.0)
        found.figures = {
            "slow_readers": streams,
            "good_reader_itl_p95_ms": {"alone": alone, "beside": beside},
            "memory_mib": {"before": round(before_mib, 1), "with_them": round(peak_mib, 1)},
            "cut_off_after_s": cut_after,
            "ends": sorted(set(ends)),
        }
        found.check("cut off", cut_after is not None, f"{cut_after} s", "at some time")
        named = all("read" in end and not end.startswith(("OK", "INTERNAL")) for end in ends)
        found.check("each was told why", named, sorted(set(ends))[:2], "a status naming it")
        found.equal("held afterwards", sum(held.values()), 0)
        found.at_most("memory that they took", round(peak_mib - before_mib, 1), 64.0, " MiB")
        limit = max(3 * alone, alone + 10)
        found.at_most("95th percentile of the good reader's ITL", beside, limit, " ms")
    return found


def run_frozen(plan: Plan) -> Findings:
    """Callers whose process is stopped (half-open connections): keepalive notices."""
    found = Findings()
    streams = plan.count(20, least=2)
    flags = ("--keepalive-time-s=1", "--keepalive-timeout-s=1", "--log-level=warning")
    # so slow that the streams would run for minutes
    with ChaosServer(*flags, backend="mock", model="mock:decode_ms=100,context=2048") as server:
        with _worker("streams", server, streams=streams, tokens=1500, hold=True) as worker:
            _answer(worker)
            running = server.held()[RUNNING]
            worker.send_signal(signal.SIGSTOP)
            gone_after = _seconds_until(lambda: not server.held()[RUNNING], 30.0)
        held = server.wait_until_idle(1.0)
        found.figures = {"streams": streams, "freed_after_s": gone_after}
        found.equal("streams before", running, streams)
        found.equal("held afterwards", sum(held.values()), 0)
        found.at_most("freed after", 99.0 if gone_after is None else gone_after, 6.0, " s")
    return found


def run_killed(plan: Plan) -> Findings:
    """Callers killed in the middle of their streams, again and again."""
    found = Findings()
    rounds, streams = plan.count(10, least=2), 20
    freed: list[float] = []
    with ChaosServer("--log-level=warning") as server:
        for index in range(rounds):
            # a context full of tokens each: none ends by itself meanwhile
            with _worker("streams", server, streams=streams, tokens=400, hold=True) as worker:
                _answer(worker)
                worker.kill()
                seconds = _seconds_until(lambda: not any(server.held().values()), 30.0)
            freed.append(99.0 if seconds is None else seconds)
            plan.report(f"  killed {index + 1} of {rounds}: freed after {freed[-1]} s")
        held = server.wait_until_idle(1.0)
        found.figures = {"killed": rounds, "streams_each": streams, "freed_after_s": freed}
        for name, value in held.items():
            found.equal(name, value, 0)
        found.at_most("freed after", max(freed), 2.0, " s")
        found.equal("exit code", server.stop(), 0)
    return found


def good_reader_itl_ms(target: str) -> float:
    """95th percentile of the inter-token latency that a caller sees who reads at once."""
    with Client(target) as client:
        stream = client.generate_stream((5, 6), max_new_tokens=_READER_TOKENS, ignore_eos=True)
        times = [time.monotonic() for _ in stream]
    gaps = [1000 * (after - before) for before, after in itertools.pairwise(times)]
    return round(statistics.quantiles(gaps, n=20)[-1], 2)


class _worker:  # noqa: N801 - used as a function
    """A worker process of this package, killed at the end."""

    def __init__(
        self, module: str, server: ChaosServer, *, streams: int, tokens: int, hold: bool = False
    ) -> None:
        with Client(server.target) as client:
            vocab = client.get_model().vocab_size
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", f"gptjet.benchmarks.chaos.{module}"),
                *("--target", server.target),
                *("--streams", str(streams), "--tokens", str(tokens)),
                *(("--hold", "--vocab", str(vocab)) if hold else ()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment_without_settings(),
        )

    def __enter__(self) -> subprocess.Popen[str]:
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a load process ended before it had anything to say")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _seconds_until(condition: Callable[[], bool], timeout_s: float) -> float | None:
    """How long it took to become true; None where it did not within the time."""
    started = time.monotonic()
    while time.monotonic() - started < timeout_s:
        if condition():
            return round(time.monotonic() - started, 2)
        time.sleep(0.05)
    return None
