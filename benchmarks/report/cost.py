"""What a million tokens cost, and where one machine becomes cheaper than another.

A request alone on a machine that is paid by the hour and never idle: the machine is the whole cost,
so this is an upper bound for a server that batches, and a lower one for a server that waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from gptjet.benchmarks.config import LevelName
from gptjet.benchmarks.report.analysis import Analysis, CellStats, hardware_of

_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars an hour, of what and when."""

    usd_per_hour: float
    instance: str
    as_of: str


@dataclass(frozen=True, slots=True)
class CostComparison:
    """One cell on two machines. At `break_even_usd` an hour `right` costs as much as `left`."""

    level: LevelName
    input_tokens: int
    output_tokens: int
    left: str
    right: str
    left_usd: float
    right_usd: float
    break_even_usd: float

    @property
    def cheaper(self) -> str:
        """The machine that costs less."""
        return self.left if self.left_usd <= self.right_usd else self.right


@dataclass(frozen=True, slots=True)
class Crossover:
    """Where the cheaper machine changes along the output length, interpolated; None: nowhere."""

    level: LevelName
    input_tokens: int
    left: str
    right: str
    output_tokens: float | None
    cheaper_at_first: str


def usd_per_million(usd_per_hour: float, tokens_per_s: float) -> float:
    """Dollars for a million output tokens at this rate."""
    return usd_per_hour / 3600 / tokens_per_s * _MILLION


def prices(analysis: Analysis, given: Mapping[str, float]) -> dict[str, Price]:
    """Hardware -> price: the one given, else the configuration's; absent where neither is."""
    found = {}
    for name in {machine.hardware for machine in analysis.machines}:
        hardware = hardware_of(analysis.results, name)
        if name in given:
            found[name] = Price(given[name], "as given", "now")
        elif hardware is not None and hardware.instance is not None:
            instance = hardware.instance
            found[name] = Price(instance.usd_per_hour, instance.name, instance.as_of)
    return found


def compare(analysis: Analysis, known: Mapping[str, Price]) -> list[CostComparison]:
    """Every cell that two machines measured with one model and level, both with a price."""
    by_place: dict[tuple[str, LevelName, tuple[int, int]], list[CellStats]] = {}
    for cell in analysis.cells:
        if cell.machine.hardware in known:
            place = (cell.machine.model, cell.level, cell.lengths)
            by_place.setdefault(place, []).append(cell)
    found = []
    for (_, level, (input_tokens, output_tokens)), cells in by_place.items():
        for left, right in combinations(cells, 2):
            left_price = known[left.machine.hardware].usd_per_hour
            found.append(
                CostComparison(
                    level=level,
                    input_tokens=input_tokens,
                    output_tokens=output_tokens,
                    left=left.machine.hardware,
                    right=right.machine.hardware,
                    left_usd=_cell_usd(left, known),
                    right_usd=_cell_usd(right, known),
                    break_even_usd=left_price * _rate(right) / _rate(left),
                )
            )
    return found


def crossovers(comparisons: Sequence[CostComparison]) -> list[Crossover]:
    """Along the output length, for each level, input length and pair of machines."""
    lines: dict[tuple[LevelName, int, str, str], list[CostComparison]] = {}
    for one in comparisons:
        lines.setdefault((one.level, one.input_tokens, one.left, one.right), []).append(one)
    found = []
    for (level, input_tokens, left, right), line in lines.items():
        line.sort(key=lambda one: one.output_tokens)
        where = None
        for near, far in pairwise(line):
            before, after = _difference(near), _difference(far)
            if before * after < 0:
                way = before / (before - after)
                where = near.output_tokens + way * (far.output_tokens - near.output_tokens)
                break
        found.append(Crossover(level, input_tokens, left, right, where, line[0].cheaper))
    return found


def _difference(one: CostComparison) -> float:
    """Of the cost of a whole request, which is close to linear in the output length."""
    return (one.left_usd - one.right_usd) * one.output_tokens


def _rate(cell: CellStats) -> float:
    """Tokens/s over all the cell's time: what the money buys, not the mean of rates."""
    return cell.output_tokens / cell.e2e.mean * 1000


def _cell_usd(cell: CellStats, known: Mapping[str, Price]) -> float:
    return usd_per_million(known[cell.machine.hardware].usd_per_hour, _rate(cell))
