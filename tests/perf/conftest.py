"""Micro-benchmarks of the engine, run by `make bench` alone: `make test` collects no bench_*.py.

They stand among the tests because the benchmarks room may not import the engine. Each calls its
parity check first: where that fails, pytest-benchmark has nothing to report.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


class _NodeId:
    """Reads as the item's nodeid, and can be set like any attribute, which xdist does."""

    def __get__(self, item: pytest.Item | None, _owner: type) -> object:
        return self if item is None else item.nodeid


# pytest-benchmark 5.2 reads a field that pytest 9.2 no longer has; 5.3 would replace the py-cpuinfo
# that DeepSpeed needs.
if not hasattr(pytest.Function, "_nodeid"):
    pytest.Function._nodeid = _NodeId()  # type: ignore[attr-defined]


@pytest.fixture
def bench(benchmark: Any) -> Callable[..., Any]:
    """`bench(work, check, bytes_moved=…)`: `check()` must pass before `work` is timed.

    bytes_moved    of one call: reported as GB/s, and as a share of the bandwidth that is given
    """

    def run(
        work: Callable[[], object],
        check: Callable[[], None],
        *,
        bytes_moved: float | None = None,
        copy_gb_s: float | None = None,
        read_gb_s: float | None = None,
    ) -> None:
        check()
        benchmark(work)
        if bytes_moved is not None and benchmark.stats is not None:
            gb_s = bytes_moved / benchmark.stats.stats.median / 1e9
            benchmark.extra_info["gb_s"] = round(gb_s, 3)
            for name, measured in (("copy", copy_gb_s), ("read", read_gb_s)):
                if measured is not None:
                    benchmark.extra_info[f"share_of_{name}_bandwidth"] = round(gb_s / measured, 4)

    return run


@pytest.fixture(scope="session")
def bandwidth() -> dict[str, Any]:
    """What gptjet.benchmarks.bandwidth measures, in a process of its own."""
    from gptjet.benchmarks.bandwidth import measure_in_subprocess

    return measure_in_subprocess("cpu")


@pytest.fixture(scope="session")
def copy_gb_s(bandwidth: dict[str, Any]) -> float:
    """Bytes read plus written a second of a copy."""
    return float(bandwidth["copy_gb_s"])


@pytest.fixture(scope="session")
def read_gb_s(bandwidth: dict[str, Any]) -> float:
    """Bytes read a second by a matrix-vector product, the shape of a decode step."""
    return float(bandwidth["read_gb_s"])
