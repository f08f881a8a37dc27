"""Races of invented contestants: how fast each is and what it answers is given, not measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gptjet.benchmarks.cpu_bars.design import Entry, Race
from gptjet.benchmarks.cpu_bars.runner import Recorded, Runner
from gptjet.benchmarks.peers.contestants import Contestant, PeerRun
from gptjet.benchmarks.peers.environments import PeerError
from gptjet.benchmarks.results import ResultsWriter, read_records


class Invented:
    """Answers any prompt with the sum of its ids, counting up; `ms` a token, memory as given."""

    def __init__(self, ms: float, memory: int = 1000, offset: int = 0) -> None:
        self.ms, self.memory, self.offset = ms, memory, offset
        self.prompts: list[tuple[int, ...]] = []
        self.fails_at: int | None = None

    def run(self, prompt: Sequence[int], output_tokens: int) -> PeerRun:
        if self.fails_at is not None and len(self.prompts) >= self.fails_at:
            raise PeerError("it broke")
        self.prompts.append(tuple(prompt))
        times = tuple(self.ms * (index + 1) for index in range(output_tokens))
        tokens = tuple(sum(prompt) + self.offset + index for index in range(output_tokens))
        return PeerRun(tokens, times, times[-1], self.memory)


class InventedEngine(Invented):
    """The same with streams: together they take as long as one, twice over."""

    def run_together(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[PeerRun]:
        runs = [self.run(prompt, output_tokens) for prompt in prompts]
        return [
            PeerRun(r.tokens, tuple(2 * ms for ms in r.token_ms), 2 * r.e2e_ms, self.memory)
            for r in runs
        ]


class Field:
    """Everybody who can be started, and who was."""

    def __init__(self) -> None:
        self.contestants: dict[str, Invented] = {}
        self.started: list[str] = []
        self.alive: set[str] = set()
        self.most_alive = 0

    @contextlib.contextmanager
    def start(self, race: Race, entry: Entry, folder: Path) -> Iterator[Contestant]:
        assert race.kv_cache_tokens > 0
        assert (folder / "config.json").exists()
        if str(entry) not in self.contestants:
            raise PeerError(f"{entry} is not set up")
        self.started.append(str(entry))
        self.alive.add(str(entry))
        self.most_alive = max(self.most_alive, len(self.alive))
        try:
            yield self.contestants[str(entry)]
        finally:
            self.alive.discard(str(entry))


class Notes:
    """An Observer that counts."""

    def __init__(self) -> None:
        self.steps = self.done = 0
        self.notes: list[str] = []

    def begin(self, steps: int) -> None:
        self.steps = steps

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, text: str, steps: int = 1) -> None:
        assert text
        self.done += steps


@pytest.fixture
def invented() -> type[Invented]:
    return Invented


@pytest.fixture
def invented_engine() -> type[InventedEngine]:
    return InventedEngine


@pytest.fixture
def field() -> Field:
    return Field()


@pytest.fixture
def run_races(tmp_path: Path, field: Field) -> Callable[..., tuple[Recorded, Notes]]:
    """`run_races(races)` runs them into one file, as a command does that is started again."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50}))
    out = tmp_path / "bars.jsonl"

    def run(races: Sequence[Any], load: Any = contextlib.nullcontext) -> tuple[Recorded, Notes]:
        recorded = Recorded.of(read_records(out) if out.exists() else ())
        notes = Notes()
        with ResultsWriter(out) as writer:
            runner = Runner(
                writer,
                recorded,
                field.start,
                notes,
                lambda: {"read_gb_s": 20.0},
                load=load,
                pause_s=0,
            )
            runner.run(races, lambda _: tmp_path)
        assert not field.alive
        # What is in memory is what a later process reads.
        assert Recorded.of(read_records(out)) == recorded
        return recorded, notes

    return run
