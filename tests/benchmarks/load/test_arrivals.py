"""Arrival processes: their rate, their spread, and that a seed repeats them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gptjet.benchmarks.load.arrivals import arrival_times_ns, check_arrivals


def gaps_s(process: str, rate: float, seed: int, count: int = 4000) -> np.ndarray:
    times = list(itertools.islice(arrival_times_ns(process, rate, seed), count))
    return np.diff([0, *times]) / 1e9


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["poisson", "constant", "gamma:0.5", "gamma:2"]),
    st.floats(0.05, 2000),
    st.integers(0, 10**6),
)
def test_the_rate_is_the_one_asked_for(process: str, rate: float, seed: int) -> None:
    """Of 4000 gaps with a coefficient of variation of at most 2 the mean has a standard error of
    3.2 %; five of those."""
    gaps = gaps_s(process, rate, seed)
    assert gaps.mean() * rate == pytest.approx(1, abs=0.16)
    assert (gaps >= 0).all()


def test_poisson_gaps_are_exponential() -> None:
    gaps = gaps_s("poisson", 20.0, seed=1)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 20.0)).pvalue > 0.01


@pytest.mark.parametrize("variation", [0.5, 2.0])
def test_gamma_gaps_have_the_variation_asked_for(variation: float) -> None:
    gaps = gaps_s(f"gamma:{variation}", 20.0, seed=1, count=20_000)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_constant_arrivals_do_not_drift() -> None:
    """A third of a second cannot be counted in ns: the 30,000th is at 10,000 s all the same."""
    times = itertools.islice(arrival_times_ns("constant", 3.0, 0), 30_001)
    first, *_, last = times
    assert (first, last) == (0, 10_000 * 10**9)


def test_a_seed_repeats_the_times_and_another_does_not() -> None:
    def first(seed: int) -> list[int]:
        return list(itertools.islice(arrival_times_ns("poisson", 5.0, seed), 20))

    assert first(3) == first(3)
    assert first(3) != first(4)


@pytest.mark.parametrize("process", ["uniform", "gamma", "gamma:0", "gamma:x", "poisson:2", ""])
def test_an_unknown_process_is_refused(process: str) -> None:
    with pytest.raises(ValueError, match="gamma:CV"):
        check_arrivals(process)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_cannot_be_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be above 0"):
        next(arrival_times_ns("poisson", rate, 0))
