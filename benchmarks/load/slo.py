"""Service-level objectives, and goodput: what is served within them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gptjet.benchmarks.load.samples import INTERRUPTED, Sample


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in ms that a request must keep, all of them; None: no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it asks for nothing but an answer."""
        return self.ttft_ms is None and self.tpot_ms is None and self.e2e_ms is None

    def is_met_by(self, sample: Sample) -> bool:
        """A failed request meets none; one token has no TPOT, so it cannot miss that limit."""
        if not sample.is_ok:
            return False
        pairs = (
            (self.ttft_ms, sample.ttft_ns),
            (self.tpot_ms, sample.tpot_ns),
            (self.e2e_ms, sample.e2e_ns),
        )
        return all(limit is None or value is None or value <= limit * 1e6 for limit, value in pairs)

    def __str__(self) -> str:
        named = (("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms), ("E2E", self.e2e_ms))
        limits = [f"{name} <= {limit:g} ms" for name, limit in named if limit is not None]
        return ", ".join(limits) or "an answer"


@dataclass(frozen=True, slots=True)
class Goodput:
    """How many of `counted` requests met the SLO. Interrupted ones are not counted at all."""

    counted: int
    met: int

    @property
    def attainment(self) -> float:
        """The share that met it; 0 where nothing was counted."""
        return self.met / self.counted if self.counted else 0.0


def measure_goodput(samples: Iterable[Sample], slo: Slo) -> Goodput:
    """Failed, refused and unfinished requests count as not meeting it."""
    counted = [sample for sample in samples if sample.status != INTERRUPTED]
    return Goodput(len(counted), sum(slo.is_met_by(sample) for sample in counted))
