"""Checks the generator's clock against a server of known latency, and writes what it found.

    python -m gptjet.benchmarks.load.check_clock --out benchmarks/results/load-clock.jsonl

The server's mock sleeps a given time in each step: `gptjet serve --backend mock --model
mock:prefill_ms=...,decode_ms=...`. For a machine with nothing else to do. A closed loop of one and
an open loop whose requests do not meet: the medians of TTFT and ITL must be within 5 % of what the
server sleeps. The exit code is 1 where they are not, and the file is written all the same.

A step is longer than its sleep by what the engine, the wire and the machine's timer add: about a
millisecond, whatever the sleep is. The delays are long enough that this is a small part of them,
and short enough to be those of a real model.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptjet.benchmarks.config import LevelName
from gptjet.benchmarks.environment import load_average, record_environment
from gptjet.benchmarks.load.coordinator import RunResult, StopRequest, run_load
from gptjet.benchmarks.load.measures import summarize
from gptjet.benchmarks.load.report import Record, run_records, write_records
from gptjet.benchmarks.load.run_spec import RunSpec
from gptjet.benchmarks.load.slo import Slo
from gptjet.benchmarks.load.workload import WorkloadSpec
from gptjet.benchmarks.server_process import ServeCommand, ServerProcess
from gptjet.service.client import Client

TOLERANCE = 0.05
# Of GPT-J-6B's order: a step at the T4's published 16.5 tokens/s, a prompt of some hundred tokens.
PREFILL_MS, DECODE_MS = 300.0, 60.0

_PROMPT_TOKENS, _OUTPUT_TOKENS = 16, 12
_START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class ClockCheck:
    """One median beside what it must be, and beside what the server's clock says, in ms."""

    mode: str
    measure: str
    expected_ms: float
    measured_ms: float
    server_ms: float

    @property
    def error(self) -> float:
        """Relative to what is expected; positive: measured too long."""
        return self.measured_ms / self.expected_ms - 1

    @property
    def holds(self) -> bool:
        """Whether it is within the tolerance."""
        return abs(self.error) <= TOLERANCE

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "error": self.error, "tolerance": TOLERANCE, "holds": self.holds}


def compare(result: RunResult, prefill_ms: float, decode_ms: float) -> list[ClockCheck]:
    """The medians of a run beside the server's steps: a prefill makes the first token."""
    summary, server = summarize(result, Slo()), server_medians_ms(result)
    medians = {n: each.percentiles["p50"] or 0.0 for n, each in summary.latencies.items()}
    expected = {"ttft": prefill_ms, "itl": decode_ms}
    return [
        ClockCheck(summary.mode, name, ms, medians[name], server[name])
        for name, ms in expected.items()
    ]


def server_medians_ms(result: RunResult) -> dict[str, float]:
    """TTFT and ITL on the server's own clock: what is above the expected there is not ours."""
    answered = [s for s in result.samples if s.is_ok and s.server and s.output_tokens > 1]
    timings = [(s.server or {}, s.output_tokens) for s in answered]
    return {
        "ttft": statistics.median(server["ttft_ms"] for server, _ in timings),
        "itl": statistics.median(server["decode_ms"] / (n - 1) for server, n in timings),
    }


def check(
    target: str, prefill_ms: float, decode_ms: float, requests: int
) -> tuple[list[ClockCheck], list[Record]]:
    """Run both loops against a server of these step times."""
    with Client(target) as client:
        client.wait_until_serving()
        model = client.get_model()
    e2e_ms = prefill_ms + (_OUTPUT_TOKENS - 1) * decode_ms
    work = WorkloadSpec(
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        eos_token_id=model.eos_token_id,
        prompt_tokens=str(_PROMPT_TOKENS),
        output_tokens=str(_OUTPUT_TOKENS),
        requests=requests,
        closed=True,
    )
    open_work = {"closed": False, "arrivals": "constant", "rate": 1000 / (1.6 * e2e_ms)}
    specs = [
        RunSpec(target=target, workload=work, concurrency=1),
        RunSpec(target=target, workload=WorkloadSpec(**{**asdict(work), **open_work})),
    ]
    checks: list[ClockCheck] = []
    records: list[Record] = []
    for spec in specs:
        result = asyncio.run(_run(spec))
        checks += compare(result, prefill_ms, decode_ms)
        records += run_records(result, summarize(result, Slo()), loop=spec.mode)
    return checks, records


async def _run(spec: RunSpec) -> RunResult:
    return await run_load(spec, StopRequest())


def known_server(prefill_ms: float, decode_ms: float) -> ServerProcess:
    """Start a server of the mock whose steps take so long; a context manager."""
    command = ServeCommand(
        model=f"mock:prefill_ms={prefill_ms:g},decode_ms={decode_ms:g}", device="cpu"
    )
    level = LevelName(backend="mock", weight_type="fp32")
    return ServerProcess(command, level, start_timeout_s=_START_TIMEOUT_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, write, print one line a median. Exit codes: 0 all hold, 1 one does not."""
    parser = argparse.ArgumentParser(prog="python -m gptjet.benchmarks.load.check_clock")
    parser.add_argument("--prefill-ms", type=float, default=PREFILL_MS)
    parser.add_argument("--decode-ms", type=float, default=DECODE_MS)
    parser.add_argument("--requests", type=int, default=30, help="of each loop")
    parser.add_argument("--out", type=Path, default=Path("load-clock.jsonl"))
    flags = parser.parse_args(arguments)
    environment = record_environment()
    with known_server(flags.prefill_ms, flags.decode_ms) as server:
        checks, records = check(server.target, flags.prefill_ms, flags.decode_ms, flags.requests)
    verdict = {
        "command": "python -m gptjet.benchmarks.load.check_clock",
        "prefill_ms": flags.prefill_ms,
        "decode_ms": flags.decode_ms,
        "load_after": load_average(),
        "checks": [each.to_json() for each in checks],
        "holds": all(each.holds for each in checks),
    }
    session = ("load_session", {"environment": environment})
    write_records(flags.out, [session, *records, ("load_clock_check", verdict)])
    for each in checks:
        word = "ok" if each.holds else f"MORE THAN {100 * TOLERANCE:g} % OFF"
        sys.stdout.write(
            f"{each.mode:<7} {each.measure:<5} median {each.measured_ms:8.3f} ms, "
            f"expected {each.expected_ms:g} ms, {100 * each.error:+.2f} %  {word} "
            f"(the server's clock: {each.server_ms:.3f} ms)\n"
        )
    return 0 if verdict["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
