"""Races: interleaved rounds, resuming, contestants that cannot start or break on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gptjet.benchmarks.cpu_bars.design import Cell, CellKind, Entry, Race
from gptjet.benchmarks.cpu_bars.measure import measure, tokens_per_s
from gptjet.benchmarks.peers.contestants import LateRun, PeerRun
from gptjet.benchmarks.peers.environments import PeerError

OURS, THEIRS = Entry("engine:fused", "fp32"), Entry("ctranslate2", "fp32")
DECODE = Cell(CellKind.DECODE, 4, 6, 3)
STREAMS = Cell(CellKind.STREAMS, 4, 6, 2)
BUSY = Cell(CellKind.BUSY, 4, 6, 2)


def race(*cells: Cell) -> Race:
    return Race("S", "fp32", (OURS, THEIRS), cells or (DECODE,))


@pytest.fixture
def both(field: Any, invented: Any, invented_engine: Any) -> Any:
    field.contestants = {str(OURS): invented_engine(ms=2.0), str(THEIRS): invented(ms=4.0)}
    return field


def test_every_round_is_one_record_with_everybody_in_it(
    both: Any, run_races: Callable[..., Any]
) -> None:
    recorded, notes = run_races([race()])
    assert sorted(recorded.rounds) == [("S/fp32", DECODE.key, n) for n in range(3)]
    for figures in recorded.rounds.values():
        assert (figures[str(OURS)]["tpot_ms"], figures[str(THEIRS)]["tpot_ms"]) == (2.0, 4.0)
        assert figures[str(OURS)]["tokens_per_s"] == pytest.approx(500)
        assert figures[str(OURS)]["tokens"] == figures[str(THEIRS)]["tokens"]
    ours, theirs = (both.contestants[str(entry)] for entry in (OURS, THEIRS))
    assert ours.prompts == theirs.prompts
    assert len(set(ours.prompts)) == 4  # one of them warms up
    assert (notes.steps, notes.done) == (6, 6)
    assert both.most_alive == 2


def test_a_race_that_is_on_file_starts_nobody(both: Any, run_races: Callable[..., Any]) -> None:
    run_races([race()])
    both.started.clear()
    recorded, notes = run_races([race()])
    assert both.started == []
    assert (notes.steps, len(recorded.rounds)) == (0, 3)


def test_only_the_rounds_that_a_kill_took_are_made_again(
    both: Any, run_races: Callable[..., Any]
) -> None:
    class Killed(BaseException):
        pass

    ours = both.contestants[str(OURS)]
    run, calls = ours.run, []

    def run_until_killed(prompt: Any, output_tokens: int) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the warm-up, two rounds, and in the third
            raise Killed
        return run(prompt, output_tokens)

    ours.run = run_until_killed
    with pytest.raises(Killed):
        run_races([race()])
    ours.run = run
    ours.prompts.clear()
    recorded, notes = run_races([race()])
    assert len(recorded.rounds) == 3
    assert notes.steps == 2
    assert ours.prompts == [DECODE.prompt("S", -1, 50), DECODE.prompt("S", 2, 50)]


def test_who_cannot_start_is_recorded_with_the_reason_and_the_others_go_on(
    both: Any, invented: Any, run_races: Callable[..., Any]
) -> None:
    del both.contestants[str(THEIRS)]
    recorded, notes = run_races([race()])
    assert recorded.absent == {("S/fp32", str(THEIRS)): "ctranslate2/fp32 is not set up"}
    assert [set(figures) for figures in recorded.rounds.values()] == [{str(OURS)}] * 3
    assert notes.done == notes.steps

    both.started.clear()
    run_races([race()])
    assert both.started == []  # nobody who is missing could start, so nobody else is needed

    both.contestants[str(THEIRS)] = invented(ms=4.0)
    recorded, _ = run_races([race()])
    assert recorded.absent == {}
    assert all(set(f) == {str(OURS), str(THEIRS)} for f in recorded.rounds.values())


def test_who_breaks_on_the_way_is_out_and_the_others_finish(
    both: Any, run_races: Callable[..., Any]
) -> None:
    both.contestants[str(THEIRS)].fails_at = 2
    recorded, notes = run_races([race()])
    assert recorded.failures == {("S/fp32", str(THEIRS)): f"{DECODE.key}: it broke"}
    sizes = [len(recorded.rounds["S/fp32", DECODE.key, number]) for number in range(3)]
    assert sizes == [2, 1, 1]
    assert notes.done == notes.steps


def test_another_length_is_another_cell(both: Any, run_races: Callable[..., Any]) -> None:
    run_races([race()])
    longer = Cell(CellKind.DECODE, 4, 7, 3)
    _, notes = run_races([race(longer)])
    assert notes.steps == 6


def test_eight_streams_are_measured_beside_one_of_the_same_round(
    both: Any, run_races: Callable[..., Any]
) -> None:
    recorded, _ = run_races([race(STREAMS)])
    (figures,) = recorded.rounds["S/fp32", STREAMS.key, 0].values()
    # Together they take twice as long as one: 8 streams give 4 times the tokens a second.
    assert figures["one_tokens_per_s"] == pytest.approx(500)
    assert figures["many_tokens_per_s"] == pytest.approx(2000)
    assert figures["streams"] == 8


class Late:
    """Two streams of a token every 10 ms; a prompt comes at 25 ms and holds them up for 100 ms."""

    def __init__(self, last_ms: float) -> None:
        self.last_ms = last_ms

    def run(self, prompt: Any, output_tokens: int) -> PeerRun:
        raise NotImplementedError

    def run_beside(
        self, prompts: Any, output_tokens: int, late: Any, after_tokens: int
    ) -> tuple[list[PeerRun], LateRun]:
        assert (len(prompts), len(prompts[0]), len(late)) == (4, 32, 40)
        assert len({prompt[:8] for prompt in [*prompts, late]}) == 5
        times = (10.0, 20.0, 30.0, 130.0, self.last_ms)
        return [PeerRun((1,) * output_tokens, times, self.last_ms, None)] * 2, LateRun(25.0, 106.0)


def test_what_a_late_prompt_does_to_streams_is_told_from_what_was_before() -> None:
    cell = Cell(CellKind.CHUNKS, 40, 5, 1)
    figures = measure(Late(140.0), cell, "M", 0, 50, pause_s=0)
    assert (figures["quiet_itl_ms"], figures["longest_itl_ms"]) == (10.0, 100.0)
    assert (figures["itl_ms"], figures["late_ttft_ms"]) == (10.0, 106.0)
    with pytest.raises(PeerError, match="ended before the long prompt"):
        measure(Late(130.5), cell, "M", 0, 50, pause_s=0)


def test_who_takes_no_prompt_while_others_run_says_so(invented_engine: Any) -> None:
    with pytest.raises(PeerError, match="no prompt while others run"):
        measure(invented_engine(ms=1.0), Cell(CellKind.CHUNKS, 40, 5, 1), "M", 0, 50, pause_s=0)


def test_load_is_on_during_the_second_run_of_a_busy_round_and_not_in_the_warm_up(
    both: Any, run_races: Callable[..., Any]
) -> None:
    ours = both.contestants[str(OURS)]
    log: list[str] = []

    @contextlib.contextmanager
    def load() -> Iterator[None]:
        log.append(f"on after {len(ours.prompts)} of ours")
        ours.ms *= 3
        yield
        ours.ms /= 3
        log.append("off")

    recorded, _ = run_races([race(BUSY)], load=load)
    figures = recorded.rounds["S/fp32", BUSY.key, 0][str(OURS)]
    assert figures["quiet_tokens_per_s"] == pytest.approx(500)
    assert figures["busy_tokens_per_s"] == pytest.approx(500 / 3)
    assert len(log) == 2 * 2 * BUSY.rounds
    assert log[0] == "on after 3 of ours"  # two of the warm-up, one quiet


def test_a_prefix_round_asks_twice_for_the_same_beginning(invented: Any) -> None:
    cell = Cell(CellKind.PREFIX, 32, 1, 1)
    contestant = invented(ms=5.0)
    measure(contestant, cell, "S", 0, 50, pause_s=0)
    first, second = contestant.prompts
    assert first[:32] == second[:32]
    assert first[32:] != second[32:]
    assert len(first) == len(second) == 48


def test_a_contestant_of_single_prompts_cannot_run_streams(invented: Any) -> None:
    with pytest.raises(PeerError, match="one prompt at a time"):
        measure(invented(ms=1.0), STREAMS, "S", 0, 50, pause_s=0)


def test_another_number_of_tokens_is_no_measurement(invented: Any) -> None:
    contestant = invented(ms=1.0)
    contestant.run = lambda prompt, n: PeerRun((1, 2), (1.0, 2.0), 2.0, None)
    with pytest.raises(PeerError, match="it gave 2 tokens, not 6"):
        measure(contestant, DECODE, "S", 0, 50, pause_s=0)


def test_the_rate_of_streams_counts_while_all_of_them_stream() -> None:
    """One streams from 10 to 40 ms, the other from 20 to 50: between 20 and 40 they make 2 each."""
    early = PeerRun((0,) * 4, (10.0, 20.0, 30.0, 40.0), 40.0, None)
    late = PeerRun((0,) * 4, (20.0, 30.0, 40.0, 50.0), 50.0, None)
    assert tokens_per_s([early, late]) == pytest.approx(4 / 0.020)
    assert tokens_per_s([early]) == pytest.approx(3 / 0.030)
    assert tokens_per_s([PeerRun((0,), (5.0,), 5.0, None)]) is None
    assert tokens_per_s([early, PeerRun((0,) * 2, (60.0, 70.0), 70.0, None)]) is None
