"""The figures of a run: latency distributions, rates, goodput, errors; and their limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gptjet.benchmarks.load.coordinator import RunResult
from gptjet.benchmarks.load.histogram import Histogram
from gptjet.benchmarks.load.samples import INTERRUPTED, UNFINISHED, Sample
from gptjet.benchmarks.load.slo import Slo, measure_goodput
from gptjet.benchmarks.load.validity import LATE_MS, Check, check_validity

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)

CLOSED_LOOP_NOTE = (
    "Closed loop: a slot sends again only when its request has ended, so the load falls whenever "
    "the server is slow. The latencies are those of exactly this concurrency. They are not what "
    "users who arrive on their own would see, and the request rate is no capacity: use an open "
    "loop (--rate) for both."
)
OPEN_LOOP_NOTE = (
    "Open loop: latencies count from the time at which a request should have been sent, whether or "
    "not the client or the server was ready for it."
)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of one measure, in ms. A percentile with less than one value beyond it is None."""

    count: int
    mean: float
    minimum: float
    maximum: float
    percentiles: dict[str, float | None]
    histogram_ns: Histogram

    def to_json(self) -> dict[str, Any]:
        """Figures in ms, and the histogram they come from in ns."""
        return {
            "count": self.count,
            "mean_ms": self.mean,
            "min_ms": self.minimum,
            **{f"{name}_ms": value for name, value in self.percentiles.items()},
            "max_ms": self.maximum,
            "histogram_ns": self.histogram_ns.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything that a run says. Rates are a second; see RunResult for the window."""

    mode: str
    window_s: float
    is_partial: bool
    requests: int
    succeeded: int
    statuses: dict[str, int]
    interrupted: int
    late: int
    cut: int
    prompt_tokens: int
    output_tokens: int
    offered_rate: float | None
    sent_rate: float
    succeeded_rate: float
    output_tokens_rate: float
    slo: Slo
    attainment: float
    goodput: float
    latencies: dict[str, Distribution]
    late_ms: Distribution | None
    checks: list[Check]
    notes: list[str]

    @property
    def is_valid(self) -> bool:
        """Whether the client was fit to measure."""
        return all(check.holds for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {
            "is_valid": self.is_valid,
            "slo": asdict(self.slo),
            "latencies": {name: each.to_json() for name, each in self.latencies.items()},
            "late_ms": self.late_ms.to_json() if self.late_ms else None,
            "checks": [
                # A value nobody could measure is nan, which JSON has no word for.
                {**asdict(c), "value": c.value if c.value == c.value else None, "holds": c.holds}
                for c in self.checks
            ],
        }


def summarize(result: RunResult, slo: Slo) -> Summary:
    """The figures of a run; latencies are those of the requests that succeeded."""
    samples = result.samples
    answered = [sample for sample in samples if sample.is_ok]
    window_s = result.window_ns / 1e9
    counted = [sample for sample in samples if sample.status != INTERRUPTED]
    goodput = measure_goodput(samples, slo)
    tokens = sum(
        count for s in samples for when, count in s.arrivals if 0 <= when <= result.window_ns
    )
    is_open = result.spec.mode == "open"
    checks = check_validity(samples, result.workers)

    def rate(count: float) -> float:
        return count / window_s if window_s else 0.0

    return Summary(
        mode=result.spec.mode,
        window_s=window_s,
        is_partial=result.is_partial,
        requests=len(counted),
        succeeded=len(answered),
        statuses=dict(Counter(sample.status for sample in counted).most_common()),
        interrupted=len(samples) - len(counted),
        late=sum(sample.late_ns > LATE_MS * 1e6 for sample in samples),
        cut=sum(sample.was_cut for sample in samples),
        prompt_tokens=sum(sample.prompt_tokens or 0 for sample in answered),
        output_tokens=sum(sample.output_tokens for sample in answered),
        offered_rate=result.spec.workload.rate,
        sent_rate=rate(len(counted)),
        succeeded_rate=rate(sum(sample.ended_ns <= result.window_ns for sample in answered)),
        output_tokens_rate=rate(tokens),
        slo=slo,
        attainment=goodput.attainment,
        goodput=rate(goodput.met),
        latencies=_latencies(answered),
        late_ms=distribution([s.late_ns for s in samples]) if is_open else None,
        checks=checks,
        notes=_notes(result, samples, checks),
    )


def distribution(values_ns: Iterable[int]) -> Distribution | None:
    """None where there is no value."""
    histogram = Histogram()
    histogram.record_all(values_ns)
    if histogram.minimum is None or histogram.maximum is None:
        return None
    count = histogram.count
    return Distribution(
        count=count,
        mean=histogram.mean / 1e6,
        minimum=histogram.minimum / 1e6,
        maximum=histogram.maximum / 1e6,
        percentiles={
            f"p{q:g}": histogram.percentile(q) / 1e6 if is_supported(q, count) else None
            for q in PERCENTILES
        },
        histogram_ns=histogram,
    )


def is_supported(q: float, count: int) -> bool:
    """Whether at least one of `count` values lies beyond the percentile: p99 needs 100 of them."""
    return count * (100 - q) >= 100 * (1 - 1e-9)


def _latencies(answered: Sequence[Sample]) -> dict[str, Distribution]:
    measures: dict[str, Callable[[Sample], Iterable[int | None]]] = {
        "ttft": lambda sample: (sample.ttft_ns,),
        "tpot": lambda sample: (sample.tpot_ns,),
        "itl": lambda sample: sample.itl_ns,
        "e2e": lambda sample: (sample.e2e_ns,),
    }
    found = {
        name: distribution(v for s in answered for v in measure(s) if v is not None)
        for name, measure in measures.items()
    }
    return {name: each for name, each in found.items() if each is not None}


def _notes(result: RunResult, samples: Sequence[Sample], checks: Iterable[Check]) -> list[str]:
    notes = [CLOSED_LOOP_NOTE if result.spec.mode == "closed" else OPEN_LOOP_NOTE]
    if result.is_partial:
        notes.insert(0, "Partial: the run was ended before its time.")
    failed = sum(not s.is_ok and s.status != INTERRUPTED for s in samples)
    if failed:
        notes.append(
            f"{failed} requests failed and are in no latency; the latencies look better for it. "
            "They count against the SLO."
        )
    if any(sample.status == UNFINISHED for sample in samples):
        notes.append(
            f"Some requests were still running {result.spec.drain_s:g} s after the last one was "
            "sent: the server did not keep up, and a longer run would show higher latencies."
        )
    cut = sum(sample.was_cut for sample in samples)
    if cut:
        notes.append(f"{cut} requests were cut to fit the model's context.")
    notes += [f"Not valid: {c.name}: {c.remedy}." for c in checks if not c.holds]
    return notes
