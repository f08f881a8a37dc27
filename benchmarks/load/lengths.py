"""Distributions of prompt and output lengths, as a flag spells them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

SYNTAX = "N, uniform:LOW,HIGH, normal:MEAN,SD, lognormal:MEDIAN,SIGMA[,MAX] or choice:A,B,C"
"""What `parse_lengths` reads."""

_MOST = 10_000_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts; every draw is at least 1."""

    text: str
    _draw: Callable[[random.Random], float]

    def draw(self, generator: random.Random) -> int:
        """One length."""
        return min(_MOST, max(1, round(self._draw(generator))))


def parse_lengths(text: str) -> Lengths:
    """Read SYNTAX. Raises ValueError, with what would be right, for anything else.

    lognormal takes the median and the standard deviation of the logarithm: what people measure of
    chat traffic; a third number cuts what lies above it.
    """
    name, _, argument = text.strip().partition(":")
    try:
        if not argument:
            fixed = int(name)
            return Lengths(text, _checked(lambda _: fixed, fixed >= 1))
        numbers = [float(part) for part in argument.split(",")]
        if not all(map(math.isfinite, numbers)):
            raise ValueError
        return Lengths(text, _DISTRIBUTIONS[name](*numbers))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{text!r} is not a length: give {SYNTAX}") from None


def _checked(
    draw: Callable[[random.Random], float], is_valid: bool
) -> Callable[[random.Random], float]:
    if not is_valid:
        raise ValueError
    return draw


def _uniform(low: float, high: float) -> Callable[[random.Random], float]:
    return _checked(
        lambda generator: generator.randint(int(low), int(high)),
        1 <= low <= high and low.is_integer() and high.is_integer(),
    )


def _normal(mean: float, sd: float) -> Callable[[random.Random], float]:
    return _checked(lambda generator: generator.gauss(mean, sd), mean >= 1 and sd >= 0)


def _lognormal(
    median: float, sigma: float, most: float = _MOST
) -> Callable[[random.Random], float]:
    return _checked(
        lambda generator: min(most, generator.lognormvariate(math.log(median), sigma)),
        1 <= median <= most and 0 <= sigma <= 10,
    )


def _choice(*values: float) -> Callable[[random.Random], float]:
    return _checked(lambda generator: generator.choice(values), min(values) >= 1)


_DISTRIBUTIONS: dict[str, Callable[..., Callable[[random.Random], float]]] = {
    "uniform": _uniform,
    "normal": _normal,
    "lognormal": _lognormal,
    "choice": _choice,
}
