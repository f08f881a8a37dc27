"""The histogram against numpy's percentiles of the raw values."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjet.benchmarks.load.histogram import RELATIVE_ERROR, Histogram

values_of_any_size = st.lists(
    st.one_of(st.integers(0, 10_000), st.integers(0, 10**12)), min_size=1, max_size=300
)


@settings(deadline=None)
@given(values_of_any_size, st.floats(0, 100))
def test_a_percentile_is_numpys_within_the_relative_error(values: list[int], q: float) -> None:
    histogram = Histogram()
    histogram.record_all(values)
    expected = float(np.percentile(values, q, method="inverted_cdf"))
    # Where q * n is whole to within a rounding error, either neighbour is right.
    nearby = [
        np.percentile(values, np.clip(q + d, 0, 100), method="inverted_cdf") for d in (-1e-7, 1e-7)
    ]
    found = histogram.percentile(q)
    assert any(abs(found - e) <= RELATIVE_ERROR * e for e in (expected, *map(float, nearby)))


@settings(deadline=None)
@given(values_of_any_size)
def test_mean_minimum_maximum_and_count_are_exact(values: list[int]) -> None:
    histogram = Histogram()
    histogram.record_all(values)
    assert (histogram.count, histogram.total) == (len(values), sum(values))
    assert (histogram.minimum, histogram.maximum) == (min(values), max(values))
    assert histogram.mean == sum(values) / len(values)
    assert (histogram.percentile(0), histogram.percentile(100)) == (min(values), max(values))


@settings(deadline=None)
@given(values_of_any_size, values_of_any_size)
def test_two_histograms_add_up_to_that_of_all_values(left: list[int], right: list[int]) -> None:
    one, other, both = Histogram(), Histogram(), Histogram()
    one.record_all(left)
    other.record_all(right)
    both.record_all(left + right)
    one.add(other)
    assert one.to_json() == both.to_json()


def test_it_survives_the_way_through_a_file() -> None:
    histogram = Histogram()
    histogram.record_all([3, 3, 5_000_000, 123_456_789])
    again = Histogram.from_json(json.loads(json.dumps(histogram.to_json())))
    assert again.percentile(75) == histogram.percentile(75)
    assert (again.count, again.mean, again.maximum) == (4, histogram.mean, 123_456_789)


def test_memory_grows_with_the_spread_and_not_with_the_number() -> None:
    histogram = Histogram()
    for value in range(20_000_000, 20_100_000, 7):
        histogram.record(value)
    assert len(histogram.to_json()["counts"]) < 20


def test_the_empty_histogram_and_negative_values_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing was recorded"):
        Histogram().percentile(50)
    with pytest.raises(ValueError, match="cannot be -1"):
        Histogram().record(-1)
