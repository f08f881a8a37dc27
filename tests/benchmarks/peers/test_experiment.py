"""The comparison of peers: turns, ratios, parity; with contestants whose times are invented."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjet.benchmarks.peers.contestants import PeerRun
from gptjet.benchmarks.peers.environments import PeerError
from gptjet.benchmarks.peers.experiment import (
    Design,
    compare,
    equal_share,
    run_rounds,
    spread,
    turns,
)

DESIGN = Design(input_tokens=5, output_tokens=3, rounds=3, vocab_size=50)


def run(e2e_ms: float = 100.0, tokens: Sequence[int] = (1, 2, 3), memory: int = 7) -> PeerRun:
    return PeerRun(tuple(tokens), (40.0, 60.0, 80.0), e2e_ms, memory)


class Invented:
    """Answers with the prompt's first ids, and remembers what it was asked."""

    def __init__(self, log: list[tuple[str, tuple[int, ...]]], name: str, tokens: int = 3) -> None:
        self._log, self._name, self._tokens = log, name, tokens

    def run(self, prompt: Sequence[int], output_tokens: int) -> PeerRun:
        self._log.append((self._name, tuple(prompt)))
        return run(tokens=list(prompt)[: self._tokens])


def test_contestants_take_turns_and_nobody_always_comes_first() -> None:
    order = [name for _, name in turns(["a", "b", "c"], 3)]
    assert order == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_every_contestant_gets_the_prompt_of_the_round_after_one_warm_up() -> None:
    log: list[tuple[str, tuple[int, ...]]] = []
    contestants = {name: Invented(log, name) for name in ("a", "b")}
    runs = run_rounds(contestants, DESIGN, pause_s=0)
    prompts = [DESIGN.prompt(number) for number in (-1, 0, 1, 2)]
    assert len(set(prompts)) == 4
    assert [prompt for name, prompt in log if name == "a"] == prompts
    assert [prompt for name, prompt in log if name == "b"] == prompts
    assert {name: len(each) for name, each in runs.items()} == {"a": 3, "b": 3}
    assert all(len(prompt) == 5 and max(prompt) < 50 for prompt in prompts)


def test_a_contestant_that_answers_another_length_is_no_measurement() -> None:
    with pytest.raises(PeerError, match="b gave 2 tokens, not 3"):
        run_rounds({"a": Invented([], "a"), "b": Invented([], "b", 2)}, DESIGN, pause_s=0)


def test_the_speedup_is_the_ratio_within_each_round() -> None:
    """The machine is twice as slow in the second round for both: the ratio is 2, not a mixture."""
    runs = {"base": [run(100), run(200)], "fast": [run(50), run(100)]}
    base, fast = compare(runs, "base", "fp32")
    assert base.speedup == spread([1.0, 1.0])
    assert fast.speedup == spread([2.0, 2.0])
    assert (fast.ttft_ms.median, fast.tpot_ms.median, fast.peak_memory_bytes) == (40, 20, 7)


def test_no_speed_is_reported_where_fp32_tokens_differ() -> None:
    runs = {"base": [run(), run()], "other": [run(), run(tokens=(1, 9, 3))]}
    _, other = compare(runs, "base", "fp32")
    assert (other.is_parity_red, other.speedup) == (True, None)
    assert other.equal_tokens == pytest.approx((1 + 1 / 3) / 2)


def test_quantised_tokens_may_differ_and_the_share_is_said() -> None:
    _, other = compare({"base": [run()], "other": [run(tokens=(1, 2, 9))]}, "base", "int8")
    assert not other.is_parity_red
    assert other.speedup is not None
    assert other.equal_tokens == pytest.approx(2 / 3)


@given(st.lists(st.integers(0, 3), min_size=1), st.integers(0, 40))
def test_the_equal_share_ends_at_the_first_difference(tokens: list[int], at: int) -> None:
    changed = [token + 10 if i == at else token for i, token in enumerate(tokens)]
    assert equal_share(changed, tokens) == min(at, len(tokens)) / len(tokens)


def test_a_spread_has_quartiles_and_range() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.n, found.median, found.low, found.high) == (5, 3, 2, 4)
    assert (found.minimum, found.maximum) == (1, 5)
    assert spread([7.0]).low == 7.0
