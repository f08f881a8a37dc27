"""Histograms for the engine thread: what is counted for every token must cost next to nothing."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate


class Tally:
    """Counts of values by upper bound, written by one thread and read by any.

    prometheus_client's Histogram takes two locks a value. This one takes none: a reader sees each
    number as it was before or after a value, and a scrape may miss the value that is being added.
    """

    def __init__(self, bounds: Iterable[float], *, unit: float = 1.0) -> None:
        """`bounds` in the unit of the metric, of which a value is `unit` parts: 1e9 for ns to s."""
        self._names = [repr(float(bound)) for bound in bounds] + ["+Inf"]
        self._bounds = [bound * unit for bound in bounds]
        self._unit = unit
        self._counts = [0] * len(self._names)
        self._sum: float = 0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_all(self, values: Iterable[float]) -> None:
        """Count several values."""
        counts, bounds, total = self._counts, self._bounds, self._sum
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        self._sum = total

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """(upper bound, values up to it) for each bound and "+Inf"; and the sum of the values."""
        cumulated = accumulate(tuple(self._counts))
        return list(zip(self._names, map(float, cumulated), strict=True)), self._sum / self._unit
