"""One measured request: exact lengths, and a monotonic clock at the client.

The clock stops before anything is computed from what came, and a run whose lengths are not exactly
what the cell says is an error, never a sample.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from gptjet.service.client_types import FinishReason, GenerationSummary, ModelInfo, TokenChunk


class MeasureError(Exception):
    """A request was answered, but not with what the cell asks for."""


class Stream(Protocol):
    """What `Client.generate_stream` returns; `summary` is set when it has ended by itself."""

    summary: GenerationSummary | None

    def __iter__(self) -> Iterator[TokenChunk]: ...


class StreamClient(Protocol):
    """The part of gptjet.service.client.Client that a sweep uses."""

    def generate_stream(
        self, prompt: Sequence[int], *, timeout_s: float | None = None, **options: Any
    ) -> AbstractContextManager[Stream]:
        """Start a request."""
        ...

    def get_model(self) -> ModelInfo:
        """What is served."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


@dataclass(frozen=True, slots=True)
class Measurement:
    """One request, in ms. See records.Sample for what each time is."""

    ttft_ms: float
    itl_ms: tuple[float, ...]
    e2e_ms: float
    server: dict[str, float]


def measure(
    client: StreamClient, prompt: Sequence[int], output_tokens: int, *, timeout_s: float
) -> Measurement:
    """Stream `output_tokens` greedy tokens after `prompt`, end-of-text ignored.

    Raises GptjetError where the call fails, and MeasureError where the answer has another length.
    """
    clock = time.perf_counter_ns
    arrivals: list[tuple[int, int]] = []  # (ns, tokens in the chunk)
    started = clock()
    with client.generate_stream(
        prompt,
        timeout_s=timeout_s,
        max_new_tokens=output_tokens,
        min_new_tokens=output_tokens,
        ignore_eos=True,
        temperature=0.0,
    ) as stream:
        for chunk in stream:
            if chunk.token_ids:
                arrivals.append((clock(), len(chunk.token_ids)))
        ended = clock()
        summary = stream.summary
    _check(summary, len(prompt), output_tokens, sum(count for _, count in arrivals))
    assert summary is not None, "_check sees to it"
    timings = summary.timings
    return Measurement(
        ttft_ms=(arrivals[0][0] - started) / 1e6,
        itl_ms=_gaps_ms(arrivals),
        e2e_ms=(ended - started) / 1e6,
        server={
            "queue_ms": timings.queue_ms,
            "prefill_ms": timings.prefill_ms,
            "decode_ms": timings.decode_ms,
            "ttft_ms": timings.ttft_ms,
            "e2e_ms": timings.e2e_ms,
        },
    )


def _gaps_ms(arrivals: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """One gap for each token after the first. Tokens that came in one chunk came 0 ms apart."""
    gaps: list[float] = [0.0] * (arrivals[0][1] - 1)
    for (before, _), (now, count) in itertools.pairwise(arrivals):
        gaps += [(now - before) / 1e6, *([0.0] * (count - 1))]
    return tuple(gaps)


def _check(
    summary: GenerationSummary | None, input_tokens: int, output_tokens: int, received: int
) -> None:
    if summary is None:
        raise MeasureError("the stream ended without a summary")
    if summary.finish_reason != FinishReason.LENGTH:
        raise MeasureError(f"the request ended by {summary.finish_reason.value}, not by length")
    found = (summary.prompt_tokens, summary.completion_tokens, received)
    if found != (input_tokens, output_tokens, output_tokens):
        raise MeasureError(
            f"asked for {input_tokens} tokens in and {output_tokens} out, the server counted "
            f"{summary.prompt_tokens} in and {summary.completion_tokens} out, {received} arrived"
        )
