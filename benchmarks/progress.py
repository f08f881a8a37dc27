"""How a sweep shows itself: a bar with the time left on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from gptjet.benchmarks.design import Run

_LOG_EVERY_S = 30.0


class SweepProgress:
    """An Observer on stderr, for all configurations of a command; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._weights: dict[Run, float] = {}
        self._made = self._done = self._failed = 0
        self._weight_left = self._weight_made = 0.0
        self._started = self._logged = 0.0

    def name(self, name: str) -> None:
        """What the next runs belong to."""
        self._name = name

    def begin(self, total: Mapping[Run, float], done: int) -> None:
        """See sweep_plan.Observer."""
        self._weights = dict(total)
        self._made, self._done, self._failed = 0, done, 0
        self._weight_left, self._weight_made = sum(total.values()), 0.0
        self._started = self._logged = time.monotonic()
        if done:
            self.note(f"{done} runs are on file already, {len(total)} are to be made")
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(
            self._name, total=len(total) + done, completed=done, left="time left: unknown yet"
        )

    def note(self, text: str) -> None:
        """See sweep_plan.Observer."""
        self._console.print(f"{self._name}: {text}", markup=False, highlight=False)

    def advance(self, run: Run, error: str | None) -> None:
        """See sweep_plan.Observer."""
        weight = self._weights.get(run, 0.0)
        self._made += 1
        self._weight_made += weight
        self._weight_left -= weight
        if error is not None:
            self._failed += 1
            if self._failed <= MAX_ERRORS_SHOWN:
                cell = run.cell
                self.note(f"{cell.level} {cell.input_tokens}+{cell.output_tokens} failed: {error}")
        left = f"time left: {_duration(self._seconds_left())}"
        if self._task is not None:
            self._bar.update(self._task, advance=1, left=left)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._logged > _LOG_EVERY_S:
            self._logged = now
            total = len(self._weights) + self._done
            self.note(f"{self._made + self._done} of {total} runs, {left}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def _seconds_left(self) -> float:
        """From the pace so far, by weight: long cells take longer than short ones."""
        elapsed = time.monotonic() - self._started
        return elapsed * self._weight_left / self._weight_made if self._weight_made else 0.0


MAX_ERRORS_SHOWN = 5


def _duration(seconds: float) -> str:
    """`1 h 05 min`, `5 min`, `40 s`."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"
