"""`gptjet tokens`: the bearer tokens that `gptjet serve --tokens-file` takes."""

from __future__ import annotations

import contextlib
import enum
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptjet.service.commands.terminal import ExitCode, fail, print_note

if TYPE_CHECKING:
    from gptjet.service.rpc.access.tokens import Token

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_UNITS_S = {"m": 60, "h": 3600, "d": 86_400}
_MAX_DAYS = 36_500

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
    help="Make, list and revoke callers' bearer tokens.\n\n"
    "They stand, hashed, in the file that `gptjet serve --tokens-file` reads; a running server "
    "sees a change within `--access-reload-s`, or at once with `gptjet admin reload`.",
    epilog="Examples:\n\n$ gptjet tokens create web --file tokens.toml --expires-in 90d\n"
    "$ gptjet tokens create operator --scope admin\n"
    "$ gptjet tokens create batch --tokens-per-minute 20000 --concurrent-streams 4\n"
    "$ gptjet tokens list --json | jq '.[] | select(.usable) | .name'\n"
    "$ gptjet tokens revoke web",
)

_File = Annotated[
    Path,
    typer.Option("--file", envvar="GPTJET_TOKENS_FILE", help="the tokens file"),
]


class Scope(enum.StrEnum):
    """What a token is good for."""

    GENERATE = "generate"
    ADMIN = "admin"


def _limit(flag: str, what: str) -> Any:
    return typer.Option(flag, help=f"{what} (default: the server's own limit)")


@app.command(context_settings=_CONTEXT)
def create(
    name: Annotated[str, typer.Argument(help="who it is for: in logs, quotas and `list`")],
    *,
    file: _File,
    scope: Annotated[
        list[Scope] | None,
        typer.Option("--scope", help="generate (the default), admin; may be given twice"),
    ] = None,
    expires_in: Annotated[
        str | None,
        typer.Option(metavar="90d|12h|30m", help="how long it is good for (default: for ever)"),
    ] = None,
    requests_per_minute: Annotated[
        int | None, _limit("--requests-per-minute", "requests it may start a minute")
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        _limit("--tokens-per-minute", "prompt and generated tokens a minute"),
    ] = None,
    concurrent_streams: Annotated[
        int | None, _limit("--concurrent-streams", "RPCs it may have in flight")
    ] = None,
) -> None:
    """Make a token and print it, this once: the file holds its hash only."""
    from pydantic import ValidationError

    from gptjet.service.rpc.access.tokens import new_token
    from gptjet.service.rpc.access.tokens_file import editing

    now = datetime.now(UTC)
    try:
        text, kept = new_token(
            name,
            scopes=[part.value for part in dict.fromkeys(scope or [Scope.GENERATE])],
            expires=None if expires_in is None else now + _duration(expires_in),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent_streams=concurrent_streams,
            now=now,
        )
    except ValidationError as error:
        fail("\n".join(_say(problem) for problem in error.errors()), ExitCode.USAGE)
    with _clear_errors(), editing(file, create=True) as tokens:
        if any(token.name == name and token.revoked is None for token in tokens):
            fail(f"{file} has a token {name!r}; revoke it first", ExitCode.USAGE)
        tokens.append(kept)
    typer.echo(text)
    print_note(f"shown this once; {file} holds the hash of it (id {kept.id})")


@app.command("list", context_settings=_CONTEXT)
def list_tokens(
    *,
    file: _File,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list")] = False,
) -> None:
    """Show the tokens of a file, without what would let anybody in."""
    from gptjet.service.rpc.access.tokens_file import read

    with _clear_errors():
        tokens = read(file).token
    now = datetime.now(UTC)
    if as_json:
        listed = [
            {
                **token.model_dump(mode="json", exclude={"sha256"}),
                "usable": not _why_not(token, now),
            }
            for token in tokens
        ]
        typer.echo(json.dumps(listed, indent=2))
        return
    rows = [("NAME", "ID", "SCOPES", "CREATED", "STATE", "LIMITS")]
    rows += [
        (
            token.name,
            token.id,
            "+".join(token.scopes),
            f"{token.created:%Y-%m-%d}",
            _why_not(token, now) or _until(token),
            _limits(token),
        )
        for token in tokens
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


@app.command(context_settings=_CONTEXT)
def revoke(
    token: Annotated[str, typer.Argument(help="its name or its id")],
    *,
    file: _File,
) -> None:
    """Make a token good for nothing, its running calls ended by the servers that read the file.

    It stays in the file, so that logs can be understood.
    """
    from gptjet.service.rpc.access.tokens_file import editing

    now = datetime.now(UTC).replace(microsecond=0)
    with _clear_errors(), editing(file) as tokens:
        for index, kept in enumerate(tokens):
            if token in (kept.id, kept.name) and kept.revoked is None:
                tokens[index] = kept.model_copy(update={"revoked": now})
                break
        else:
            fail(f"{file} has no token {token!r} that is not revoked", ExitCode.USAGE)
    typer.echo(f"revoked {kept.name} (id {kept.id})")


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    from gptjet.service.rpc.access.errors import AccessError

    try:
        yield
    except AccessError as error:
        fail(str(error), ExitCode.USAGE)


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,9})([mhd])", text, re.ASCII)
    if match is None or not 0 < int(match[1]) * _UNITS_S[match[2]] <= _MAX_DAYS * _UNITS_S["d"]:
        fail(
            f"--expires-in: must be like 90d, 12h or 30m, and at most {_MAX_DAYS}d, got {text!r}",
            ExitCode.USAGE,
        )
    return timedelta(seconds=int(match[1]) * _UNITS_S[match[2]])


def _say(problem: Any) -> str:
    field = str(problem["loc"][0])
    shown = "NAME" if field == "name" else "--" + field.replace("_", "-")
    if problem["type"] == "string_pattern_mismatch":
        return f"{shown}: must be 1 to 64 letters, digits and . _ @ -, the first no sign"
    return f"{shown}: {problem['msg'].replace('Input should', 'must', 1)}"


def _why_not(token: Token, now: datetime) -> str:
    if token.revoked is not None:
        return f"revoked {token.revoked:%Y-%m-%d}"
    if token.objection(now) is not None:
        return f"expired {token.expires:%Y-%m-%d}"
    return ""


def _until(token: Token) -> str:
    return "good" if token.expires is None else f"good until {token.expires:%Y-%m-%d %H:%M}"


def _limits(token: Token) -> str:
    parts = (
        (token.requests_per_minute, "requests/min"),
        (token.tokens_per_minute, "tokens/min"),
        (token.concurrent_streams, "in flight"),
    )
    return ", ".join(f"{limit} {what}" for limit, what in parts if limit is not None) or "-"
