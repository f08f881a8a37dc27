"""`gptjet admin`: what a running server is told by whoever operates it."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gptjet.service.commands.flags import expand_flags
from gptjet.service.commands.security import SecurityFlags
from gptjet.service.commands.terminal import ExitCode, fail, print_note
from gptjet.service.config import ADMIN_VARIABLE

if TYPE_CHECKING:
    from gptjet.service.client import GptjetError
    from gptjet.service.client_admin import AdminClient, Status, TokenStatus

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_POLL_S = 0.2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
    help="Administer a running server: status, reload, log level, drain.\n\n"
    "The server needs `--admin-port` or `--admin-socket`; on the port it takes a token with the "
    "scope admin (`gptjet tokens create NAME --scope admin`).",
    epilog="Examples:\n\n$ gptjet admin status --admin unix:/run/gptjet/admin.sock\n"
    "$ GPTJET_TOKEN=gptjet_… gptjet admin reload --admin 127.0.0.1:50052\n"
    "$ gptjet admin log-level debug --admin unix:/run/gptjet/admin.sock\n"
    "$ gptjet admin drain --wait --admin unix:/run/gptjet/admin.sock",
)


class LogLevel(enum.StrEnum):
    """Least severe level to log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class AdminFlags:
    """Where the administration listens."""

    admin: Annotated[
        str,
        typer.Option(
            "--admin",
            metavar="HOST:PORT|unix:PATH",
            envvar=ADMIN_VARIABLE,
            help="the server's administration port or socket",
            rich_help_panel="Server",
        ),
    ]
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="give up after this long",
            rich_help_panel="Server",
        ),
    ] = 10.0

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            fail(f"--timeout: must be above 0, got {self.timeout:g}", ExitCode.USAGE)


@app.command(context_settings=_CONTEXT)
@expand_flags
def status(
    *,
    where: AdminFlags,
    security: SecurityFlags,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Say what the server is doing, what it holds and who uses it."""
    with _connect(where, security) as admin:
        found = admin.status()
    if as_json:
        fields = dataclasses.asdict(found)
        typer.echo(json.dumps(fields, indent=2, ensure_ascii=False, default=_json))
    else:
        typer.echo(_table(found))


@app.command(context_settings=_CONTEXT)
@expand_flags
def reload(*, where: AdminFlags, security: SecurityFlags) -> None:
    """Have the certificates and the tokens file read again now.

    The exit code is 4 where one of them cannot be used; the server goes on with the old one.
    """
    with _connect(where, security) as admin:
        results = admin.reload()
    if not results:
        print_note("the server has neither certificates nor a tokens file")
    for files in results:
        typer.echo(f"{files.kind}: {files.outcome}{files.reason and ': '}{files.reason}")
    if any(files.outcome == "refused" for files in results):
        raise typer.Exit(ExitCode.REFUSED)


@app.command("log-level", context_settings=_CONTEXT)
@expand_flags
def log_level(
    level: Annotated[
        LogLevel | None, typer.Argument(help="the new one; left out, it is only shown")
    ] = None,
    *,
    where: AdminFlags,
    security: SecurityFlags,
) -> None:
    """Show the level of the server's log, or change it until the process ends."""
    with _connect(where, security) as admin:
        if level is None:
            typer.echo(admin.log_level())
        else:
            previous = admin.set_log_level(level.value)
            typer.echo(f"{level.value} (was {previous})")


@app.command(context_settings=_CONTEXT)
@expand_flags
def drain(
    *,
    where: AdminFlags,
    security: SecurityFlags,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace-s", help="how long running requests may go on (default: the server's own)"
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="return once the server no longer answers here")
    ] = False,
) -> None:
    """Have the server take no new requests, finish the running ones, and end, as SIGTERM does."""
    with _connect(where, security) as admin:
        begun = admin.drain(grace)
        typer.echo(
            f"draining: {begun.running} running, {begun.waiting} waiting, "
            f"{begun.grace_s:g} s of grace"
        )
        if wait:
            _wait_until_gone(admin)


def _wait_until_gone(admin: AdminClient) -> None:
    from gptjet.service.client import UnavailableError

    while True:
        time.sleep(_POLL_S)
        try:
            admin.status()
        except UnavailableError:
            return


@contextlib.contextmanager
def _connect(where: AdminFlags, security: SecurityFlags) -> Iterator[AdminClient]:
    """What goes wrong inside the block ends the command with one line."""
    # gRPC's own log repeats on stderr, with addresses in its memory, what its errors say.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from gptjet.service.client import GptjetError
    from gptjet.service.client_admin import AdminClient

    options = security.security_options(where.admin)
    try:
        client = AdminClient(where.admin, timeout_s=where.timeout, **options)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", ExitCode.USAGE)
    with client:
        try:
            yield client
        except GptjetError as error:
            _end_with(error, where)


def _end_with(error: GptjetError, where: AdminFlags) -> NoReturn:
    import grpc

    match error.code:
        case grpc.StatusCode.UNAVAILABLE:
            fail(
                f"no administration answers at {where.admin}\n"
                "was the server started with --admin-port or --admin-socket, and with TLS?\n"
                f"({error.message})",
                ExitCode.UNREACHABLE,
            )
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            fail(f"{where.admin} refused: {error.message}", ExitCode.REFUSED)
        case grpc.StatusCode.INVALID_ARGUMENT:
            fail(error.message, ExitCode.USAGE)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            fail(f"timed out after {where.timeout:g} s (--timeout)", ExitCode.TIMEOUT)
        case grpc.StatusCode.UNIMPLEMENTED:
            fail(
                f"{where.admin} is no administration: not the port that callers use?",
                ExitCode.FAILURE,
            )
    fail(f"{where.admin}: {error}", ExitCode.FAILURE)


def _json(value: object) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()


def _table(status: Status) -> str:
    rows = [
        ("state", f"{status.state}, {status.running} running, {status.waiting} waiting"),
        ("server", f"{status.address} (version {status.server_version})"),
        ("up for", f"{status.uptime_s:.0f} s"),
        ("model", status.model + (f" on {status.backend}" if status.backend else "")),
    ]
    certificate = status.certificate
    if certificate is None:
        rows.append(("TLS", "off"))
    else:
        both = ", client certificates required" if certificate.client_certificates_required else ""
        names = ", ".join(certificate.names)
        rows.append(("TLS", f"{names} until {certificate.not_after:%Y-%m-%d %H:%M} UTC{both}"))
        if certificate.refused:
            rows.append(("TLS files", f"not in use: {certificate.refused}"))
    if status.tokens_refused:
        rows.append(("tokens file", f"not in use: {status.tokens_refused}"))
    rows += [(f"token {token.name}", _uses(token)) for token in status.tokens]
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{typer.style(f'{name:<{width}}', dim=True)}  {value}" for name, value in rows
    )


def _uses(token: TokenStatus) -> str:
    if not token.usable:
        return f"{token.id}, revoked or expired"

    def part(left: int | None, limit: int | None, what: str) -> str:
        return f"{what} unlimited" if limit is None else f"{left} of {limit} {what} left"

    streams = f"{token.concurrent_streams} in flight"
    if token.max_concurrent_streams is not None:
        streams += f" of {token.max_concurrent_streams}"
    return ", ".join(
        (
            token.id,
            "+".join(token.scopes),
            streams,
            part(token.requests_left, token.requests_per_minute, "requests/min"),
            part(token.tokens_left, token.tokens_per_minute, "tokens/min"),
        )
    )
