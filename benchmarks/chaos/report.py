"""The fault suite's result as a table, and as the file that it is kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from gptjet.benchmarks.chaos.scenario import Outcome, Plan
from gptjet.benchmarks.environment import without_paths

if TYPE_CHECKING:
    from rich.console import Console


def make_result(
    outcomes: Sequence[Outcome], plan: Plan, command: str, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """What goes into the result file."""
    return {
        "schema": 1,
        "kind": "chaos",
        "command": command,
        "scale": plan.scale,
        "seed": plan.seed,
        "environment": dict(environment),
        "passed": all(outcome.passed for outcome in outcomes),
        "scenarios": [outcome.to_json() for outcome in outcomes],
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(without_paths(json.dumps(result, indent=1)) + "\n", encoding="utf-8")
    partial.replace(path)


def print_outcome(console: Console, outcome: Outcome) -> None:
    """A scenario's checks, once it has ended."""
    word = "[green]passed[/]" if outcome.passed else "[red]FAILED[/]"
    console.print(f"{word} {outcome.name} in {outcome.seconds:g} s: {escape(outcome.summary)}")
    if outcome.error:
        console.print(f"  could not be made: {escape(outcome.error)}", style="red")
    for check in outcome.checks:
        if not check.holds:
            words = f"  {check.name}: {check.seen}, allowed: {check.allowed}"
            console.print(escape(words), style="red")


def print_table(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Every check of every scenario: what was seen, what is allowed."""
    table = Table("scenario", "check", "seen", "allowed", "")
    for outcome in outcomes:
        for check in outcome.checks:
            table.add_row(
                outcome.name,
                escape(check.name),
                escape(check.seen[:60]),
                escape(check.allowed[:60]),
                "ok" if check.holds else "[red]NO[/]",
            )
        if outcome.error:
            table.add_row(outcome.name, "could not be made", escape(outcome.error[:60]), "", "NO")
    console.print(table)
