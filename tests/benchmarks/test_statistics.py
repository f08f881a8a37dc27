"""Every statistic of the report against scipy's or a value calculated by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gptjet.benchmarks.statistics import (
    latency_reduction,
    latency_reduction_interval,
    mean_ratio_interval,
    percentile,
    standard_deviation,
    summarize,
)

SAMPLES = np.random.default_rng(7).gamma(9.0, 12.0, size=41)
OTHER = np.random.default_rng(8).gamma(9.0, 9.0, size=37)


def test_summary_agrees_with_scipy() -> None:
    found, expected = summarize(SAMPLES), stats.describe(SAMPLES, ddof=1)
    assert found.n == expected.nobs
    assert found.mean == pytest.approx(expected.mean)
    assert found.sd == pytest.approx(math.sqrt(expected.variance))
    assert (found.minimum, found.maximum) == pytest.approx(expected.minmax)


@pytest.mark.parametrize("q", [0, 5, 50, 95, 99, 100])
def test_percentiles_agree_with_scipy(q: float) -> None:
    assert percentile(SAMPLES, q) == pytest.approx(stats.scoreatpercentile(SAMPLES, q))


def test_a_percentile_by_hand() -> None:
    """Of 1, 2, 3, 4 the 50th lies half way between 2 and 3, the 95th at 1 + 0.95 x 3."""
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([4, 1, 3, 2], 95) == pytest.approx(3.85)


def test_one_sample_has_no_spread_and_none_no_statistics() -> None:
    assert standard_deviation([3.0]) == 0.0
    with pytest.raises(ValueError, match="at least one sample"):
        summarize([])


def test_reduction_by_hand() -> None:
    assert latency_reduction([100, 300], [150, 150]) == pytest.approx(0.25)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bootstrap_interval_agrees_with_scipy(confidence: float) -> None:
    """Two Monte Carlo estimates of the same ends: within a twentieth of the interval's width."""
    found = latency_reduction_interval(SAMPLES, OTHER, confidence=confidence)
    expected = stats.bootstrap(
        (SAMPLES, OTHER),
        lambda base, other, axis: 1 - other.mean(axis=axis) / base.mean(axis=axis),
        n_resamples=10_000,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    tolerance = 0.05 * (expected.high - expected.low)
    assert found.estimate == pytest.approx(1 - OTHER.mean() / SAMPLES.mean())
    assert found.low == pytest.approx(expected.low, abs=tolerance)
    assert found.high == pytest.approx(expected.high, abs=tolerance)


def test_interval_of_the_mean_over_cells_is_narrower_than_a_cell() -> None:
    """Four cells of equal spread: the standard error, so the width, halves."""
    one = latency_reduction_interval(SAMPLES, OTHER)
    four = mean_ratio_interval([(SAMPLES, OTHER)] * 4)
    assert four.estimate == pytest.approx(one.estimate)
    ratio = (four.high - four.low) / (one.high - one.low)
    assert ratio == pytest.approx(0.5, abs=0.05)


def test_the_same_samples_give_the_same_interval() -> None:
    assert latency_reduction_interval(SAMPLES, OTHER) == latency_reduction_interval(SAMPLES, OTHER)


def test_one_run_has_no_interval() -> None:
    found = latency_reduction_interval([2.0], [1.0])
    assert found.estimate == 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)
