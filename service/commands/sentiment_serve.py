"""`gptjet sentiment serve`: the page, and a model server beside it where none is named."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptjet.service.commands.flags import expand_flags
from gptjet.service.commands.sentiment_client import SentimentConnection, run
from gptjet.service.commands.server_settings import (
    MODEL_SETTINGS,
    flag_name,
    with_server_settings,
)
from gptjet.service.commands.terminal import ExitCode, fail, print_note

if TYPE_CHECKING:
    import socket

    from gptjet.service.apps.sentiment.template import PromptTemplate
    from gptjet.service.apps.sentiment.web.settings import WebSettings
    from gptjet.service.client import AsyncClient

HELP = """Serve the page: type a text and watch the model label and explain it, or drop a CSV file.

Without --server a model server is started beside it, with the small checkpoint that ships, and \
started again should it end. SIGTERM or Ctrl-C stops both.

The page has no log-in. It answers to localhost, IP addresses and the names of --allow-host, only \
to itself and not to other sites, and limits what one address may ask for. Anybody who reaches \
--host can use it.
"""

EXAMPLES = """Examples:

$ gptjet sentiment serve

$ gptjet sentiment serve --server gpu-box:50051 --template gpt-j --port 8000

$ gptjet sentiment serve --host 0.0.0.0 --allow-host sentiment.example.org

$ gptjet sentiment serve --template embedded --template ./my-labels.toml
"""

_PAGE = "Page"


@dataclass(frozen=True)
class PageFlags:
    """Where the page is, what it offers, and how much of it."""

    host: Annotated[
        str,
        typer.Option(
            "--host", help="the address the page listens on; 0.0.0.0: all", rich_help_panel=_PAGE
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option(
            "--port", min=0, max=65535, help="0: any free one, printed", rich_help_panel=_PAGE
        ),
    ] = 8080
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            metavar="NAME|FILE",
            help="a prompt that visitors may choose; may be given several times, the first is the "
            "default. Default: embedded",
            show_default=False,
            rich_help_panel=_PAGE,
        ),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="a name that the page is reached by; may be given several times",
            show_default=False,
            rich_help_panel=_PAGE,
        ),
    ] = None
    max_chars: Annotated[
        int,
        typer.Option("--max-chars", min=1, help="of one text", rich_help_panel=_PAGE),
    ] = 20_000
    max_rows: Annotated[
        int,
        typer.Option("--max-rows", min=1, help="of one CSV file", rich_help_panel=_PAGE),
    ] = 5_000
    requests_per_minute: Annotated[
        int,
        typer.Option(
            "--requests-per-minute",
            min=1,
            help="of one address; a file counts as five",
            rich_help_panel=_PAGE,
        ),
    ] = 60

    def settings(self) -> WebSettings:
        """The page's limits."""
        from gptjet.service.apps.sentiment.web.settings import WebSettings

        return WebSettings(
            max_chars=self.max_chars,
            max_csv_rows=self.max_rows,
            requests_per_minute=self.requests_per_minute,
            allowed_hosts=frozenset(self.allow_host or ()),
        )

    def templates(self) -> tuple[PromptTemplate, ...]:
        """Ends the command where one cannot be used."""
        from gptjet.service.apps.sentiment.template import (
            DEFAULT_TEMPLATE,
            TemplateError,
            load_template,
        )

        try:
            loaded = [load_template(name) for name in self.template or [DEFAULT_TEMPLATE]]
        except TemplateError as error:
            fail(f"--template: {error}", ExitCode.USAGE)
        names = [template.name for template in loaded]
        for name in names:
            if names.count(name) > 1:
                fail(f"--template: two templates are named {name!r}", ExitCode.USAGE)
        return tuple(loaded)


@with_server_settings(*MODEL_SETTINGS, panel="Model (without --server)")
@expand_flags
def command(*, page: PageFlags, connection: SentimentConnection, settings: dict[str, Any]) -> None:
    """Serve the page until told to stop."""
    from gptjet.service.apps.sentiment.web.model_server import ModelServerError
    from gptjet.service.apps.sentiment.web.run import listen
    from gptjet.service.log import configure_logging

    configure_logging("warning")
    if connection.server and settings:
        flag = flag_name(next(iter(settings)))
        fail(f"{flag} is for a server beside the page; {connection.server} has its own", _USAGE)
    if not connection.server and connection.tls_options() is not None:
        fail("--tls needs --server", _USAGE)
    templates = page.templates()
    try:
        listening = listen(page.host, page.port)
    except OSError as error:
        fail(_cannot_listen(page, error), _USAGE)
    with listening:
        try:
            run(_serve(page, templates, connection, settings, listening), connection)
        except ModelServerError as error:
            code = error.exit_code if error.exit_code in set(ExitCode) else ExitCode.FAILURE
            fail(str(error), ExitCode(code))
        except asyncio.CancelledError:
            return  # told to stop before it had started


_USAGE = ExitCode.USAGE


async def _serve(
    page: PageFlags,
    templates: tuple[PromptTemplate, ...],
    connection: SentimentConnection,
    settings: Mapping[str, Any],
    listening: socket.socket,
) -> None:
    from gptjet.service.apps.sentiment.web.app import create_app
    from gptjet.service.apps.sentiment.web.model_server import ModelServer
    from gptjet.service.apps.sentiment.web.run import PageServer, address, stopped_by_signals
    from gptjet.service.apps.sentiment.web.source import GrpcSource

    where = address(page.host, listening.getsockname()[1])
    server: PageServer | None = None
    starting = asyncio.current_task()

    def stop() -> None:
        if server is not None:
            server.stop()
        elif starting is not None:
            starting.cancel()

    with stopped_by_signals(stop):
        async with contextlib.AsyncExitStack() as stack:
            target, own = connection.server, None
            if not target:
                print_note("starting a model server")
                flags = [*_flags(settings), "--log-level", "warning"]
                own = ModelServer(flags, on_note=print_note, on_failed=stop)
                await stack.enter_async_context(own)
                target = own.target
            client = await stack.enter_async_context(_client(target, connection))
            if connection.wait is not None:
                await client.wait_until_serving(connection.wait)
            app = create_app(
                lambda: GrpcSource(client, templates, max_chars=page.max_chars), page.settings()
            )
            server = PageServer(
                app, lambda: typer.echo(f"The page is at {where} (Ctrl-C stops it)")
            )
            await server.serve(sockets=[listening])
            if own is not None and own.error is not None:
                raise own.error


def _client(target: str, connection: SentimentConnection) -> AsyncClient:
    from gptjet.service.client import DEFAULT_TIMEOUT_S, AsyncClient

    return AsyncClient(
        target,
        timeout_s=DEFAULT_TIMEOUT_S if connection.timeout is None else connection.timeout,
        # The page says at once that nobody answers, and tries again itself.
        retry=None,
        **connection.security_options(target),
    )


def _flags(settings: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(flag_name(name) if value else flag_name(f"no_{name}"))
        else:
            flags += [flag_name(name), str(value.resolve() if isinstance(value, Path) else value)]
    return flags


def _cannot_listen(page: PageFlags, error: OSError) -> str:
    import errno

    match error.errno:
        case errno.EADDRINUSE:
            return f"--port: {page.port} is in use on {page.host}; choose another, or 0 for any"
        case errno.EACCES:
            return f"--port: {page.port} needs rights that you do not have; choose one above 1023"
    return f"--host: cannot listen on {page.host}: {error.strerror or error}"
