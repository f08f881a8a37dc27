"""Numbers as text, the same everywhere in a report."""

from __future__ import annotations

import math
from collections.abc import Callable

from gptjet.benchmarks.statistics import Interval


def number(value: float | None) -> str:
    """Three significant digits, no exponent: 0.0123, 1.23, 12.3, 123, 1234."""
    if value is None or math.isnan(value):
        return ""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}"


def percent(value: float | None) -> str:
    """A share as percent with one digit after the point."""
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def with_sd(
    value: float | None, sd: float | None, show: Callable[[float | None], str] = number
) -> str:
    """`16.5 (2.13)`; without an SD only the value."""
    text = show(value)
    return f"{text} ({show(sd)})" if text and sd is not None else text


def interval_text(interval: Interval | None) -> str:
    """`24.1 % [23.0, 25.2]`; one sample has no interval."""
    if interval is None:
        return ""
    if math.isnan(interval.low):
        return f"{percent(interval.estimate)} [one run: no interval]"
    return f"{percent(interval.estimate)} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
