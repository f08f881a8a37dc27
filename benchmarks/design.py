"""The design as data: cells, and the order in which their runs are made.

Drift (heat, a neighbour, a clock that steps down) must not pose as an effect, so runs come in
randomised blocks: a block holds the same number of runs of every cell, and what is compared is
always measured within a block. Two ways to fill one:

    together   every level's server is alive; all runs of the block in one random order
    alternate  one server at a time; the levels in random order, each with its cells shuffled

The order is a function of the seed alone, so a sweep that was killed goes on where it stopped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gptjet.benchmarks.config import LevelName, SweepConfig


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of the factors: a level, an input and an output length in tokens."""

    level: LevelName
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """One repetition of a cell. `index` counts from 0."""

    cell: Cell
    index: int


@dataclass(frozen=True, slots=True)
class Visit:
    """Runs made with the servers of these levels alive."""

    levels: tuple[LevelName, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One round over every cell."""

    index: int
    visits: tuple[Visit, ...]


@dataclass(frozen=True, slots=True)
class RunKey:
    """What identifies a run in a result file: two records of one key are one run made twice."""

    hardware: str
    model: str
    backend: str
    weight_type: str
    input_tokens: int
    output_tokens: int
    run: int


def cells(config: SweepConfig, levels: Sequence[LevelName]) -> tuple[Cell, ...]:
    """Every cell, in the order of the configuration."""
    design = config.design
    return tuple(
        Cell(level, input_tokens, output_tokens)
        for level in levels
        for input_tokens in design.input_tokens
        for output_tokens in design.output_tokens
    )


def blocks(config: SweepConfig, levels: Sequence[LevelName], *, together: bool) -> Iterator[Block]:
    """The schedule. The same configuration, levels and `together` give the same one."""
    design = config.design
    per_block = min(design.runs_per_block, design.runs)
    every_cell = cells(config, levels)
    for index, first in enumerate(range(0, design.runs, per_block)):
        order = random.Random(f"{design.seed}/{config.name}/{index}")
        runs = [
            Run(cell, run)
            for cell in every_cell
            for run in range(first, min(first + per_block, design.runs))
        ]
        order.shuffle(runs)
        if together:
            yield Block(index, (Visit(tuple(levels), tuple(runs)),))
            continue
        turns = list(levels)
        order.shuffle(turns)
        yield Block(
            index,
            tuple(
                Visit((level,), tuple(run for run in runs if run.cell.level == level))
                for level in turns
            ),
        )


def prompt_token_ids(
    seed: int, cell: Cell, run: int, vocab_size: int, eos_token_id: int | None
) -> list[int]:
    """Random ids of the cell's input length, never end-of-text.

    A new prompt for every run, so that no prefix cache can help; the same for every level, so that
    levels are compared on the same prompts.
    """
    source = random.Random(f"{seed}/{cell.input_tokens}/{cell.output_tokens}/{run}")
    ids: list[int] = []
    while len(ids) < cell.input_tokens:
        token_id = source.randrange(vocab_size)
        if token_id != eos_token_id:
            ids.append(token_id)
    return ids


def too_long(cell: Cell, max_context: int | None) -> str | None:
    """Why a cell can never run in this context, in one line; None where it can."""
    total = cell.input_tokens + cell.output_tokens
    if max_context is None or total <= max_context:
        return None
    return (
        f"not feasible: prompt + output > context "
        f"({cell.input_tokens} + {cell.output_tokens} > {max_context})"
    )


def quick(config: SweepConfig) -> SweepConfig:
    """A minute's look: the two shortest inputs, the shortest output, three runs."""
    design = config.design
    return config.updated(
        input_tokens=sorted(design.input_tokens)[:2],
        output_tokens=sorted(design.output_tokens)[:1],
        runs=min(3, design.runs),
        warmup_rounds=1,
        runs_per_block=1,
    )
