"""A histogram of latencies with a bounded relative error, whatever their range.

The buckets are those of HdrHistogram (Gil Tene): a value keeps its leading bits, so buckets are
linear within a power of two and the powers of two cover any range. Recording costs one dictionary
entry, memory grows with the spread of the values and not with their number, and two histograms add.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

_BITS = 11

RELATIVE_ERROR = 2.0**-_BITS
"""A recorded value and the middle of its bucket differ by at most this share of the value."""


class Histogram:
    """Counts of whole numbers of 0 or more: latencies in ns."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # by the bucket's lowest value
        self.count = 0
        self.total = 0
        self.minimum: int | None = None
        self.maximum: int | None = None

    def record(self, value: int, count: int = 1) -> None:
        """Count a value. Raises ValueError for one below 0."""
        if value < 0:
            raise ValueError(f"a latency cannot be {value}")
        lowest = value >> _shift(value) << _shift(value)
        self._counts[lowest] = self._counts.get(lowest, 0) + count
        self.count += count
        self.total += value * count
        self.minimum = value if self.minimum is None else min(self.minimum, value)
        self.maximum = value if self.maximum is None else max(self.maximum, value)

    def record_all(self, values: Iterable[int]) -> None:
        """Count each of them."""
        for value in values:
            self.record(value)

    def add(self, other: Histogram) -> None:
        """Count everything that `other` has counted."""
        for lowest, count in other._counts.items():
            self._counts[lowest] = self._counts.get(lowest, 0) + count
        self.count += other.count
        self.total += other.total
        if other.minimum is not None and other.maximum is not None:
            lowest, highest = other.minimum, other.maximum
            self.minimum = lowest if self.minimum is None else min(self.minimum, lowest)
            self.maximum = highest if self.maximum is None else max(self.maximum, highest)

    @property
    def mean(self) -> float:
        """Exact, not from buckets. Raises ValueError where nothing was recorded."""
        return self.total / self._some()

    def percentile(self, q: float) -> float:
        """The smallest value that at least q % of the values do not exceed (inverted CDF).

        Right to RELATIVE_ERROR; exact at both ends. Raises ValueError where nothing was recorded.
        """
        if not 0 <= q <= 100:
            raise ValueError(f"a percentile is 0 to 100, got {q:g}")
        # The product of 99.9 and 1000 is a little above its true value: a rank must not move by it.
        rank = max(1, math.ceil(q * self._some() / 100 - 1e-9))
        assert self.minimum is not None, "something was recorded"
        assert self.maximum is not None, "something was recorded"
        if rank == 1:
            return self.minimum
        if rank == self.count:
            return self.maximum
        seen = 0
        for lowest in sorted(self._counts):
            seen += self._counts[lowest]
            if seen >= rank:
                middle = lowest + ((1 << _shift(lowest)) - 1) / 2
                return min(max(middle, self.minimum), self.maximum)
        raise AssertionError("ranks do not exceed the count")

    def to_json(self) -> dict[str, Any]:
        """Everything, so that files of several machines can be added up."""
        return {
            "significant_bits": _BITS,
            "total": self.total,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "counts": sorted(self._counts.items()),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The histogram that `to_json` wrote. Raises ValueError for other buckets."""
        if fields["significant_bits"] != _BITS:
            raise ValueError(f"buckets of {fields['significant_bits']} bits cannot be read")
        made = cls()
        made._counts = {int(lowest): int(count) for lowest, count in fields["counts"]}
        made.count, made.total = sum(made._counts.values()), int(fields["total"])
        made.minimum, made.maximum = fields["minimum"], fields["maximum"]
        return made

    def _some(self) -> int:
        if not self.count:
            raise ValueError("nothing was recorded")
        return self.count


def _shift(value: int) -> int:
    """How many low bits the value's bucket does not tell apart."""
    return max(0, value.bit_length() - _BITS)
