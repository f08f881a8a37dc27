"""What the policy decides, for Prometheus: read when it is asked for, so that it costs no request.

A rule's name comes from the operator's policy file, so labels take no value of a caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Governed(Protocol):
    """Of `gptjet.service.governance`, which this room does not know, what is counted."""

    def decided(self) -> Mapping[tuple[str, str, str], int]:
        """Texts by (direction, rule, action); may be called from any thread."""
        ...

    @property
    def num_unrecorded(self) -> int:
        """Decisions and findings that could not be written."""
        ...

    @property
    def num_pending(self) -> int | None:
        """Items that wait for a reviewer; None where the queue cannot be read."""
        ...


class GovernanceCollector(Collector):
    """The series of one server's policy; there are none where it has no policy."""

    def __init__(self, governed: Governed) -> None:
        self._governed = governed

    def collect(self) -> Iterator[Metric]:
        """See the texts."""
        decisions = CounterMetricFamily(
            "gptjet_governance_decisions",
            "Texts in which a rule of the policy found something, by what became of it: input or "
            "output, and flag, redact or block.",
            labels=("direction", "rule", "action"),
        )
        for labels, count in self._governed.decided().items():
            decisions.add_metric(labels, count)
        yield decisions
        yield CounterMetricFamily(
            "gptjet_governance_unrecorded",
            "Decisions and findings that could not be written to the audit log or the review "
            "queue.",
            self._governed.num_unrecorded,
        )
        pending = GaugeMetricFamily(
            "gptjet_governance_reviews_pending", "Flagged texts that wait for a reviewer."
        )
        if self._governed.num_pending is not None:
            pending.add_metric((), self._governed.num_pending)
        yield pending
