"""What a scenario of the fault suite is, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold: what was seen beside what is allowed, both as a person reads it."""

    name: str
    holds: bool
    seen: str
    allowed: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What the scenarios are given.

    scale         share of the full size: 1.0, or less for a quick look
    seed          of everything that is drawn at random
    soak_minutes  length of the soak
    report        prints a line of progress
    """

    scale: float = 1.0
    seed: int = 0
    soak_minutes: float = 20.0
    report: Callable[[str], None] = print

    def count(self, full: int, least: int = 1) -> int:
        """`full` at this scale."""
        return max(least, round(full * self.scale))


@dataclass(slots=True)
class Findings:
    """What a scenario saw: checks that decide it, figures that go into the result file."""

    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, holds: bool, seen: object, allowed: object) -> None:
        """Add a check; every one of them must hold."""
        self.checks.append(Check(name, bool(holds), str(seen), str(allowed)))

    def at_most(self, name: str, seen: float, limit: float, unit: str = "") -> None:
        """Add a check of an upper bound."""
        self.check(name, seen <= limit, f"{seen:g}{unit}", f"at most {limit:g}{unit}")

    def equal(self, name: str, seen: object, expected: object) -> None:
        """Add a check of equality."""
        self.check(name, seen == expected, seen, expected)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A kind of fault. `run` returns its findings and raises only where it could not be made."""

    name: str
    summary: str
    run: Callable[[Plan], Findings]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A scenario that was run. It passed if it could be made and every check holds."""

    name: str
    summary: str
    seconds: float
    checks: tuple[Check, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether everything held; a scenario without a check has shown nothing."""
        return self.error is None and bool(self.checks) and all(c.holds for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the result file."""
        return {**asdict(self), "passed": self.passed}


def run_scenario(scenario: Scenario, plan: Plan) -> Outcome:
    """Run one; an exception becomes its error, so that the others are still run."""
    started = time.monotonic()
    try:
        findings = scenario.run(plan)
    except Exception as error:  # noqa: BLE001 - whatever went wrong is this scenario's outcome
        words = f"{type(error).__name__}: {error}".strip()
        return Outcome(scenario.name, scenario.summary, _since(started), error=words)
    return Outcome(
        scenario.name,
        scenario.summary,
        _since(started),
        tuple(findings.checks),
        findings.figures,
    )


def _since(started: float) -> float:
    return round(time.monotonic() - started, 2)
