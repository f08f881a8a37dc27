"""Statistics of latency samples. Checked against scipy in tests/benchmarks/test_statistics.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = Sequence[float] | NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one cell's samples, in their unit. `sd` is the sample's (n - 1); 0 for one sample."""

    n: int
    mean: float
    sd: float
    minimum: float
    median: float
    p95: float
    p99: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the two ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def summarize(samples: Samples) -> Summary:
    """Raises ValueError where there is nothing to summarise."""
    values = _array(samples)
    return Summary(
        n=values.size,
        mean=float(values.mean()),
        sd=standard_deviation(values),
        minimum=float(values.min()),
        median=percentile(values, 50),
        p95=percentile(values, 95),
        p99=percentile(values, 99),
        maximum=float(values.max()),
    )


def standard_deviation(samples: Samples) -> float:
    """Of the sample (n - 1); 0.0 for one value, which has no spread to speak of."""
    values = _array(samples)
    return float(values.std(ddof=1)) if values.size > 1 else 0.0


def percentile(samples: Samples, q: float) -> float:
    """Linear between the order statistics (numpy's and scipy's default); q in 0 to 100."""
    return float(np.percentile(_array(samples), q))


def latency_reduction(baseline: Samples, treatment: Samples) -> float:
    """1 - mean(treatment) / mean(baseline): 0.24 is "24 % less time"."""
    return float(1 - _array(treatment).mean() / _array(baseline).mean())


def latency_reduction_interval(
    baseline: Samples,
    treatment: Samples,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of `latency_reduction` (Efron and Tibshirani, 1993, chapter 13).

    The two samples are resampled independently, which does not use that run i of both had the same
    prompt: the interval is wider than a paired one, never narrower. One sample on either side has
    no interval: its ends are nan.
    """
    return mean_ratio_interval(
        [(baseline, treatment)], confidence=confidence, resamples=resamples, seed=seed
    )


def mean_ratio_interval(
    pairs: Sequence[tuple[Samples, Samples]],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The same for the mean reduction over several cells, each resampled alone.

    The cells are the design's fixed levels, so they are not resampled themselves.
    """
    if not pairs:
        raise ValueError("no cells to compare")
    estimate = float(np.mean([latency_reduction(*pair) for pair in pairs]))
    if any(len(side) < 2 for pair in pairs for side in pair):
        return Interval(estimate, float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for baseline, treatment in pairs:
        base = _resampled_means(_array(baseline), resamples, generator)
        treated = _resampled_means(_array(treatment), resamples, generator)
        total += 1 - treated / base
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(total / len(pairs), [tail, 100 - tail])
    return Interval(estimate, float(low), float(high))


def _resampled_means(
    values: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    chosen = generator.integers(0, values.size, size=(resamples, values.size))
    means: NDArray[np.float64] = values[chosen].mean(axis=1)
    return means


def _array(samples: Samples) -> NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError("statistics need at least one sample")
    return values
