"""How a command talks: exit codes, one-line errors, and model text that cannot harm a terminal."""

from __future__ import annotations

import enum
import sys
import unicodedata
from pathlib import Path
from typing import NoReturn

import typer


class ExitCode(enum.IntEnum):
    """What the exit code of every `gptjet` command means; `gptjet --help` shows this table."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    TIMEOUT = 5
    ENGINE = 6
    INTERRUPTED = 130


EXIT_CODE_MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.FAILURE: "it failed while running",
    ExitCode.USAGE: "a flag, a setting, the prompt or the model is not usable",
    ExitCode.UNREACHABLE: "no server answers at that address",
    ExitCode.REFUSED: "the server is loading, draining or full, or does not let you in",
    ExitCode.TIMEOUT: "--timeout passed",
    ExitCode.ENGINE: "the server's engine has hung or failed for good: start it again",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C)",
}

# They let text read in another order than it is written.
_BIDI_CONTROLS = frozenset({"LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def fail(message: str, code: ExitCode) -> NoReturn:
    """Say what is wrong on stderr, and end the command with `code`."""
    print_error(message)
    raise typer.Exit(code)


def print_error(message: str) -> None:
    """`gptjet: error: …` on stderr; further lines are indented below it."""
    first, *rest = message.splitlines() or [""]
    label = typer.style("error:", fg="red", bold=True)
    typer.echo("\n".join([f"gptjet: {label} {first}", *(f"  {line}" for line in rest)]), err=True)


def print_note(message: str) -> None:
    """A line beside the output, dim and on stderr, so that pipes carry the output alone."""
    typer.secho(message, err=True, dim=True)


def printable(text: str) -> str:
    """Model text for stdout: untouched in a pipe, harmless on a terminal.

    A model can sample control characters, which would repaint a terminal or type into it.
    """
    if not sys.stdout.isatty():
        return text
    return "".join(ascii(c)[1:-1] if _commands_the_terminal(c) else c for c in text)


def _commands_the_terminal(character: str) -> bool:
    if unicodedata.category(character) == "Cc":
        return character not in "\n\t"
    return unicodedata.bidirectional(character) in _BIDI_CONTROLS


def check_can_be_made(flag: str, path: Path) -> None:
    """Ends the command where no file can have this path."""
    if not path.parent.is_dir():
        fail(f"{flag}: there is no folder {path.parent}", ExitCode.USAGE)
    if path.is_dir():
        fail(f"{flag}: {path} is a folder", ExitCode.USAGE)
