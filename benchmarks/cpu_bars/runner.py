"""Runs races: contestants take turns in rounds, a whole round is one record, so a kill loses one.

A round that is on file with everybody who can start is not run again. Who cannot start, or fails on
the way, is recorded with the reason, and the others go on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gptjet.benchmarks.cpu_bars.busy import busy_cores
from gptjet.benchmarks.cpu_bars.checkpoints import read_vocab_size
from gptjet.benchmarks.cpu_bars.design import Cell, Entry, Race
from gptjet.benchmarks.cpu_bars.measure import PAUSE_S, Figures, Load, measure
from gptjet.benchmarks.environment import load_average, utc_now, without_paths
from gptjet.benchmarks.peers.contestants import Contestant
from gptjet.benchmarks.peers.environments import PeerError
from gptjet.benchmarks.results import ResultsWriter

SESSION, ROUND, BANDWIDTH = "bars_session", "bars_round", "bars_bandwidth"
ABSENT, FAILURE = "bars_absent", "bars_failure"

Record = Mapping[str, Any]
Start = Callable[[Race, Entry, Path], AbstractContextManager[Contestant]]
MeasureBandwidth = Callable[[], Mapping[str, Any]]


class Observer(Protocol):
    """Who is told how it goes."""

    def begin(self, steps: int) -> None:
        """So many contestants' parts of rounds are to be measured."""
        ...

    def note(self, text: str) -> None:
        """Something a person should read."""
        ...

    def advance(self, text: str, steps: int = 1) -> None:
        """So many parts are done, or will not be; `text` says what comes or came."""
        ...


@dataclass(slots=True)
class Recorded:
    """What a result file holds, the latest record of each thing.

    rounds      (race, cell, number) -> figures by entry
    absent      (race, entry) -> why it could not start, until it did
    failures    (race, entry) -> why it stopped on the way, until it got through
    bandwidths  by model, every measurement of the read bandwidth in GB/s
    sessions    the commands that added to it, oldest first
    """

    rounds: dict[tuple[str, str, int], dict[str, Figures]] = field(default_factory=dict)
    absent: dict[tuple[str, str], str] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    bandwidths: dict[str, list[float]] = field(default_factory=dict)
    sessions: list[Record] = field(default_factory=list)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Recorded:
        """From the records of a file; other kinds are passed over."""
        recorded = cls()
        for record in records:
            recorded.add(record)
        return recorded

    def add(self, record: Record) -> None:
        """Take one more into account."""
        match record["kind"]:
            case "bars_session":
                self.sessions.append(record)
            case "bars_round":
                figures = dict(record["figures"])
                self.rounds[record["race"], record["cell"], record["round"]] = figures
                for name in figures:
                    self.absent.pop((record["race"], name), None)
                    self.failures.pop((record["race"], name), None)
            case "bars_absent":
                self.absent[record["race"], record["entry"]] = record["reason"]
            case "bars_failure":
                self.failures[record["race"], record["entry"]] = record["reason"]
            case "bars_bandwidth":
                self.bandwidths.setdefault(record["model"], []).append(record["read_gb_s"])

    def missing(self, race: Race, cell: Cell, entries: Iterable[Entry]) -> list[int]:
        """The rounds that lack one of these entries."""
        wanted = {str(entry) for entry in entries if race.runs_cell(entry, cell)}
        return [
            number
            for number in range(cell.rounds)
            if not wanted <= self.rounds.get((race.key, cell.key, number), {}).keys()
        ]


@dataclass(slots=True)
class Runner:
    """Runs races into a file. `start` and `load` are replaced in tests."""

    writer: ResultsWriter
    recorded: Recorded
    start: Start
    observer: Observer
    measure_bandwidth: MeasureBandwidth
    load: Load = busy_cores
    pause_s: float = PAUSE_S

    def run(self, races: Sequence[Race], folder_of: Callable[[str], Path]) -> None:
        """Every race that lacks something. `folder_of` gives (and makes) a model's checkpoint."""
        pending = [race for race in races if self._steps(race, race.entries)]
        self.observer.begin(sum(self._steps(race, race.entries) for race in pending))
        for race in pending:
            self._race(race, folder_of(race.model))

    def _race(self, race: Race, folder: Path) -> None:
        self.observer.note(f"{race.key}: measuring the memory's bandwidth")
        self._append(BANDWIDTH, {"model": race.model, **self.measure_bandwidth()})
        before = self._steps(race, race.entries)
        # Who lacks rounds first: where none of them can start, nobody else is needed.
        lacking = [entry for entry in race.entries if self._steps(race, [entry])]
        others = [entry for entry in race.entries if entry not in lacking]
        with contextlib.ExitStack() as stack:
            ready = self._start_all(race, lacking, folder, stack)
            if ready:
                ready |= self._start_all(race, others, folder, stack)
            started = {entry: ready[entry] for entry in race.entries if entry in ready}
            self.observer.advance(race.key, before - self._steps(race, started))
            for cell in race.cells:
                self._cell(race, cell, started, read_vocab_size(folder))

    def _start_all(
        self, race: Race, entries: Iterable[Entry], folder: Path, stack: contextlib.ExitStack
    ) -> dict[Entry, Contestant]:
        """Those that can start."""
        started: dict[Entry, Contestant] = {}
        for entry in entries:
            self.observer.advance(f"{race.key}: starting {entry}", 0)
            begin = time.monotonic()
            try:
                started[entry] = stack.enter_context(self.start(race, entry, folder))
            except PeerError as error:
                self._lose(race, entry, ABSENT, str(error))
            else:
                seconds = time.monotonic() - begin
                self.observer.note(f"{race.key}: {entry} is ready after {seconds:.0f} s")
        return started

    def _cell(
        self, race: Race, cell: Cell, started: dict[Entry, Contestant], vocab_size: int
    ) -> None:
        """The rounds of a cell. Who fails is taken out of `started`."""
        taking_part = [entry for entry in started if race.runs_cell(entry, cell)]
        missing = self.recorded.missing(race, cell, taking_part)
        # A warm-up is no step of its own: what it takes belongs to the rounds.
        for number in [-1, *missing] if missing else []:
            figures: dict[str, Figures] = {}
            for entry in taking_part if number % 2 == 0 else reversed(taking_part):
                if entry not in started:
                    continue
                self.observer.advance(f"{race.key} {cell.key} round {number + 1}: {entry}", 0)
                try:
                    figures[str(entry)] = measure(
                        started[entry],
                        cell,
                        race.model,
                        number,
                        vocab_size,
                        load=self.load,
                        pause_s=self.pause_s,
                    )
                except PeerError as error:
                    del started[entry]
                    self._lose(race, entry, FAILURE, f"{cell.key}: {error}")
            if number >= 0 and figures:
                self._append(
                    ROUND,
                    {
                        "race": race.key,
                        "cell": cell.key,
                        "round": number,
                        "figures": figures,
                        "ended_at": utc_now(),
                        "load": load_average(),
                    },
                )
                self.observer.advance(f"{race.key} {cell.key}", len(taking_part))

    def _lose(self, race: Race, entry: Entry, kind: str, reason: str) -> None:
        reason = without_paths(reason)
        self.observer.note(f"{race.key}: {entry} is out: {reason}")
        self._append(kind, {"race": race.key, "entry": str(entry), "reason": reason})

    def _append(self, kind: str, fields: Mapping[str, Any]) -> None:
        self.writer.append(kind, fields)
        self.recorded.add({"kind": kind, **fields})

    def _steps(self, race: Race, entries: Iterable[Entry]) -> int:
        entries = list(entries)
        return sum(
            len(self.recorded.missing(race, cell, entries))
            * sum(race.runs_cell(entry, cell) for entry in entries)
            for cell in race.cells
        )
