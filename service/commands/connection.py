"""Which server to talk to and how: flags that every client-side command shares."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gptjet.service.commands.sampling import flag_of
from gptjet.service.commands.security import SecurityFlags
from gptjet.service.commands.terminal import ExitCode, fail
from gptjet.service.config import SERVER_VARIABLE

if TYPE_CHECKING:
    from gptjet.service.client import Client, GptjetError

DEFAULT_SERVER = "127.0.0.1:50051"

_CONNECTION = "Server"
_GRPC_PREAMBLE = "failed to connect to all addresses; last error: UNKNOWN: "


@dataclass(frozen=True)
class _ServerFlags:
    """The server's address, and how long to wait."""

    server: Annotated[
        str,
        typer.Option(
            "--server",
            metavar="HOST:PORT",
            envvar=SERVER_VARIABLE,
            help="the server to ask",
            rich_help_panel=_CONNECTION,
        ),
    ] = DEFAULT_SERVER
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="give up after this long; the server frees the request then",
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            help="wait this long for the server to be up and its model loaded",
            rich_help_panel=_CONNECTION,
        ),
    ] = None


@dataclass(frozen=True)
class ConnectionFlags(SecurityFlags, _ServerFlags):
    """The server's address, how long to wait, TLS, and the token."""

    def __post_init__(self) -> None:
        for flag, seconds in (("--timeout", self.timeout), ("--wait", self.wait)):
            if seconds is not None and not seconds > 0:
                fail(f"{flag}: must be above 0, got {seconds:g}", ExitCode.USAGE)

    @property
    def timeout_s(self) -> float:
        """A call's deadline. A person has Ctrl-C, so there is none unless asked for."""
        return math.inf if self.timeout is None else self.timeout


@contextlib.contextmanager
def connect(flags: ConnectionFlags) -> Iterator[Client]:
    """A client of that server. What goes wrong inside the block ends the command with one line."""
    # gRPC's own log repeats on stderr, with addresses in its memory, what its errors say.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from gptjet.service.client import Client, GptjetError

    try:
        # No retries: whoever typed this sees at once what is wrong, and has --wait.
        client = Client(
            flags.server,
            timeout_s=flags.timeout_s,
            retry=None,
            **flags.security_options(flags.server),
        )
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", ExitCode.USAGE)
    with client:
        try:
            if flags.wait is not None:
                client.wait_until_serving(flags.wait)
            yield client
        except GptjetError as error:
            end_with(error, flags)


def end_with(error: GptjetError, flags: ConnectionFlags) -> NoReturn:
    """Say in the command line's words what the server, or its absence, said."""
    import grpc

    from gptjet.service import client

    message = error.message
    match error:
        case client.InvalidRequestError():
            lines = [f"{flag_of(v.field)}: {v.description}" for v in error.violations]
            fail("\n".join(lines) or message, ExitCode.USAGE)
        case client.UnavailableError() if error.retry_after_s is None:
            fail(_nobody_there(flags, message), ExitCode.UNREACHABLE)
        case client.UnavailableError() | client.ResourceExhaustedError():
            fail(f"{flags.server} refused: {message}", ExitCode.REFUSED)
        case client.DeadlineExceededError():
            if flags.timeout is None:
                fail(f"{flags.server} does not answer in time: {message}", ExitCode.TIMEOUT)
            fail(f"timed out after {flags.timeout:g} s (--timeout)", ExitCode.TIMEOUT)
    match error.code:
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            fail(f"{flags.server} refused: {message}", ExitCode.REFUSED)
        case grpc.StatusCode.UNIMPLEMENTED:
            fail(f"{flags.server} is not a GPTJet server: {message}", ExitCode.FAILURE)
    fail(f"{flags.server}: {error}", ExitCode.FAILURE)


def _nobody_there(flags: ConnectionFlags, detail: str) -> str:
    host, _, port = flags.server.rpartition(":")
    lines = [f"no server answers at {flags.server}"]
    if host in ("127.0.0.1", "localhost", "[::1]") and not flags.tls_options():
        lines.append(f"start one: gptjet serve{'' if port == '50051' else f' --port {port}'}")
        lines.append('or do without: gptjet generate --in-process "…"')
    else:
        lines.append("is it running, is the address right, does it expect TLS (--tls)?")
    reason = detail.removeprefix(_GRPC_PREAMBLE)
    return "\n".join([*lines, f"({reason})"])
