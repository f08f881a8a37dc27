"""The comparison: rounds in which every contestant answers the same prompt, and ratios of rounds.

A machine's speed wanders. Contestants take turns (A B, B A, A B, …), so that a ratio compares two
runs that lie seconds apart, and its spread over the rounds says how far it can be trusted.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptjet.benchmarks.peers.contestants import Contestant, PeerRun
from gptjet.benchmarks.peers.environments import PeerError

# Threads of a library that has just finished may spin for a while before they sleep.
_PAUSE_S = 0.3

Runs = Mapping[str, Sequence[PeerRun]]
"""By contestant; run i of every contestant had the same prompt."""


@dataclass(frozen=True, slots=True)
class Design:
    """What is run: `rounds` prompts of `input_tokens` ids below `vocab_size`."""

    input_tokens: int
    output_tokens: int
    rounds: int
    vocab_size: int
    seed: int = 0

    def prompt(self, number: int) -> tuple[int, ...]:
        """The prompt of a round; round -1 is the warm-up's."""
        generator = random.Random(f"peers/{self.seed}/{number}")
        return tuple(generator.choices(range(self.vocab_size), k=self.input_tokens))


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles and its range."""

    n: int
    median: float
    low: float
    high: float
    minimum: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A contestant beside the baseline.

    equal_tokens   share of the baseline's greedy tokens before the first that differs, per round
    must_be_equal  FP32: another token means another computation
    speedup        baseline's E2E over its own, per round; None where its tokens must be equal and
                   are not: no speed is reported while parity is red
    """

    name: str
    e2e_ms: Spread
    ttft_ms: Spread
    tpot_ms: Spread
    peak_memory_bytes: int | None
    equal_tokens: float
    must_be_equal: bool
    speedup: Spread | None

    @property
    def is_parity_red(self) -> bool:
        """Whether tokens differ that must not."""
        return self.must_be_equal and self.equal_tokens < 1


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name) in order: every second round backwards, so that nobody always comes first."""
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            yield number, name


def run_rounds(
    contestants: Mapping[str, Contestant],
    design: Design,
    on_run: Callable[[int, str, PeerRun], None] = lambda *_: None,
    pause_s: float = _PAUSE_S,
) -> dict[str, list[PeerRun]]:
    """Warm every contestant up once, then make the rounds. Raises PeerError."""
    for contestant in contestants.values():
        contestant.run(design.prompt(-1), design.output_tokens)
    runs: dict[str, list[PeerRun]] = {name: [] for name in contestants}
    for number, name in turns(list(contestants), design.rounds):
        time.sleep(pause_s)
        run = contestants[name].run(design.prompt(number), design.output_tokens)
        if len(run.tokens) != design.output_tokens:
            raise PeerError(f"{name} gave {len(run.tokens)} tokens, not {design.output_tokens}")
        runs[name].append(run)
        on_run(number, name, run)
    return runs


def compare(runs: Runs, baseline: str, weight_type: str) -> list[Comparison]:
    """Every contestant beside the baseline, itself included."""
    return [_compare(name, runs[name], runs[baseline], weight_type) for name in runs]


def _compare(
    name: str, own: Sequence[PeerRun], base: Sequence[PeerRun], weight_type: str
) -> Comparison:
    pairs = list(zip(own, base, strict=True))
    equal = statistics.fmean(equal_share(mine.tokens, theirs.tokens) for mine, theirs in pairs)
    must_be_equal = weight_type == "fp32"
    is_red = must_be_equal and equal < 1
    memory = [run.peak_memory_bytes for run in own if run.peak_memory_bytes is not None]
    return Comparison(
        name=name,
        e2e_ms=spread([run.e2e_ms for run in own]),
        ttft_ms=spread([run.ttft_ms for run in own]),
        tpot_ms=spread([run.tpot_ms for run in own]),
        peak_memory_bytes=max(memory, default=None),
        equal_tokens=equal,
        must_be_equal=must_be_equal,
        speedup=None if is_red else spread([theirs.e2e_ms / mine.e2e_ms for mine, theirs in pairs]),
    )


def equal_share(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """The share of the reference's tokens before the first that differs: after it, all may."""
    equal = 0
    for one, other in zip(tokens, reference, strict=True):
        if one != other:
            break
        equal += 1
    return equal / len(reference)


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles (linear between the order statistics), range."""
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(len(values), statistics.median(values), low, high, min(values), max(values))


def run_to_json(number: int, name: str, run: PeerRun) -> dict[str, Any]:
    """One run as a record of a result file."""
    return {
        "round": number,
        "contestant": name,
        "ttft_ms": run.ttft_ms,
        "tpot_ms": run.tpot_ms,
        "e2e_ms": run.e2e_ms,
        "token_ms": list(run.token_ms),
        "tokens": list(run.tokens),
        "peak_memory_bytes": run.peak_memory_bytes,
    }
