"""Samples to cells, cells to comparisons, cells against their modelled floor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from gptjet.benchmarks.config import LevelName
from gptjet.benchmarks.geometry import Geometry
from gptjet.benchmarks.hardware import Hardware, measured_rates
from gptjet.benchmarks.records import CellFields, Results, Sample, Session
from gptjet.benchmarks.roofline import WEIGHT_TYPES, Floor, request_floor
from gptjet.benchmarks.statistics import (
    Interval,
    Summary,
    latency_reduction_interval,
    mean_ratio_interval,
    standard_deviation,
    summarize,
)


@dataclass(frozen=True, slots=True, order=True)
class Machine:
    """What levels are compared on: a machine and a model. Never compared across."""

    hardware: str
    model: str

    def __str__(self) -> str:
        return f"{self.hardware}, {self.model}"


@dataclass(frozen=True, slots=True)
class CellStats:
    """One cell's samples and their statistics; times in ms."""

    machine: Machine
    level: LevelName
    input_tokens: int
    output_tokens: int
    samples: tuple[Sample, ...]
    num_failures: int
    e2e: Summary
    ttft: Summary
    tpot: Summary | None
    tokens_per_s: float
    tokens_per_s_sd: float

    @property
    def e2e_ms(self) -> tuple[float, ...]:
        """The raw latencies."""
        return tuple(sample.e2e_ms for sample in self.samples)

    @property
    def lengths(self) -> tuple[int, int]:
        """(input, output) tokens."""
        return self.input_tokens, self.output_tokens


@dataclass(frozen=True, slots=True)
class Reduction:
    """How much less time a cell takes than the baseline's."""

    cell: CellStats
    baseline: CellStats
    interval: Interval


@dataclass(frozen=True, slots=True)
class LevelSummary:
    """A level on a machine over its cells. SDs are over the cells' means, as there is one a cell.

    reduction_by_input  input length -> mean reduction over its cells
    """

    machine: Machine
    level: LevelName
    cells: tuple[CellStats, ...]
    tokens_per_s: float
    tokens_per_s_sd: float
    overall_tokens_per_s: float
    reduction: Interval | None
    reduction_sd: float | None
    reduction_by_input: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class CellFloor:
    """The modelled floor of a measured cell, by the basis of its rates."""

    cell: CellStats
    floor: Floor

    @property
    def share(self) -> float:
        """Floor over measured mean latency: 1 is as fast as the model allows."""
        return self.floor.e2e_ms / self.cell.e2e.mean


@dataclass(frozen=True, slots=True)
class Analysis:
    """All that a report says in numbers."""

    results: Results
    cells: tuple[CellStats, ...]
    reductions: tuple[Reduction, ...]
    levels: tuple[LevelSummary, ...]
    floors: tuple[CellFloor, ...]
    baselines: Mapping[Machine, LevelName]

    @property
    def machines(self) -> tuple[Machine, ...]:
        """In order of name."""
        return tuple(sorted({cell.machine for cell in self.cells}))

    def sessions_of(self, machine: Machine) -> tuple[Session, ...]:
        """The sessions that measured on it."""
        return _sessions(self.results, machine)


def analyse(results: Results) -> Analysis:
    """Everything, in the order of machine, level, input and output length."""
    cells = _cells(results)
    baselines = {machine: _baseline(results, machine) for machine in {c.machine for c in cells}}
    reductions = _reductions(cells, baselines)
    return Analysis(
        results=results,
        cells=cells,
        reductions=reductions,
        levels=_levels(cells, reductions),
        floors=_floors(results, cells),
        baselines=baselines,
    )


def hardware_of(results: Results, name: str) -> Hardware | None:
    """The configuration's hardware, where it is what was really there."""
    for session in results.sessions.values():
        hardware = Hardware.model_validate(session.config["hardware"])
        if session.hardware == name == hardware.name:
            return hardware
    return None


def _cells(results: Results) -> tuple[CellStats, ...]:
    groups: dict[tuple[Any, ...], list[Sample]] = defaultdict(list)
    failures: dict[tuple[Any, ...], int] = defaultdict(int)
    for sample in results.samples.values():
        groups[_cell_key(sample)].append(sample)
    for failure in results.failures.values():
        failures[_cell_key(failure)] += 1
    return tuple(
        _cell(sorted(samples, key=lambda sample: sample.run), failures[key])
        for key, samples in sorted(groups.items())
    )


def _cell(samples: Sequence[Sample], num_failures: int) -> CellStats:
    first = samples[0]
    rates = [sample.tokens_per_s for sample in samples]
    tpots = [sample.tpot_ms for sample in samples if sample.tpot_ms is not None]
    return CellStats(
        machine=Machine(first.hardware, first.model),
        level=LevelName(backend=first.backend, weight_type=first.weight_type),
        input_tokens=first.input_tokens,
        output_tokens=first.output_tokens,
        samples=tuple(samples),
        num_failures=num_failures,
        e2e=summarize([sample.e2e_ms for sample in samples]),
        ttft=summarize([sample.ttft_ms for sample in samples]),
        tpot=summarize(tpots) if tpots else None,
        tokens_per_s=float(np.mean(rates)),
        tokens_per_s_sd=standard_deviation(rates),
    )


def _baseline(results: Results, machine: Machine) -> LevelName:
    """Of the latest session: what the configuration calls the baseline."""
    sessions = _sessions(results, machine)
    return LevelName.model_validate(sessions[-1].config["design"]["baseline"])


def _sessions(results: Results, machine: Machine) -> tuple[Session, ...]:
    """The sessions of a machine, by time."""
    found = [
        session
        for session in results.sessions.values()
        if (session.hardware, session.model) == (machine.hardware, machine.model)
    ]
    return tuple(sorted(found, key=lambda session: session.started_at))


def _reductions(
    cells: Sequence[CellStats], baselines: Mapping[Machine, LevelName]
) -> tuple[Reduction, ...]:
    by_place = {(cell.machine, cell.level, cell.lengths): cell for cell in cells}
    found = []
    for cell in cells:
        baseline = by_place.get((cell.machine, baselines[cell.machine], cell.lengths))
        if baseline is not None and baseline is not cell:
            interval = latency_reduction_interval(baseline.e2e_ms, cell.e2e_ms)
            found.append(Reduction(cell, baseline, interval))
    return tuple(found)


def _levels(
    cells: Sequence[CellStats], reductions: Sequence[Reduction]
) -> tuple[LevelSummary, ...]:
    groups: dict[tuple[Machine, LevelName], list[CellStats]] = defaultdict(list)
    for cell in cells:
        groups[cell.machine, cell.level].append(cell)
    return tuple(
        _level(
            machine,
            level,
            members,
            [r for r in reductions if (r.cell.machine, r.cell.level) == (machine, level)],
        )
        for (machine, level), members in groups.items()
    )


def _level(
    machine: Machine,
    level: LevelName,
    cells: Sequence[CellStats],
    reductions: Sequence[Reduction],
) -> LevelSummary:
    rates = [cell.tokens_per_s for cell in cells]
    seconds = sum(cell.e2e.mean for cell in cells) / 1000
    by_input: dict[int, list[float]] = defaultdict(list)
    for reduction in reductions:
        by_input[reduction.cell.input_tokens].append(reduction.interval.estimate)
    pairs = [(r.baseline.e2e_ms, r.cell.e2e_ms) for r in reductions]
    return LevelSummary(
        machine=machine,
        level=level,
        cells=tuple(cells),
        tokens_per_s=float(np.mean(rates)),
        tokens_per_s_sd=standard_deviation(rates),
        overall_tokens_per_s=sum(cell.output_tokens for cell in cells) / seconds,
        reduction=mean_ratio_interval(pairs) if pairs else None,
        reduction_sd=(
            standard_deviation([r.interval.estimate for r in reductions]) if reductions else None
        ),
        reduction_by_input={key: float(np.mean(values)) for key, values in by_input.items()},
    )


def _floors(results: Results, cells: Iterable[CellStats]) -> tuple[CellFloor, ...]:
    """One or two a cell: by datasheet rates and by measured ones, where there are any."""
    found = []
    for cell in cells:
        geometry, bandwidth = _model_and_rates(_sessions(results, cell.machine))
        if geometry is None or cell.level.backend == "mock":
            continue
        weights = WEIGHT_TYPES[cell.level.weight_type]
        hardware = hardware_of(results, cell.machine.hardware)
        for rates in (
            hardware.datasheet_rates(weights) if hardware else None,
            measured_rates(bandwidth, weights),
        ):
            if rates is not None:
                floor = request_floor(geometry, weights, rates, *cell.lengths)
                found.append(CellFloor(cell, floor))
    return tuple(found)


def _model_and_rates(
    sessions: Sequence[Session],
) -> tuple[Geometry | None, Mapping[str, Any] | None]:
    """The model's sizes, and the best measurement of the machine: the least disturbed one."""
    names = {field.name for field in fields(Geometry)}
    geometry = None
    best: Mapping[str, Any] | None = None
    for session in sessions:
        if session.geometry is not None and names <= set(session.geometry):
            geometry = Geometry(**{name: session.geometry[name] for name in names})
        measured = session.bandwidth
        if measured and (best is None or measured["read_gb_s"] > best["read_gb_s"]):
            best = measured
    return geometry, best


def _cell_key(record: CellFields) -> tuple[Any, ...]:
    return (
        record.hardware,
        record.model,
        record.backend,
        record.weight_type,
        record.input_tokens,
        record.output_tokens,
    )
