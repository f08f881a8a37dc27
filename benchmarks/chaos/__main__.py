"""`make chaos`: run the fault suite and write its figures.

python -m gptjet.benchmarks.chaos --out benchmarks/results/chaos.json
python -m gptjet.benchmarks.chaos --quick --only storm --only hostile
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from gptjet.benchmarks.chaos import (
    access,
    clients,
    clock,
    disk,
    faults,
    handover,
    hostile,
    soak,
    storm,
)
from gptjet.benchmarks.chaos.report import make_result, print_outcome, print_table, write_result
from gptjet.benchmarks.chaos.scenario import Plan, Scenario, run_scenario
from gptjet.benchmarks.environment import record_environment

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130

SCENARIOS = (
    Scenario(
        "storm",
        "1,000 concurrent streams, half of them left at random moments: nothing stays behind",
        storm.run,
    ),
    Scenario(
        "hostile",
        "10,000 hostile requests of two fuzzers and bytes that are not HTTP/2: each a clear status",
        hostile.run,
    ),
    Scenario(
        "slow-readers", "callers that stop reading: cut off, nobody else notices", clients.run_slow
    ),
    Scenario("half-open", "callers that freeze with their streams open: freed", clients.run_frozen),
    Scenario(
        "killed", "callers killed (SIGKILL) in the middle of their streams", clients.run_killed
    ),
    Scenario("engine-faults", "steps that raise, hang, compute NaN, lack memory", faults.run),
    Scenario("broken-log", "logs on a full or read-only disk, or that nobody reads", disk.run),
    Scenario("clock-jumps", "the wall clock jumps by hours and years during streams", clock.run),
    Scenario("handover", "a new process takes over the port again and again", handover.run),
    Scenario("access", "every method without credentials and with bad ones", access.run),
    Scenario("soak", "20 minutes at 80 % load: memory flat, latency steady", soak.run),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all held, 1 something did not, 2 it cannot be run as asked, 130 interrupted."""
    names = [scenario.name for scenario in SCENARIOS]
    flags = _parser(names).parse_args(arguments)
    if flags.list:
        for scenario in SCENARIOS:
            sys.stdout.write(f"{scenario.name:<14} {scenario.summary}\n")
        return OK
    console = Console()
    plan = Plan(
        scale=0.05 if flags.quick else 1.0,
        seed=flags.seed,
        soak_minutes=flags.soak_minutes or (1.0 if flags.quick else 20.0),
        report=lambda line: console.print(line, markup=False, highlight=False),
    )
    chosen = [s for s in SCENARIOS if not flags.only or s.name in flags.only]
    chosen = [s for s in chosen if s.name not in flags.skip]
    environment = record_environment()
    command = "chaos " + " ".join(sys.argv[1:] if arguments is None else arguments)
    outcomes = []
    try:
        for number, scenario in enumerate(chosen, start=1):
            console.print(f"[{number}/{len(chosen)}] {scenario.name}", markup=False)
            outcomes.append(run_scenario(scenario, plan))
            print_outcome(console, outcomes[-1])
            # after each: what was found stays found, whatever comes
            write_result(flags.out, make_result(outcomes, plan, command, environment))
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; {flags.out} holds what was run\n")
        return INTERRUPTED
    print_table(console, outcomes)
    console.print(f"written to {flags.out.name}")
    return OK if outcomes and all(outcome.passed for outcome in outcomes) else FAILURE


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gptjet.benchmarks.chaos",
        description="Make faults happen on real servers, load coming from other processes, and "
        "check what became of them.",
    )
    parser.add_argument(
        "--only", action="append", default=[], choices=names, help="run this one; repeatable"
    )
    parser.add_argument(
        "--skip", action="append", default=[], choices=names, help="leave this one out; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="list the scenarios and end")
    parser.add_argument(
        "--quick", action="store_true", help="a twentieth of the requests and a soak of a minute"
    )
    parser.add_argument("--soak-minutes", type=float, help="length of the soak (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random")
    parser.add_argument("--out", type=Path, default=default_result_file(), help="result file")
    return parser


def default_result_file() -> Path:
    """In benchmarks/results/, by its day."""
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    return Path("benchmarks") / "results" / f"{day}-chaos.json"


if __name__ == "__main__":
    sys.exit(main())
