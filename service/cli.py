"""The command line: one entry point, `gptjet`, with one module a sub-command.

A new sub-command is a module in `gptjet.service.commands` and a line in `COMMANDS`. The module has
HELP, EXAMPLES and a function of its own name; or, where it has sub-commands itself, a typer `app`
with help and an epilog of examples.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gptjet.service.commands.terminal import EXIT_CODE_MEANINGS


@dataclass(frozen=True)
class CommandEntry:
    """What `gptjet --help` says of a sub-command; its module is imported when it is called."""

    panel: str
    name: str
    summary: str


COMMANDS = (
    CommandEntry("Server", "serve", "Start the gRPC server."),
    CommandEntry("Server", "tokens", "Make, list and revoke callers' bearer tokens."),
    CommandEntry(
        "Server", "admin", "Administer a running server: status, reload, log level, drain."
    ),
    CommandEntry(
        "Server",
        "metrics",
        "Print the Grafana dashboard, the Prometheus alert rules or their tests.",
    ),
    CommandEntry("Server", "policy", "Check a policy file, and try it on a text."),
    CommandEntry(
        "Server", "review", "Decide on what the policy flagged: list, show, approve, reject."
    ),
    CommandEntry("Client", "generate", "Stream one completion in the terminal."),
    CommandEntry(
        "Client", "score", "Say how likely the model finds each of several continuations."
    ),
    CommandEntry("Client", "models", "Show what a server is serving, its limits and its health."),
    CommandEntry(
        "Client",
        "sentiment",
        "Say which sentiment a text has, how sure the model is, and why it thinks so.",
    ),
    CommandEntry(
        "Machine",
        "doctor",
        "Say whether this machine can run each backend, and how to mend what is in the way.",
    ),
    CommandEntry(
        "Machine",
        "plan",
        "Say whether a model fits a card, how many streams it holds and how fast it can be "
        "at best.",
    ),
    CommandEntry(
        "Machine",
        "quantize",
        "Write a checkpoint's weights as INT8 or INT4, and print perplexity before and after.",
    ),
    CommandEntry(
        "Machine",
        "warm-cache",
        "Compile a model's GPU kernels before there is a GPU, so that a server need not.",
    ),
    CommandEntry(
        "Benchmarks",
        "sweep",
        "Replay the published latency experiment: backends x weight types x lengths.",
    ),
    CommandEntry(
        "Benchmarks",
        "load",
        "Put open- or closed-loop load on a server, and say what users of it would see.",
    ),
)

_HELP = """Serve GPT-J-class language models over gRPC, token by token.

Examples:

$ gptjet serve
$ gptjet generate "The food was wonderful"
$ gptjet COMMAND --help
"""

_EXIT_CODES = "Exit codes:\n" + "\n".join(
    f"  {code.value:>3}  {meaning}" for code, meaning in EXIT_CODE_MEANINGS.items()
)

_CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}


def version() -> str:
    """The installed version."""
    from importlib import metadata  # slow to import, and rarely asked for

    try:
        return metadata.version("gptjet")
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed


class _LazyGroup(TyperGroup):
    """Lists commands from the table and imports the one that is called, for a quick `--help`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed if name is None else load_command(name), rest


def load_command(name: str) -> Any:
    """Import a sub-command: the click command that typer makes of its module."""
    function = name.replace("-", "_")
    module = importlib.import_module(f"gptjet.service.commands.{function}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(
            name=name,
            help=module.HELP,
            epilog=module.EXAMPLES,
            context_settings=_CONTEXT_SETTINGS,
        )(getattr(module, function))
    return typer.main.get_command(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gptjet {version()}")
        raise typer.Exit


def _root(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Take the flags that stand before a sub-command."""


def _listed() -> None:
    """Stands for a command in the list; `_LazyGroup` calls the real one."""


def _build() -> typer.Typer:
    app = typer.Typer(
        name="gptjet",
        cls=_LazyGroup,
        no_args_is_help=True,
        context_settings=_CONTEXT_SETTINGS,
        # Tracebacks as Python writes them: typer's show local variables, prompts among them.
        pretty_exceptions_enable=False,
    )
    app.callback(help=_HELP, epilog=_EXIT_CODES)(_root)
    for entry in COMMANDS:
        app.command(name=entry.name, help=entry.summary, rich_help_panel=entry.panel)(_listed)
    return app


app = _build()


def main() -> None:
    """Entry point of the `gptjet` script."""
    for stream in (sys.stdout, sys.stderr):
        # A model may write what a terminal in another encoding cannot show.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # Read when PyTorch is imported, which is later. OpenMP threads that wait by spinning take the
    # cores from whoever has work: beside other load that cost a small model nine tenths.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="gptjet")


if __name__ == "__main__":
    main()
