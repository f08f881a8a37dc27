"""The highest request rate that meets an SLO, by bisection over probes at fixed rates."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

LIMITED_BY_SERVER = "server"
LIMITED_BY_CLIENT = "client"
LIMITED_BY_BOUND = "bound"
LIMITED_BY_STOP = "stopped"


@dataclass(frozen=True, slots=True)
class Probe:
    """One run at one rate. `is_valid`: the client was fit to measure it."""

    rate: float
    attainment: float
    requests: int
    is_valid: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the probes of one rate say together."""

    rate: float
    holds: bool
    probes: tuple[Probe, ...]


@dataclass(frozen=True, slots=True)
class RateFound:
    """The result. `rate` held; `failed_rate` is the lowest that did not. None: there was none.

    limited_by  server: the SLO is missed above it. client: this client cannot send faster and stay
                valid. bound: --max-rate held. stopped: a person ended the search.
    """

    rate: float | None
    failed_rate: float | None
    limited_by: str
    attainment: float
    verdicts: list[Verdict] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search.

    attainment  share of the requests that must meet the SLO
    probes      runs at one rate; most of them decide, so that one disturbance does not
    tolerance   stop when the lowest rate that failed is within this share of the highest that held
    start_rate  the first rate tried, in requests a second
    """

    attainment: float = 0.95
    probes: int = 3
    tolerance: float = 0.05
    start_rate: float = 1.0
    min_rate: float = 0.01
    max_rate: float = 10_000.0


RunProbe = Callable[[float, int], Awaitable[Probe | None]]
"""Makes one run at a rate, the seed's number given; None: a person ended it."""


async def find_rate(
    run_probe: RunProbe,
    options: SearchOptions,
    on_verdict: Callable[[Verdict], None] = lambda _: None,
) -> RateFound:
    """Double (or halve) from the first rate until one holds and one fails, then bisect.

    The rates between are geometric means: a search is about ratios. It takes for granted that a
    server which misses the SLO at one rate misses it at every higher one.
    """
    verdicts: list[Verdict] = []
    held: float | None = None
    failed: float | None = None

    def found(limited_by: str) -> RateFound:
        return RateFound(held, failed, limited_by, options.attainment, verdicts)

    rate = min(max(options.start_rate, options.min_rate), options.max_rate)
    while True:
        verdict = await _judge(run_probe, options, rate)
        if verdict is None:
            return found(LIMITED_BY_STOP)
        verdicts.append(verdict)
        on_verdict(verdict)
        if verdict.holds:
            held = rate
        else:
            failed = rate
            if not any(probe.is_valid for probe in verdict.probes):
                # Not the server's failure: the figures are the client's own delay.
                return found(LIMITED_BY_CLIENT)
        if held is not None and held >= options.max_rate:
            return found(LIMITED_BY_BOUND)
        if failed is not None and failed <= options.min_rate:
            return found(LIMITED_BY_SERVER)
        if held is None:
            rate = max(options.min_rate, rate / 2)
        elif failed is None:
            rate = min(options.max_rate, rate * 2)
        elif failed <= held * (1 + options.tolerance):
            return found(LIMITED_BY_SERVER)
        else:
            rate = (held * failed) ** 0.5


async def _judge(run_probe: RunProbe, options: SearchOptions, rate: float) -> Verdict | None:
    """Probe until most probes agree, whatever the ones not made yet would say."""
    needed = options.probes // 2 + 1
    probes: list[Probe] = []
    yes = no = 0
    while yes < needed and no <= options.probes - needed:
        probe = await run_probe(rate, len(probes))
        if probe is None:
            return None
        probes.append(probe)
        if probe.attainment >= options.attainment:
            yes += 1
        else:
            no += 1
    return Verdict(rate, yes >= needed, tuple(probes))
