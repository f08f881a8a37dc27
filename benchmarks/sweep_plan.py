"""What a runner is given and gives back: a decided sweep, connections, an observer, the outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gptjet.benchmarks.config import LevelName, SweepConfig
from gptjet.benchmarks.design import Run, RunKey
from gptjet.benchmarks.measure import StreamClient
from gptjet.service.client_types import ModelInfo


@dataclass(slots=True)
class Connection:
    """A level's server. `close` closes the client, and stops the server if the sweep started it."""

    client: StreamClient
    model: ModelInfo
    start_s: float | None
    close: Callable[[], None]


Connect = Callable[[LevelName], Connection]


class Observer(Protocol):
    """Hears how it goes."""

    def begin(self, total: Mapping[Run, float], done: int) -> None:
        """The runs still to make, each with its weight, and how many are on file already."""

    def note(self, text: str) -> None:
        """One line for a person."""

    def advance(self, run: Run, error: str | None) -> None:
        """One run was made, or cannot be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """One configuration, decided to the end.

    hardware   the label of what is really there
    model      the model's label in results
    together   see gptjet.benchmarks.design
    """

    config: SweepConfig
    levels: tuple[LevelName, ...]
    hardware: str
    model: str
    together: bool
    hardware_verified: bool = True
    model_note: str | None = None
    fingerprint: str | None = None
    geometry: Mapping[str, Any] | None = None
    quick: bool = False
    retry_failures: bool = False

    def key(self, run: Run) -> RunKey:
        """The run's identity in a result file."""
        cell = run.cell
        return RunKey(
            self.hardware,
            self.model,
            cell.level.backend,
            cell.level.weight_type,
            cell.input_tokens,
            cell.output_tokens,
            run.index,
        )

    def identity(self) -> dict[str, Any]:
        """What must not change between the sessions of one file."""
        return {
            "seed": self.config.design.seed,
            "warmup_rounds": self.config.design.warmup_rounds,
            "fingerprint": self.fingerprint,
        }


@dataclass(slots=True)
class Outcome:
    """What one session did."""

    made: int = 0
    failed: int = 0
    infeasible_cells: int = 0
    already_there: int = 0
