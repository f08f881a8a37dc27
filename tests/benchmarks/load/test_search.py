"""The search for the highest rate, against servers whose limit is known."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjet.benchmarks.load.search import Probe, RateFound, SearchOptions, find_rate


def search(
    capacity: float, options: SearchOptions, *, valid_below: float = float("inf")
) -> tuple[RateFound, list[float]]:
    """Every probe up to `capacity` attains 1.0, above it 0.5."""
    tried: list[float] = []

    async def probe(rate: float, number: int) -> Probe:
        tried.append(rate)
        return Probe(rate, 1.0 if rate <= capacity else 0.5, 100, rate <= valid_below)

    return asyncio.run(find_rate(probe, options)), tried


@settings(deadline=None)
@given(st.floats(0.02, 5000), st.floats(0.02, 5000))
def test_the_rate_found_holds_and_is_within_the_tolerance(capacity: float, start: float) -> None:
    found, tried = search(capacity, SearchOptions(start_rate=start, tolerance=0.05))
    assert found.limited_by == "server"
    assert found.rate is not None
    assert found.failed_rate is not None
    assert found.rate <= capacity < found.failed_rate <= 1.05 * found.rate * (1 + 1e-12)
    assert len(set(tried)) <= 2 + 18 + 6


def test_a_rate_is_decided_by_most_of_its_probes() -> None:
    """At 1/s one probe of three is disturbed, at 2/s two are: 1 holds, 2 does not."""
    outcomes = {1.0: [0.1, 1.0, 1.0], 2.0: [1.0, 0.1, 0.1]}

    async def probe(rate: float, number: int) -> Probe:
        return Probe(rate, outcomes[rate][number], 100, True)

    found = asyncio.run(find_rate(probe, SearchOptions(tolerance=1.0)))
    assert (found.rate, found.failed_rate) == (1.0, 2.0)
    assert [len(verdict.probes) for verdict in found.verdicts] == [3, 3]


def test_probes_that_agree_are_not_repeated_for_nothing() -> None:
    _, tried = search(1.0, SearchOptions(probes=5, tolerance=1.0))
    assert tried == [1.0] * 3 + [2.0] * 3


def test_a_server_that_meets_it_at_every_rate_is_reported_as_the_bound() -> None:
    found, _ = search(10**9, SearchOptions(max_rate=50))
    assert (found.rate, found.failed_rate, found.limited_by) == (50, None, "bound")


def test_a_server_that_never_meets_it_has_no_rate() -> None:
    found, tried = search(0.0, SearchOptions(min_rate=0.1))
    assert (found.rate, found.failed_rate, found.limited_by) == (None, 0.1, "server")
    assert min(tried) == 0.1


def test_a_client_that_is_the_bottleneck_is_not_called_the_servers_limit() -> None:
    found, _ = search(100.0, SearchOptions(start_rate=16), valid_below=90)
    assert (found.rate, found.failed_rate, found.limited_by) == (64, 128, "client")


@pytest.mark.parametrize("ended_at", [1, 4])
def test_a_stopped_search_keeps_what_it_knows(ended_at: int) -> None:
    made = 0

    async def probe(rate: float, number: int) -> Probe | None:
        nonlocal made
        made += 1
        return None if made == ended_at else Probe(rate, 1.0, 100, True)

    found = asyncio.run(find_rate(probe, SearchOptions()))
    assert found.limited_by == "stopped"
    assert found.rate == (None if ended_at == 1 else 1.0)
