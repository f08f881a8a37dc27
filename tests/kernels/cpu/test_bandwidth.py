"""The read loop that decode is held against. How fast it is, is no test's business."""

from __future__ import annotations

import pytest

from gptjet.kernels.cpu.bandwidth import measure_read


def test_every_repeat_is_a_rate_of_its_own(isa: str) -> None:
    rates = measure_read(2, 5 * 2**20 + 12, repeats=3, rounds=2)
    assert len(set(rates)) == len(rates) == 3
    # Between a tape drive and any processor's cache: seconds, and bytes, are what they are called.
    assert all(1e6 < rate < 1e14 for rate in rates)


@pytest.mark.parametrize("wrong", [{"num_threads": 0}, {"num_bytes": 0}, {"repeats": 0}])
def test_nothing_to_measure_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        measure_read(**{"num_threads": 1, "num_bytes": 64, **wrong})


def test_memory_that_is_not_there_is_an_error() -> None:
    with pytest.raises(MemoryError, match="no memory of"):
        measure_read(1, 2**62)
