"""Was the client fit to measure? Event-loop lag, processor share and late sends, with limits."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gptjet.benchmarks.load.histogram import Histogram
from gptjet.benchmarks.load.samples import Sample

LATE_MS = 5.0
"""A request sent this long after its intended time is late."""
MAX_LATE_SHARE = 0.01
MAX_LAG_P99_MS = 5.0
MAX_CPU_SHARE = 0.8

_PERIOD_S = 0.01
_NS = 1_000_000_000


class LagMonitor:
    """Measures how late a sleeping coroutine is woken, every 10 ms, and the process's CPU time.

    What delays this coroutine delays the reading of tokens alike. asyncio rounds its sleeps up to
    whole ms, so an idle loop shows up to about 1 ms.
    """

    def __init__(
        self,
        clock: Callable[[], int] = time.monotonic_ns,
        cpu_clock: Callable[[], int] = time.process_time_ns,
    ) -> None:
        self.lag_ns = Histogram()
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._started_ns = self._started_cpu_ns = 0

    async def watch(self) -> None:
        """Measure until cancelled."""
        self._started_ns, self._started_cpu_ns = self._clock(), self._cpu_clock()
        period_ns = round(_PERIOD_S * _NS)
        while True:
            before_ns = self._clock()
            await asyncio.sleep(_PERIOD_S)
            self.lag_ns.record(max(0, self._clock() - before_ns - period_ns))

    @property
    def cpu_share(self) -> float:
        """CPU time over wall time since `watch` began: 1.0 is one core, fully used."""
        wall_ns = self._clock() - self._started_ns
        return (self._cpu_clock() - self._started_cpu_ns) / wall_ns if wall_ns else 0.0


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """What one worker process says of itself at the end."""

    lag_ns: Histogram
    cpu_share: float


@dataclass(frozen=True, slots=True)
class Check:
    """One condition of validity. `remedy` says what to do where it does not hold."""

    name: str
    value: float
    limit: float
    unit: str
    remedy: str

    @property
    def holds(self) -> bool:
        """Whether the value is within its limit; a value nobody measured is not."""
        return not math.isnan(self.value) and self.value <= self.limit


def check_validity(samples: Iterable[Sample], workers: Iterable[WorkerHealth]) -> list[Check]:
    """The conditions under which the figures are the server's and not the client's."""
    health = list(workers)
    lag = Histogram()
    for worker in health:
        lag.add(worker.lag_ns)
    late = [sample.late_ns > LATE_MS * 1e6 for sample in samples]
    nan = float("nan")
    more = "use more --processes, or a machine of its own for the client"
    return [
        Check(
            "event-loop lag p99",
            lag.percentile(99) / 1e6 if lag.count else nan,
            MAX_LAG_P99_MS,
            "ms",
            f"tokens were read late; {more}",
        ),
        Check(
            "CPU of the busiest client process",
            max((worker.cpu_share for worker in health), default=nan),
            MAX_CPU_SHARE,
            "cores",
            f"a Python process has one core; {more}",
        ),
        Check(
            f"requests sent more than {LATE_MS:g} ms late",
            sum(late) / len(late) if late else nan,
            MAX_LATE_SHARE,
            "of all",
            f"their latencies count from the intended time and hold the client's delay; {more}",
        ),
    ]
