"""When requests are sent in an open loop: arrival processes of a given mean rate."""

from __future__ import annotations

import random
from collections.abc import Iterator

PROCESSES = ("poisson", "constant", "gamma:CV")
"""How `--arrivals` names them."""

_NS = 1_000_000_000


def check_arrivals(process: str) -> None:
    """Raise ValueError for a process that `arrival_times_ns` does not know."""
    _coefficient_of_variation(process)


def arrival_times_ns(process: str, rate: float, seed: int) -> Iterator[int]:
    """Intended send times in ns after the start, for ever; the same seed, the same times.

    poisson   exponential gaps: independent users, the usual assumption
    constant  equal gaps, from 0 on: no queue that the server itself does not cause
    gamma:CV  gamma gaps of that coefficient of variation; 1 is poisson, above it come bursts

    `rate` is in requests a second. Raises ValueError for another process or rate.
    """
    variation = _coefficient_of_variation(process)
    if not 0 < rate < float("inf"):
        raise ValueError(f"the rate must be above 0, got {rate:g}")
    if variation == 0:
        # Counted, not summed up: a sum of rounded gaps would drift from the rate.
        index = 0
        while True:
            yield round(index * _NS / rate)
            index += 1
    generator = random.Random(f"arrivals/{seed}")
    # A gamma distribution has mean shape * scale and coefficient of variation shape ** -0.5.
    shape = variation**-2
    scale = 1 / (rate * shape)
    now_s = 0.0
    while True:
        now_s += generator.gammavariate(shape, scale)
        yield round(now_s * _NS)


def _coefficient_of_variation(process: str) -> float:
    name, _, argument = process.partition(":")
    fixed = {"poisson": 1.0, "constant": 0.0}
    if name in fixed and not argument:
        return fixed[name]
    if name == "gamma":
        try:
            variation = float(argument)
        except ValueError:
            variation = 0.0
        if 0.01 <= variation <= 100:
            return variation
        raise ValueError(f"{process}: give gamma:CV with a CV of 0.01 to 100, such as gamma:2")
    raise ValueError(f"unknown arrival process {process!r}: give {', '.join(PROCESSES)}")
