"""The order of the runs, their prompts, and cells that cannot run."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from gptjet.benchmarks.config import SweepConfig, load_config
from gptjet.benchmarks.design import Cell, Run, blocks, cells, prompt_token_ids, quick, too_long


@pytest.fixture
def config() -> SweepConfig:
    return load_config("t4")


@pytest.mark.parametrize("together", [True, False])
def test_every_block_holds_as_many_runs_of_every_cell(config: SweepConfig, together: bool) -> None:
    levels = config.design.choose_levels()
    every: list[Run] = []
    for block in blocks(config, levels, together=together):
        runs = [run for visit in block.visits for run in visit.runs]
        assert set(Counter(run.cell for run in runs).values()) == {5}
        every += runs
    expected = {Run(cell, run) for cell in cells(config, levels) for run in range(20)}
    assert len(every) == len(expected) == 640
    assert set(every) == expected


def test_runs_that_do_not_divide_into_blocks_lose_none(config: SweepConfig) -> None:
    config = config.updated(runs=7, runs_per_block=3)
    levels = config.design.choose_levels()
    found = list(blocks(config, levels, together=True))
    assert [len(block.visits[0].runs) for block in found] == [96, 96, 32]


def test_together_mixes_the_levels_and_alternate_takes_turns(config: SweepConfig) -> None:
    levels = config.design.choose_levels()
    (first, *_) = blocks(config, levels, together=True)
    order = [run.cell.level for run in first.visits[0].runs]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes > len(order) / 4, "levels come in one random order"
    for block in blocks(config, levels, together=False):
        assert sorted(map(str, [v.levels[0] for v in block.visits])) == sorted(map(str, levels))
        for visit in block.visits:
            assert {run.cell.level for run in visit.runs} == set(visit.levels)


def test_the_order_is_random_differs_between_blocks_and_is_the_seeds(config: SweepConfig) -> None:
    levels = config.design.choose_levels()

    def orders(config: SweepConfig) -> list[list[Cell]]:
        return [
            [run.cell for visit in block.visits for run in visit.runs]
            for block in blocks(config, levels, together=True)
        ]

    assert orders(config) == orders(config)
    assert orders(config)[0] != orders(config)[1]
    assert orders(config) != orders(config.updated(seed=1))
    plain = [cell for cell in cells(config, levels) for _ in range(5)]
    assert orders(config)[0] != plain


def test_prompts_have_the_length_and_are_new_for_every_run(config: SweepConfig) -> None:
    first, second = (cells(config, [level])[0] for level in config.design.choose_levels())
    prompts = [prompt_token_ids(3, first, run, 100, 7) for run in range(20)]
    assert {len(prompt) for prompt in prompts} == {first.input_tokens}
    assert len({tuple(prompt) for prompt in prompts}) == 20
    ids = {token_id for prompt in prompts for token_id in prompt}
    assert ids == set(range(100)) - {7}, "every id but end-of-text"
    assert prompt_token_ids(3, second, 0, 100, 7) == prompts[0], "levels get the same prompts"
    assert prompt_token_ids(4, first, 0, 100, 7) != prompts[0]


def test_a_cell_beyond_the_context_says_so(config: SweepConfig) -> None:
    (level, *_) = config.design.choose_levels()
    assert too_long(Cell(level, 312, 200), 512) is None
    assert too_long(Cell(level, 312, 200), None) is None
    reason = too_long(Cell(level, 313, 200), 512)
    assert reason == "not feasible: prompt + output > context (313 + 200 > 512)"


def test_quick_is_two_short_cells_a_level(config: SweepConfig) -> None:
    small = quick(config)
    assert small.design.input_tokens == (50, 200)
    assert small.design.output_tokens == (50,)
    assert small.design.runs == 3
