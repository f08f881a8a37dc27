"""Steps that are launched before the last one is read: when, and that nobody can tell.

The paged mock computes at the launch and tells when it is waited for, so a step that reads a block
which was given away too early, or a token that is not there, raises. Random traffic over it is in
test_random_traffic.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from gptjet.service.backends.mock import MockBackend, MockTokenIds
from gptjet.service.engine.backend import SampledBatch
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.request import FinishReason, RequestOutput, SamplingParams, new_request
from gptjet.service.engine.score import ScoreRequest
from gptjet.service.engine.tokenizer import ByteTokenizer


class Traffic:
    """An engine over a mock that samples, and what was said; blocks are counted every step."""

    def __init__(self, backend: MockBackend | None = None, **config: Any) -> None:
        self.backend = backend or MockBackend(paged=True, block_size=4, samples_on_device=True)
        self.engine = Engine(self.backend, ByteTokenizer(), EngineConfig(**config))
        self.ids: dict[int, list[int]] = {}
        self.last: dict[int, RequestOutput] = {}

    def add(self, prompt: str, deadline_ns: int | None = None, **params: Any) -> int:
        options = {"ignore_eos": True, "max_new_tokens": 20, **params}
        return self.engine.add(
            new_request(tuple(prompt.encode()), SamplingParams(**options), deadline_ns=deadline_ns)
        )

    def hear(self, outputs: list[tuple[int, RequestOutput]]) -> None:
        for key, output in outputs:
            self.ids.setdefault(key, []).extend(output.token_ids)
            self.last[key] = output
        self.engine.scheduler.block_manager.check_invariants()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.hear(self.engine.step())

    def run(self) -> None:
        for _ in range(1000):
            if not self.engine.has_work:
                break
            self.step()
        manager = self.engine.scheduler.block_manager
        assert manager.num_free_blocks == manager.num_blocks

    def text(self, key: int) -> str:
        return "".join(map(chr, self.ids[key]))


def test_every_decode_step_but_the_first_is_launched_ahead() -> None:
    traffic = Traffic()
    key = traffic.add("a", max_new_tokens=20)
    traffic.step(3)
    # The prompt gave "b"; each step since has told one token and left one on its way.
    assert traffic.text(key) == "bcd"
    traffic.run()
    assert traffic.text(key) == "bcdefghijklmnopqrstu"
    assert traffic.backend.num_launched_ahead == 18


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 1},
        {"typical_p": 0.9, "temperature": 1.0},
        {"frequency_penalty": 0.5},
        {"logit_bias": {98: 1.0}},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 20, "stop_token_ids": (99,)},
    ],
)
def test_what_needs_the_host_is_sampled_there(params: dict[str, Any]) -> None:
    traffic = Traffic()
    traffic.add("a", **params)
    plain = traffic.add("k")
    traffic.run()
    assert traffic.backend.num_launched_ahead == 0
    assert traffic.text(plain) == "lmnopqrstuvwxyzabcde"


def test_stops_may_be_held_back_first_and_sampled_on_the_device_then() -> None:
    traffic = Traffic()
    key = traffic.add("a", min_new_tokens=5, stop_token_ids=(ord("j"),))
    traffic.run()
    assert traffic.text(key) == "bcdefghij"
    assert traffic.last[key].finish_reason is FinishReason.STOP_TOKEN
    assert 0 < traffic.backend.num_launched_ahead < 5


def test_token_that_was_computed_after_the_end_is_told_to_nobody() -> None:
    traffic = Traffic()
    ended = traffic.add("The X", ignore_eos=False)
    stopped = traffic.add("d", stop=("ghi",))
    other = traffic.add("k")
    traffic.run()
    assert traffic.ids[ended] == [ord("Y"), ord("Z"), 256]
    assert traffic.text(stopped) == "efghi"
    assert traffic.text(other) == "lmnopqrstuvwxyzabcde"
    assert not traffic.engine.has_work


def test_cancelled_in_flight_its_blocks_are_free_at_once_and_its_token_is_dropped() -> None:
    traffic = Traffic()
    leaving, staying = traffic.add("a"), traffic.add("k")
    traffic.step(4)
    assert traffic.engine._steps.in_flight is not None
    held = traffic.engine.scheduler.block_manager.num_free_blocks
    said = list(traffic.ids[leaving])
    traffic.hear(traffic.engine.cancel(leaving))
    assert traffic.engine.scheduler.block_manager.num_free_blocks > held
    traffic.run()
    assert traffic.ids[leaving] == said
    assert traffic.last[leaving].finish_reason is FinishReason.CANCELLED
    assert traffic.text(staying) == "lmnopqrstuvwxyzabcde"


def test_everyone_gone_in_flight_the_next_request_starts_anew() -> None:
    traffic = Traffic()
    key = traffic.add("a")
    traffic.step(3)
    traffic.hear(traffic.engine.cancel(key))
    assert not traffic.engine.has_work
    other = traffic.add("k", max_new_tokens=3)
    traffic.step()
    assert traffic.text(other) == "l"  # at once: what is in flight is nobody's
    traffic.run()
    assert traffic.text(other) == "lmn"


def test_deadline_passes_in_flight() -> None:
    traffic = Traffic()
    key = traffic.add("a", deadline_ns=time.monotonic_ns() + 10**11)
    traffic.step(3)
    traffic.engine._deadlines[0] = (0, key)
    traffic.run()
    assert traffic.last[key].finish_reason is FinishReason.DEADLINE
    assert traffic.text(key) == "bcd"


def test_arrivals_join_after_the_step_in_flight() -> None:
    traffic = Traffic()
    first = traffic.add("a")
    traffic.step(3)
    second = traffic.add("k")
    traffic.step(2)
    # The step in flight was read, without another one after it; then came the prompt.
    assert (traffic.text(first), traffic.text(second)) == ("bcde", "l")
    traffic.run()
    assert traffic.text(first) == "bcdefghijklmnopqrstu"
    assert traffic.text(second) == "lmnopqrstuvwxyzabcde"


@pytest.mark.parametrize("steps", [0, 3])
def test_preempted_in_flight_the_token_is_drawn_again(steps: int) -> None:
    """Beside one that goes on, so that the step is read; its blocks are another's by then."""
    traffic, alone = Traffic(prefix_cache=False), Traffic(prefix_cache=False)
    options = {"temperature": 1.3, "max_new_tokens": 30}
    keys = [traffic.add(prompt, seed=seed, **options) for seed, prompt in enumerate("ak")]
    expected = [alone.add(prompt, seed=seed, **options) for seed, prompt in enumerate("ak")]
    alone.run()
    manager = traffic.engine.scheduler.block_manager
    for holder in range(10**9, 10**9 + 3):
        traffic.step(steps)
        scheduler = traffic.engine.scheduler
        while len(scheduler.running) < 2:
            traffic.step()
        scheduler.preempt(max(scheduler.running, key=lambda sequence: sequence.sequence_id))
        # Somebody else has what it held before it comes back.
        assert manager.allocate(holder, 8) is not None
        traffic.step(2)
    for holder in range(10**9, 10**9 + 3):
        manager.free(holder)
    traffic.run()
    for key, other in zip(keys, expected, strict=True):
        assert len(traffic.ids[key]) == 30
        assert traffic.ids[key] == alone.ids[other]


def test_little_memory_makes_it_wait_and_preempt_as_without() -> None:
    """Twelve blocks of four tokens for three sequences of seven blocks."""
    said = []
    for on_device in (True, False):
        backend = MockBackend(
            paged=True, block_size=4, num_kv_blocks=12, samples_on_device=on_device
        )
        traffic = Traffic(backend, prefix_cache=False)
        keys = [traffic.add(prompt, temperature=1.1, seed=3, max_new_tokens=24) for prompt in "akx"]
        traffic.run()
        said.append([traffic.ids[key] for key in keys])
        assert (backend.num_launched_ahead > 0) is on_device
    assert said[0] == said[1]


def test_more_running_than_fit_a_step_take_turns() -> None:
    backend = MockBackend(paged=True, block_size=4, max_batch_size=2, samples_on_device=True)
    traffic = Traffic(backend)
    keys = [traffic.add(prompt, max_new_tokens=9) for prompt in "akdqt"]
    traffic.run()
    assert [traffic.text(key) for key in keys] == [
        "bcdefghij",
        "lmnopqrst",
        "efghijklm",
        "rstuvwxyz",
        "uvwxyzabc",
    ]
    assert backend.num_launched_ahead > 10


def test_score_request_is_not_kept_waiting_by_steps_in_flight() -> None:
    traffic = Traffic()
    traffic.add("a", max_new_tokens=200)
    traffic.step(5)
    ahead = traffic.backend.num_launched_ahead
    outcomes: list[Any] = []
    request = ScoreRequest(
        request_id="", prompt_token_ids=tuple(b"ab"), candidates=((99,), (100,)), arrival_ns=0
    )
    traffic.engine.add_score(request, outcomes.append)
    for _ in range(12):
        traffic.step()
    assert len(outcomes) == 1
    assert outcomes[0].error is None
    traffic.run()
    assert traffic.backend.num_launched_ahead > ahead


class Broken(MockBackend):
    """`spoil` is given each launched step, and may raise or change its ids."""

    def __init__(self, spoil: Callable[[int, SampledBatch, MockTokenIds], Any]) -> None:
        super().__init__(paged=True, block_size=4, samples_on_device=True)
        self._spoil = spoil
        self.num_steps = 0

    def decode_and_sample(self, batch: SampledBatch) -> Any:
        self.num_steps += 1
        return self._spoil(self.num_steps, batch, super().decode_and_sample(batch))


class Raising:
    def wait(self) -> list[int]:
        raise RuntimeError("the card fell off the bus")


def test_row_that_is_not_finite_fails_its_sequence_alone() -> None:
    def spoil(step: int, batch: SampledBatch, ids: MockTokenIds) -> Any:
        if step == 4:
            ids._token_ids[0] = -1
        return ids

    traffic = Traffic(Broken(spoil))
    bad, good = traffic.add("a"), traffic.add("k")
    traffic.run()
    assert traffic.last[bad].finish_reason is FinishReason.ERROR
    assert "not finite in row 0" in str(traffic.last[bad].error)
    assert traffic.text(bad) == "bcde"
    assert traffic.text(good) == "lmnopqrstuvwxyzabcde"


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_step_that_fails_ends_its_sequences_and_the_engine_goes_on(where: str) -> None:
    def spoil(step: int, batch: SampledBatch, ids: MockTokenIds) -> Any:
        if step == 4 and where == "launch":
            raise RuntimeError("the card fell off the bus")
        return Raising() if step == 4 else ids

    traffic = Traffic(Broken(spoil))
    keys = [traffic.add("a"), traffic.add("k")]
    traffic.run()
    for key in keys:
        assert traffic.last[key].finish_reason is FinishReason.ERROR
        assert traffic.last[key].summary is not None
        assert len(traffic.ids[key]) <= 4
    after = traffic.add("d", max_new_tokens=5)
    traffic.run()
    assert traffic.text(after) == "efghi"


def test_continuations_of_one_prompt_are_copied_and_go_on_ahead() -> None:
    traffic, alone = Traffic(), Traffic(max_sequences=1, prefix_cache=False)
    options: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 4, "max_new_tokens": 9}
    said = []
    for one in (traffic, alone):
        ids: dict[int, list[int]] = {}
        one.engine.add(new_request(tuple(b"abcdef"), SamplingParams(ignore_eos=True, **options)))
        while one.engine.has_work:
            for _, output in one.engine.step():
                ids.setdefault(output.index, []).extend(output.token_ids)
            one.engine.scheduler.block_manager.check_invariants()
        said.append(ids)
    assert said[0] == said[1]
    assert traffic.backend.num_launched_ahead > 0
