"""Faults inside the engine: steps that raise, compute NaN, run out of memory, hang, or end it."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter

from gptjet.benchmarks.chaos.scenario import Findings, Plan
from gptjet.benchmarks.chaos.server import ChaosServer
from gptjet.service.client import Client, GptjetError

_TOKENS = 40
_HOLD_S = 20.0
_ENGINE_FAILED = 6


def run(plan: Plan) -> Findings:
    """Each fault on a server of its own, with several callers in flight."""
    found = Findings()
    for name, setting, callers in (
        ("a step raises", "fail_at_step=20", 8),
        ("NaN logits", "nan_at_step=20", 8),
        ("out of memory", "oom_above_tokens=64,paged=1,max_prefill_batch_size=8", 8),
    ):
        plan.report(f"  {name}")
        _survived(found, name, setting, callers)
    for name, setting in (
        ("a step hangs", "hang_at_step=20"),
        ("the engine's thread dies", "die_at_step=20"),
        ("every step fails from one on", "fail_from_step=20"),
    ):
        plan.report(f"  {name}")
        _ended(found, name, setting)
    return found


def _survived(found: Findings, name: str, setting: str, callers: int) -> None:
    """A fault that costs the requests it touched, and nobody else anything."""
    model = f"mock:decode_ms=2,{setting}"
    with ChaosServer("--log-level=warning", backend="mock", model=model) as server:
        # one long prompt among short ones, for the fault that only a long one meets
        ends = _call_at_once(server.target, callers, longest=200)
        again = _call_at_once(server.target, callers, longest=8)
        found.figures[name] = {"ends": dict(ends), "after": dict(again)}
        codes = {end.partition(":")[0] for end in ends}
        allowed = {"OK", "INTERNAL", "RESOURCE_EXHAUSTED"}
        found.check(
            f"{name}: statuses",
            codes <= allowed and codes != {"OK"},
            sorted(codes),
            "OK and a fault",
        )
        ids = [match[1] for end in ends if (match := re.search(r"\b([0-9a-f]{12})\b", end))]
        log = server.log_text()
        missing = [each for each in ids if each not in log]
        found.equal(f"{name}: ids that the log does not hold", missing, [])
        if any(end.startswith("INTERNAL") for end in ends):
            found.check(f"{name}: an id is given", bool(ids), len(ids), "one or more")
        found.equal(f"{name}: the next requests", set(again), {"OK"})
        found.equal(f"{name}: held", sum(server.wait_until_idle(5.0).values()), 0)
        found.equal(f"{name}: exit code", server.stop(), 0)


def _ended(found: Findings, name: str, setting: str) -> None:
    """A fault that ends the process: callers hear of it, and so does the supervisor."""
    flags = ("--log-level=warning", "--step-timeout-s=2", "--failure-grace-s=1")
    model = f"mock:decode_ms=2,{setting}"
    server = ChaosServer(*flags, "--max-failed-steps=5", backend="mock", model=model)
    with server:
        started = time.monotonic()
        ends: Counter[str] = Counter()
        # further callers come until it is noticed: failing steps need some to fail
        while server.is_alive() and time.monotonic() - started < _HOLD_S:
            ends += _call_at_once(server.target, 4, longest=8)
        code = server.wait(_HOLD_S)
        took = round(time.monotonic() - started, 1)
        codes = sorted({end.partition(":")[0] for end in ends})
        words = [end[:200] for end, _ in ends.most_common(8)]
        found.figures[name] = {"exit_code": code, "seconds": took, "ends": words}
        found.equal(f"{name}: exit code", code, _ENGINE_FAILED)
        # CANCELLED: what gRPC says of a call that crosses the process's end
        told = ("OK", "INTERNAL", "UNAVAILABLE", "CANCELLED")
        waiting = [each for each in codes if each not in told]
        found.equal(f"{name}: callers left waiting", waiting, [])
        found.check(
            f"{name}: callers were told", set(codes) - {"OK", "CANCELLED"} != set(), codes, told
        )


def _call_at_once(target: str, callers: int, *, longest: int) -> Counter[str]:
    """How so many concurrent requests ended; one of them has a prompt of `longest` tokens."""
    ends: Counter[str] = Counter()
    lock = threading.Lock()

    def call(length: int) -> None:
        end = "OK"
        try:
            with Client(target, retry=None, timeout_s=_HOLD_S) as client:
                stream = client.generate_stream(
                    tuple(i % 200 for i in range(length)), max_new_tokens=_TOKENS, ignore_eos=True
                )
                received = sum(len(chunk.token_ids) for chunk in stream)
            if received != _TOKENS:
                end = f"WRONG_LENGTH: {received}"
        except GptjetError as error:
            end = f"{error.code.name}: {error}"
        with lock:
            ends[end] += 1

    threads = [
        threading.Thread(target=call, args=(longest if index == 0 else 4 + index,))
        for index in range(callers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends
