"""Ids chosen by the kernels against those of the engine's own sampler, from the same numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gptjet.kernels.gpu import sampling
from gptjet.kernels.gpu.sampling import SamplingParameters, SamplingWorkspace, sample
from gptjet.service.engine.request import SamplingParams, new_request
from gptjet.service.engine.sampler import NonFiniteLogitsError, Sampler

VOCAB, USABLE = 200, 183


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks of the 200 logits; the interpreter is slow by the operation, not by its size."""
    monkeypatch.setattr(sampling, "_CHUNK_IDS", 128)
    monkeypatch.setattr(sampling, "_ROWS_AT_ONCE", 128)


def random_logits(rows: int, vocab: int = VOCAB, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def poisoned(rows: int, vocab: int) -> SamplingWorkspace:
    """What an earlier step may have left: weights, sums and cuts that mean something else."""
    work = SamplingWorkspace.allocate(rows, vocab)
    for held in (work.weights, work.kept, work.sums, work.state):
        held.fill_(2**43 + 12345)
    work.best.fill_(math.nan)
    work.best_ids.fill_(7)
    return work


def by_kernels(
    logits: torch.Tensor, rows: list[dict[str, Any]], usable: int = USABLE, **options: Any
) -> list[int]:
    parameters = SamplingParameters.allocate(len(rows))
    for index, row in enumerate(rows):
        parameters.set_row(index, **row)
    out = torch.full((len(rows),), -7, dtype=torch.int32)
    work = poisoned(*logits.shape)
    before = logits.clone()
    sample(logits, parameters, out, num_usable=usable, workspace=work, **options)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    ids: list[int] = out.tolist()
    return ids


def by_engine(logits: torch.Tensor, rows: list[dict[str, Any]], usable: int = USABLE) -> list[int]:
    sampler = Sampler(logits.shape[1], (), usable - 1)
    states = []
    for row in rows:
        fields = {"seed": 0, "index": 0, "position": 0, **row}
        index, position = fields.pop("index"), fields.pop("position")
        state = sampler.new_state(new_request((1,), SamplingParams(**fields)), index)
        state.processors.num_output = position
        states.append(state)
    return sampler.sample(logits, states).token_ids


def test_filters_keep_and_draw_what_the_engine_does() -> None:
    """Every filter alone and all together; ties within a chunk, and over the edge of one."""
    rows: list[dict[str, Any]] = [
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_k": USABLE - 1},
        {"temperature": 2.0, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 0.999},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 5.0, "top_k": 50, "top_p": 0.7},
        {"temperature": 3.0, "top_p": 0.8, "min_p": 0.3},
        {"temperature": 1.0, "top_k": 7, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 0.75},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.5},
        {"temperature": 0.0},
    ]
    logits = random_logits(len(rows))
    logits[9:11] = (logits[9:11] / 3).round()  # a handful of values, many of each
    # All equally likely: top_k leaves them all, top_p takes the lowest 138 and 92 ids.
    logits[10:12] = 0.5
    for index, row in enumerate(rows):
        row |= {"seed": 1004 + index, "index": index % 3, "position": 40 * index}
    assert by_kernels(logits, rows) == by_engine(logits, rows)


def test_top_p_keeps_the_lowest_ids_of_equally_likely_ones_over_chunks() -> None:
    """Ids 0 to 149 of 200; these seeds draw 0.0016, 0.85 and 0.996."""
    rows = [{"temperature": 1.0, "top_p": 0.75, "seed": seed} for seed in (12, 71, 105)]
    logits = torch.zeros(len(rows), VOCAB)
    ids = by_kernels(logits, rows, VOCAB)
    assert ids == by_engine(logits, rows, VOCAB) == [0, 127, 149]


def test_draws_without_filters_at_any_seed_position_and_temperature() -> None:
    rows = [
        {"temperature": temperature, "seed": seed, "position": position, "index": index}
        for temperature in (1e-6, 0.3, 1.0, 50.0)
        for seed, position, index in (
            (0, 0, 0),
            (2**64 - 1, 5, 0),
            (2**63, 2**32 + 3, 2),
            (12345678901234567, 2047, 255),
        )
    ]
    logits = random_logits(len(rows), scale=1.0)
    logits[:, 3::7] = -math.inf
    logits[5] = 1e30 * random_logits(1)[0]
    ids = by_kernels(logits, rows, filters=False)
    assert ids == by_engine(logits, rows)
    assert len(set(ids)) > 8


def test_distribution_of_draws_is_that_of_the_logits() -> None:
    """Pearson's chi-square in 4 cells; 16.3 is passed by one right sampler in 1000."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    rows = [{"temperature": 0.5, "seed": 77, "position": position} for position in range(120)]
    logits = (probabilities.log() * 0.5).repeat(len(rows), 1)
    ids = by_kernels(logits, rows, 4, filters=False)
    counts = torch.bincount(torch.tensor(ids), minlength=4)
    expected = probabilities * len(rows)
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3


@pytest.mark.parametrize("draws", [False, True])
def test_greedy_takes_the_lowest_of_the_likeliest_ids(draws: bool) -> None:
    logits = random_logits(4)
    logits[0, [9, 60, 150]] = 50.0
    logits[1, [130, 170]] = 50.0
    logits[2, [2, USABLE]] = torch.tensor([49.0, 50.0])  # the best of all is not usable
    logits[3] = -math.inf
    logits[3, 140] = -3e38
    rows = [{"temperature": 0.0}] * 4
    assert by_kernels(logits, rows, draws=draws) == by_engine(logits, rows) == [9, 130, 2, 140]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_usable_give_no_id_and_the_others_theirs(temperature: float) -> None:
    logits = random_logits(6)
    logits[0, 17] = math.nan
    logits[1, 150] = math.inf
    logits[2, :USABLE] = -math.inf
    logits[3, VOCAB - 1] = math.nan  # no id there, but the model is broken all the same
    rows = [{"temperature": temperature, "top_p": 0.9, "seed": 5}] * 6
    ids = by_kernels(logits, rows)
    with pytest.raises(NonFiniteLogitsError) as caught:
        by_engine(logits, rows)
    assert caught.value.rows == (0, 1, 2, 3)
    assert ids[:4] == [-1] * 4
    assert ids[4:] == by_engine(logits[4:], rows[4:])


def test_values_without_a_meaning_turn_their_filter_off() -> None:
    logits = random_logits(7)
    plain = {"temperature": 1.0, "seed": 3}
    rows = [
        plain,
        plain | {"top_k": -1},
        plain | {"top_k": 10**6, "top_p": math.nan},
        plain | {"top_p": 0.0, "min_p": math.nan},
        plain | {"top_p": 7.0, "min_p": -1.0},
        {"temperature": math.nan, "top_p": 0.9},
        {"temperature": -1.0, "top_k": 3},
    ]
    expected = by_engine(logits, [plain] * 5 + [{"temperature": 0.0}] * 2)
    assert by_kernels(logits, rows) == expected


def test_positions_advance_where_an_id_was_chosen() -> None:
    """So that the next replay of a graph draws the next number, and nothing is copied to it."""
    logits = random_logits(2)
    logits[1, 0] = math.nan
    parameters = SamplingParameters.allocate(2)
    for row in range(2):
        parameters.set_row(row, temperature=4.0, seed=9, position=2)
    out = torch.empty(2, dtype=torch.int32)
    ids = []
    for _ in range(3):
        sample(logits, parameters, out, filters=False, advance=True)
        ids.append(out.tolist())
    assert parameters.position.tolist() == [5, 2]
    rows = [{"temperature": 4.0, "seed": 9, "position": position} for position in (2, 3, 4)]
    expected = by_engine(logits[[0, 0, 0]], rows, VOCAB)
    assert ids == [[token_id, -1] for token_id in expected]
    assert len(set(expected)) > 1


def test_sizes_that_do_not_belong_together_are_refused() -> None:
    logits, out = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int32)
    parameters = SamplingParameters.allocate(2)
    with pytest.raises(ValueError, match="num_usable is 9 and V 8"):
        sample(logits, parameters, out, num_usable=9)
    with pytest.raises(ValueError, match="2 rows of logits, 1 of parameters"):
        sample(logits, SamplingParameters.allocate(1), out)
    with pytest.raises(ValueError, match="must be float32"):
        sample(logits.half(), parameters, out)
    with pytest.raises(ValueError, match="the workspace is for"):
        sample(logits, parameters, out, workspace=SamplingWorkspace.allocate(1, 8))
    with pytest.raises(ValueError, match="vocab_size must be 1 to 524288"):
        SamplingWorkspace.allocate(1, 2**19 + 1)
