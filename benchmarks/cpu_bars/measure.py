"""One contestant's part of one round: what is asked of it, and the figures that come of it."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from gptjet.benchmarks.cpu_bars.busy import busy_cores
from gptjet.benchmarks.cpu_bars.design import (
    LATE_INPUT_TOKENS,
    LATE_STREAMS,
    PREFIX_TAIL_TOKENS,
    STREAMS,
    Cell,
    CellKind,
)
from gptjet.benchmarks.peers.contestants import (
    Contestant,
    LateContestant,
    PeerRun,
    StreamsContestant,
)
from gptjet.benchmarks.peers.environments import PeerError

Figures = dict[str, Any]

# Threads of a library that has just finished may spin for a while before they sleep.
PAUSE_S = 0.3
# Of each stream, before the long prompt comes.
_EARLY_TOKENS = 8

Load = Callable[[], AbstractContextManager[object]]


def measure(
    contestant: Contestant,
    cell: Cell,
    model: str,
    number: int,
    vocab_size: int,
    *,
    load: Load = busy_cores,
    pause_s: float = PAUSE_S,
) -> Figures:
    """The figures of a round, -1 being the warm-up's; times in ms, rates in tokens a second.

    Raises PeerError where the contestant fails, cannot do it, or answers another length.
    """
    time.sleep(pause_s)

    def prompt(name: str = "") -> tuple[int, ...]:
        return cell.prompt(model, number, vocab_size, name)

    match cell.kind:
        case CellKind.DECODE | CellKind.PREFILL:
            return _single(_run(contestant, prompt(), cell.output_tokens))
        case CellKind.STREAMS | CellKind.COST:
            return _streams(contestant, prompt, cell.output_tokens, pause_s)
        case CellKind.PREFIX:
            return _prefix(contestant, cell, prompt)
        case CellKind.CHUNKS:
            return _chunks(contestant, prompt, cell.output_tokens)
        case CellKind.BUSY:
            quiet = _single(_run(contestant, prompt("quiet"), cell.output_tokens))
            with load() if number >= 0 else contextlib.nullcontext():
                busy = _single(_run(contestant, prompt("busy"), cell.output_tokens))
            return {
                "quiet_tokens_per_s": quiet["tokens_per_s"],
                "busy_tokens_per_s": busy["tokens_per_s"],
            }


def _single(run: PeerRun) -> Figures:
    return {
        "ttft_ms": run.ttft_ms,
        "tpot_ms": run.tpot_ms,
        "tokens_per_s": tokens_per_s([run]),
        "tokens": list(run.tokens),
        "peak_memory_bytes": run.peak_memory_bytes,
    }


def _streams(
    contestant: Contestant,
    prompt: Callable[[str], tuple[int, ...]],
    output_tokens: int,
    pause_s: float,
) -> Figures:
    if not isinstance(contestant, StreamsContestant):
        raise PeerError("it runs one prompt at a time")
    one = _run(contestant, prompt("one"), output_tokens)
    time.sleep(pause_s)
    prompts = [prompt(f"stream {index}") for index in range(STREAMS)]
    runs = contestant.run_together(prompts, output_tokens)
    for run in runs:
        _check_length(run, output_tokens)
    return {
        "one_tokens_per_s": tokens_per_s([one]),
        "many_tokens_per_s": tokens_per_s(runs),
        "streams": len(runs),
        "many_e2e_ms": max(run.e2e_ms for run in runs),
    }


def _chunks(
    contestant: Contestant, prompt: Callable[[str], tuple[int, ...]], output_tokens: int
) -> Figures:
    """Gaps between a stream's tokens before the long prompt comes, and until its first token."""
    if not isinstance(contestant, LateContestant):
        raise PeerError("it takes no prompt while others run")
    names = [f"stream {index}" for index in range(LATE_STREAMS)]
    prompts = [prompt(name)[:LATE_INPUT_TOKENS] for name in names]
    runs, late = contestant.run_beside(prompts, output_tokens, prompt("late"), _EARLY_TOKENS)
    for run in runs:
        _check_length(run, output_tokens)
    first_ms = late.added_ms + late.ttft_ms
    if min(run.token_ms[-1] for run in runs) < first_ms:
        raise PeerError("the streams ended before the long prompt was computed")
    gaps = [pair for run in runs for pair in itertools.pairwise(run.token_ms)]
    quiet = [end - begin for begin, end in gaps if end <= late.added_ms]
    beside = [end - begin for begin, end in gaps if end > late.added_ms and begin < first_ms]
    return {
        "quiet_itl_ms": statistics.median(quiet),
        "itl_ms": statistics.median(beside),
        "longest_itl_ms": max(beside),
        "late_ttft_ms": late.ttft_ms,
        "streams": len(runs),
    }


def _prefix(
    contestant: Contestant, cell: Cell, prompt: Callable[[str], tuple[int, ...]]
) -> Figures:
    shared = prompt("shared")
    first, second = (
        _run(contestant, shared + prompt(name)[:PREFIX_TAIL_TOKENS], cell.output_tokens)
        for name in ("first tail", "second tail")
    )
    return {"first_ttft_ms": first.ttft_ms, "second_ttft_ms": second.ttft_ms}


def tokens_per_s(runs: Sequence[PeerRun]) -> float | None:
    """Tokens a second of all streams, while every one of them streams; None for single tokens.

    From the moment the last stream has its first token to the moment the first one has its last:
    for one stream, its tokens after the first over the time they take.
    """
    begin_ms = max(run.token_ms[0] for run in runs)
    end_ms = min(run.token_ms[-1] for run in runs)
    if end_ms <= begin_ms:
        return None
    made = sum(begin_ms < when <= end_ms for run in runs for when in run.token_ms)
    return 1000 * made / (end_ms - begin_ms)


def _run(contestant: Contestant, prompt: Sequence[int], output_tokens: int) -> PeerRun:
    run = contestant.run(prompt, output_tokens)
    _check_length(run, output_tokens)
    return run


def _check_length(run: PeerRun, output_tokens: int) -> None:
    if len(run.tokens) != output_tokens:
        raise PeerError(f"it gave {len(run.tokens)} tokens, not {output_tokens}")
