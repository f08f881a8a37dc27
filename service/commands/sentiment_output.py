"""What `gptjet sentiment` prints of one text: as it comes, or one JSON object."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import typer

from gptjet.service.commands.terminal import print_note, printable

if TYPE_CHECKING:
    from gptjet.service.apps.sentiment.result import Event, SentimentResult

_COLOURS = {"positive": "green", "negative": "red", "uncertain": "yellow"}


class TextPrinter:
    """Probabilities, then the explanation as it comes, then the label; notes go to stderr."""

    def __init__(self) -> None:
        self._in_line = False

    def event(self, event: Event) -> None:
        """Print it."""
        from gptjet.service.apps.sentiment.result import ExplanationDelta, Scored

        if isinstance(event, Scored):
            shares = "  ".join(f"{name} {p:.0%}" for name, p in event.probabilities.items())
            typer.echo(shares)
        elif isinstance(event, ExplanationDelta):
            sys.stdout.write(printable(event.text))
            sys.stdout.flush()
            self._in_line = True
        else:
            self.interrupt()
            self._result(event.result)

    def interrupt(self) -> None:
        """Leave the terminal at the start of a line."""
        if self._in_line:
            typer.echo()
            self._in_line = False

    def _result(self, result: SentimentResult) -> None:
        label = typer.style(result.label, fg=_COLOURS.get(result.label), bold=True)
        typer.echo(f"{label}: {result.uncertain_reason}" if result.uncertain_reason else label)
        if result.missing_words:
            named = ", ".join(f'"{word}"' for word in result.missing_words)
            print_note(printable(f"not in the text, though the explanation names it: {named}"))
        if result.num_parts > 1:
            print_note(
                f"split into {result.num_parts} parts, pooled: {result.pooling}; "
                f"the explanation is about part {result.explained_part + 1}"
            )
        if result.ttft_ms is not None:
            speed = result.tokens_per_second
            rate = "" if speed is None else f" · {speed:.1f} tokens/s"
            print_note(f"TTFT {result.ttft_ms:.1f} ms{rate} · {result.model}")


class JsonPrinter:
    """One object at the end."""

    def event(self, event: Event) -> None:
        """Print the last one."""
        from gptjet.service.apps.sentiment.result import Finished

        if isinstance(event, Finished):
            typer.echo(json.dumps(event.result.as_json(), ensure_ascii=False))

    def interrupt(self) -> None:
        """Nothing is printed yet."""
