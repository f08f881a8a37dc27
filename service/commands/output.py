"""What `gptjet generate` prints: text as it comes, one JSON object, or one a line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import typer

from gptjet.service.commands.terminal import print_note, printable

if TYPE_CHECKING:
    from gptjet.service.client import GenerationSummary, TokenChunk, TokenLogprob


class Printer(Protocol):
    """Takes the events of one request in order."""

    def chunk(self, chunk: TokenChunk) -> None:
        """What a step added."""
        ...

    def end(self, summary: GenerationSummary) -> None:
        """The request is over."""
        ...

    def interrupt(self) -> None:
        """It will not be: leave the terminal at the start of a line."""
        ...


class TextPrinter:
    """Text on stdout the moment it is there; one line about the speed on stderr at the end.

    Of several sequences the first one is shown live, the others below it when all have ended.
    """

    def __init__(self, n: int, *, show_seed: bool) -> None:
        """For `n` sequences; the seed is worth showing where it changes anything."""
        self._show_seed = show_seed
        self._later: dict[int, list[str]] = {index: [] for index in range(1, n)}
        self._last = "\n"
        if n > 1:
            self._write("[0] ")

    def chunk(self, chunk: TokenChunk) -> None:
        """Print it if its turn is now."""
        if chunk.index in self._later:
            self._later[chunk.index].append(chunk.text)
        else:
            self._write(chunk.text)

    def end(self, summary: GenerationSummary) -> None:
        """Print the other sequences and the summary line."""
        self._end_line()
        for index, texts in self._later.items():
            self._write(f"[{index}] {''.join(texts)}")
            self._end_line()
        seed = f" · seed {summary.seed}" if self._show_seed else ""
        print_note(summary_line(summary) + seed)

    def interrupt(self) -> None:
        """End the line."""
        self._end_line()

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(printable(text))
            sys.stdout.flush()
            self._last = text[-1]

    def _end_line(self) -> None:
        if self._last != "\n":
            self._write("\n")


@dataclass
class JsonPrinter:
    """One object at the end."""

    _texts: dict[int, list[str]] = field(default_factory=dict)
    _token_ids: dict[int, list[int]] = field(default_factory=dict)
    _logprobs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def chunk(self, chunk: TokenChunk) -> None:
        """Keep it."""
        self._texts.setdefault(chunk.index, []).append(chunk.text)
        self._token_ids.setdefault(chunk.index, []).extend(chunk.token_ids)
        self._logprobs.setdefault(chunk.index, []).extend(_logprobs(chunk.logprobs))

    def end(self, summary: GenerationSummary) -> None:
        """Print the object: the first sequence at its top, every one under `sequences`."""
        sequences = []
        for ended in _summary_fields(summary)["sequences"]:
            index = ended["index"]
            sequences.append(
                {
                    "index": index,
                    "text": "".join(self._texts.get(index, [])),
                    "token_ids": self._token_ids.get(index, []),
                    "finish_reason": ended["finish_reason"],
                    "stop_match": ended["stop_match"],
                    "logprobs": self._logprobs.get(index) or None,
                }
            )
        first = sequences[0]
        fields = _summary_fields(summary)
        _print_json(
            {"text": first["text"], "token_ids": first["token_ids"]}
            | {key: value for key, value in fields.items() if key != "sequences"}
            | {"sequences": sequences}
        )

    def interrupt(self) -> None:
        """Nothing is printed yet."""


class JsonLinesPrinter:
    """One object a line and event, the moment it is there."""

    def chunk(self, chunk: TokenChunk) -> None:
        """A line."""
        _print_json(
            {
                "event": "chunk",
                "index": chunk.index,
                "text": chunk.text,
                "token_ids": chunk.token_ids,
                "logprobs": _logprobs(chunk.logprobs) or None,
                "is_prompt": chunk.is_prompt,
            }
        )

    def end(self, summary: GenerationSummary) -> None:
        """The last line."""
        _print_json({"event": "summary", **_summary_fields(summary)})

    def interrupt(self) -> None:
        """Lines are whole already."""


def summary_line(summary: GenerationSummary) -> str:
    """`TTFT 12.3 ms · 83.1 tokens/s · 60 tokens · length`.

    tokens/s is that of decoding, the first token excluded: TTFT is about that one. Where they
    apply, `512 prompt tokens cached` and `17 of 20 guesses right` follow.
    """
    parts = [f"TTFT {summary.timings.ttft_ms:.1f} ms"]
    speed = tokens_per_second(summary)
    if speed is not None:
        parts.append(f"{speed:.1f} tokens/s")
    count = summary.completion_tokens
    parts.append(f"{count} token{'' if count == 1 else 's'}")
    parts += [str(reason) for reason in dict.fromkeys(s.finish_reason for s in summary.sequences)]
    cached, speculation = summary.cached_prompt_tokens, summary.speculation
    if cached:
        parts.append(f"{cached} prompt token{'' if cached == 1 else 's'} cached")
    if speculation is not None:
        drafted = speculation.drafted_tokens
        guesses = f"guess{'' if drafted == 1 else 'es'}"
        parts.append(f"{speculation.accepted_tokens} of {drafted} {guesses} right")
    return " · ".join(parts)


def tokens_per_second(summary: GenerationSummary) -> float | None:
    """Tokens after the first of each sequence over the time they took; None for too few."""
    tokens = summary.completion_tokens - len(summary.sequences)
    if tokens < 1 or summary.timings.decode_ms <= 0:
        return None
    return tokens / summary.timings.decode_ms * 1000


def _summary_fields(summary: GenerationSummary) -> dict[str, Any]:
    """The wire's GenerationSummary as JSON, usage in an object of its own."""
    fields = asdict(summary)
    return {
        "request_id": fields["request_id"],
        "finish_reason": fields["finish_reason"],
        "usage": {
            "prompt_tokens": fields["prompt_tokens"],
            "completion_tokens": fields["completion_tokens"],
        },
        "timings": fields["timings"],
        "seed": fields["seed"],
        "sequences": fields["sequences"],
        "cached_prompt_tokens": fields["cached_prompt_tokens"],
        "speculation": fields["speculation"],
    }


def _logprobs(items: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {
            "token_id": item.token_id,
            "logprob": _finite(item.logprob),
            "top": [
                {"token_id": token_id, "logprob": _finite(value)} for token_id, value in item.top
            ],
        }
        for item in items
    ]


def _finite(value: float | None) -> float | None:
    # JSON has no infinity; a token of probability 0 has none to show.
    return value if value is not None and math.isfinite(value) else None


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
    sys.stdout.flush()
