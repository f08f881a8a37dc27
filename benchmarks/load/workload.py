"""What is sent: requests drawn from distributions, taken from a file of prompts, or from a trace.

A plan is a pure function of its spec. Each worker process makes the same plan and sends its share,
so prompts need not travel between processes and a run can be repeated request by request.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptjet.benchmarks.load.arrivals import arrival_times_ns
from gptjet.benchmarks.load.lengths import Lengths, parse_lengths

_NS = 1_000_000_000


class WorkloadError(Exception):
    """The workload cannot be made; the message is one line for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """Everything a plan depends on, as plain JSON data.

    rate           requests a second of an open loop; None: closed loop, or the trace's own times
    requests       how many; None: as many as fit `duration_s` (a trace: all of it)
    duration_s     an open loop sends what is intended before it; None: no end in time
    prompts_file   text, one prompt a line, drawn at random instead of token ids
    trace_file     JSONL, see `read_trace`; `trace_speed` 2 plays it in half the time
    vocab_size     ids are drawn below it, and never `eos_token_id`
    max_context    prompt and output together; longer draws are cut
    """

    vocab_size: int
    max_context: int
    eos_token_id: int | None = None
    rate: float | None = None
    arrivals: str = "poisson"
    requests: int | None = None
    duration_s: float | None = None
    prompt_tokens: str = "128"
    output_tokens: str = "64"
    prompts_file: str | None = None
    trace_file: str | None = None
    trace_speed: float = 1.0
    closed: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to send. `intended_ns` counts from the start; None: when a slot is free.

    `prompt_tokens` is None for text, whose length only the server knows.
    """

    index: int
    intended_ns: int | None
    prompt: str | tuple[int, ...]
    prompt_tokens: int | None
    output_tokens: int
    was_cut: bool = False


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One line of a trace: a prompt, or how long it is."""

    arrival_ns: int
    prompt: str | None
    prompt_tokens: int | None
    output_tokens: int


def plan_requests(
    spec: WorkloadSpec, worker: int = 0, workers: int = 1
) -> Iterator[PlannedRequest]:
    """The requests of one worker of several, in the order of their intended times.

    Raises WorkloadError where a file cannot be used or a length is not one.
    """
    shapes = _trace_shapes(spec) if spec.trace_file else _drawn_shapes(spec)
    share = itertools.islice(shapes, worker, None, workers)
    return (_with_prompt(spec, shape) for shape in share)


def read_trace(path: str | Path) -> list[TraceEntry]:
    """Lines of {"arrival_s", "prompt" or "prompt_tokens", "output_tokens"}, sorted by arrival.

    Raises WorkloadError, naming the line, where one is not that.
    """
    entries = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            entries.append(_trace_entry(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            detail = f"{error}" if isinstance(error, ValueError) else f"needs {error}"
            raise WorkloadError(f"{Path(path).name}: line {number}: {detail}") from None
    if not entries:
        raise WorkloadError(f"{Path(path).name} holds no requests")
    return sorted(entries, key=lambda entry: entry.arrival_ns)


def _trace_entry(fields: Any) -> TraceEntry:
    if not isinstance(fields, dict):
        raise ValueError("a JSON object is needed")
    unknown = set(fields) - {"arrival_s", "prompt", "prompt_tokens", "output_tokens"}
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]}")
    if ("prompt" in fields) == ("prompt_tokens" in fields):
        raise ValueError("give either prompt or prompt_tokens")
    arrival_s, output = float(fields["arrival_s"]), fields["output_tokens"]
    prompt, length = fields.get("prompt"), fields.get("prompt_tokens")
    if not 0 <= arrival_s < float("inf"):
        raise ValueError("arrival_s must be 0 or more")
    if not (prompt is None or (isinstance(prompt, str) and prompt)):
        raise ValueError("prompt must be a text")
    for name, count in (("prompt_tokens", length), ("output_tokens", output)):
        is_absent = name == "prompt_tokens" and prompt is not None
        if not is_absent and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ValueError(f"{name} must be a whole number of 1 or more")
    return TraceEntry(round(arrival_s * _NS), prompt, length, output)


class _Shape(NamedTuple):
    """A request before its token ids are drawn: a text, or the length of a prompt."""

    number: int
    intended_ns: int | None
    text: str | None
    prompt_tokens: int | None
    output_tokens: int


def _trace_shapes(spec: WorkloadSpec) -> Iterator[_Shape]:
    entries = read_trace(spec.trace_file or "")
    first_ns = entries[0].arrival_ns
    for index, entry in enumerate(entries[: spec.requests]):
        intended_ns = round((entry.arrival_ns - first_ns) / spec.trace_speed)
        if spec.duration_s is not None and intended_ns >= spec.duration_s * _NS:
            return
        when = None if spec.closed else intended_ns
        yield _Shape(index, when, entry.prompt, entry.prompt_tokens, entry.output_tokens)


def _drawn_shapes(spec: WorkloadSpec) -> Iterator[_Shape]:
    try:
        prompt_lengths = parse_lengths(spec.prompt_tokens)
        output_lengths = parse_lengths(spec.output_tokens)
        times: Iterator[int | None] = itertools.repeat(None)
        if spec.rate is not None:
            times = arrival_times_ns(spec.arrivals, spec.rate, spec.seed)
    except ValueError as error:
        raise WorkloadError(str(error)) from None
    texts = _prompts(spec.prompts_file) if spec.prompts_file else None
    return _draw_shapes(spec, prompt_lengths, output_lengths, times, texts)


def _draw_shapes(
    spec: WorkloadSpec,
    prompt_lengths: Lengths,
    output_lengths: Lengths,
    times: Iterator[int | None],
    texts: list[str] | None,
) -> Iterator[_Shape]:
    generator = random.Random(f"lengths/{spec.seed}")
    end_ns = float("inf") if spec.duration_s is None else spec.duration_s * _NS
    for index, intended_ns in enumerate(times):
        if spec.requests is not None and index >= spec.requests:
            return
        if intended_ns is not None and intended_ns >= end_ns:
            return
        text = generator.choice(texts) if texts else None
        length = None if texts else prompt_lengths.draw(generator)
        yield _Shape(index, intended_ns, text, length, output_lengths.draw(generator))


def _with_prompt(spec: WorkloadSpec, shape: _Shape) -> PlannedRequest:
    index, intended_ns, text, length, output = shape
    if text is not None:
        kept = min(output, spec.max_context - 1)
        return PlannedRequest(index, intended_ns, text, None, kept, kept != output)
    assert length is not None, "a shape has a text or a length"
    kept_length = min(length, spec.max_context - 1)
    kept_output = min(output, spec.max_context - kept_length)
    prompt = _random_ids(spec, index, kept_length)
    was_cut = (kept_length, kept_output) != (length, output)
    return PlannedRequest(index, intended_ns, prompt, kept_length, kept_output, was_cut)


def _random_ids(spec: WorkloadSpec, index: int, length: int) -> tuple[int, ...]:
    """Different for each request, so that no cache of prefixes can help; never end-of-text."""
    generator = random.Random(f"prompt/{spec.seed}/{index}")
    if spec.eos_token_id is None or not 0 <= spec.eos_token_id < spec.vocab_size:
        return tuple(generator.choices(range(spec.vocab_size), k=length))
    draws = generator.choices(range(spec.vocab_size - 1), k=length)
    return tuple(draw + (draw >= spec.eos_token_id) for draw in draws)


def _prompts(path: str) -> list[str]:
    prompts = [line for line in _lines(path) if line.strip()]
    if not prompts:
        raise WorkloadError(f"{Path(path).name} holds no prompts: one a line is needed")
    return prompts


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise WorkloadError(f"{Path(path).name}: {reason}") from None
