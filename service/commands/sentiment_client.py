"""Who `gptjet sentiment` asks: a running server, or one of its own in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from gptjet.service.commands.connection import ConnectionFlags, end_with
from gptjet.service.commands.server_settings import MODEL_SETTINGS, flag_name, resolve
from gptjet.service.commands.terminal import ExitCode, fail, print_note
from gptjet.service.config import SERVER_VARIABLE, ServerConfig

if TYPE_CHECKING:
    from gptjet.service.apps.sentiment.template import PromptTemplate
    from gptjet.service.client import AsyncClient, UnavailableError

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class SentimentConnection(ConnectionFlags):
    """ConnectionFlags whose server may be left out: one is started in this process then."""

    server: Annotated[
        str,
        typer.Option(
            "--server",
            metavar="HOST:PORT",
            envvar=SERVER_VARIABLE,
            help="the server to ask; left out, one is started in this process",
            show_default=False,
            rich_help_panel="Server",
        ),
    ] = ""


@dataclass(frozen=True)
class ClassifierFlags:
    """What is asked, and how."""

    template: Annotated[
        str,
        typer.Option(
            "--template",
            metavar="NAME|FILE",
            help="the prompt and its labels: embedded, gpt-j, or a TOML file of your own",
        ),
    ] = "embedded"
    explain: Annotated[
        bool,
        typer.Option(
            "--explain/--no-explain", help="let the model explain (and contradict) the label"
        ),
    ] = True
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="of a template that samples its explanations")
    ] = 0

    def load_template(self) -> PromptTemplate:
        """Ends the command where the template cannot be used."""
        from gptjet.service.apps.sentiment.template import TemplateError, load_template

        try:
            return load_template(self.template)
        except TemplateError as error:
            fail(f"--template: {error}", ExitCode.USAGE)


def run(main: Coroutine[Any, Any, _Result], connection: ConnectionFlags) -> _Result:
    """`asyncio.run`, with what goes wrong as one line and an exit code."""
    # gRPC's own log repeats on stderr, with addresses in its memory, what its errors say.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from gptjet.service.apps.sentiment.result import TextError
    from gptjet.service.apps.sentiment.table import TableError
    from gptjet.service.apps.sentiment.template import TemplateError
    from gptjet.service.client import GptjetError, UnavailableError

    try:
        return asyncio.run(main)
    except (TableError, TemplateError, TextError) as error:
        fail(str(error), ExitCode.USAGE)
    except UnavailableError as error:
        _end_with_unavailable(error, connection)
    except GptjetError as error:
        end_with(error, connection)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        fail(f"{where}{error.strerror or error}", ExitCode.USAGE)


def _end_with_unavailable(error: UnavailableError, connection: ConnectionFlags) -> NoReturn:
    if error.retry_after_s is None:
        fail(
            f"no server answers at {connection.server}\n"
            f"start one: gptjet serve; or leave --server out\n({error.message})",
            ExitCode.UNREACHABLE,
        )
    end_with(error, connection)


@contextlib.asynccontextmanager
async def open_client(
    connection: SentimentConnection, settings: Mapping[str, Any], *, retry: bool
) -> AsyncIterator[AsyncClient]:
    """A client of the server that was named, or of one in this process.

    `retry`: whether gRPC tries again on UNAVAILABLE by itself. Ends the command where the flags
    do not go together or the model cannot be loaded; raises GptjetError.
    """
    from gptjet.service.client import AsyncClient, RetryPolicy

    async with contextlib.AsyncExitStack() as stack:
        target = connection.server
        if not target:
            tls = connection.tls_options()
            if tls is not None:
                fail("--tls needs --server", ExitCode.USAGE)
            target = await stack.enter_async_context(_server_here(settings))
        elif settings:
            flag = flag_name(next(iter(settings)))
            fail(f"{flag} is for a server in this process; {target} has its own", ExitCode.USAGE)
        client = AsyncClient(
            target,
            timeout_s=connection.timeout_s,
            retry=RetryPolicy() if retry else None,
            **connection.security_options(target),
        )
        await stack.enter_async_context(client)
        if connection.wait is not None:
            await client.wait_until_serving(connection.wait)
        yield client


@contextlib.asynccontextmanager
async def _server_here(settings: Mapping[str, Any]) -> AsyncIterator[str]:
    """A server of this event loop on a free loopback port; its address."""
    # Here, not above: they bring torch.
    from gptjet.service.commands.loading import load_model
    from gptjet.service.engine.errors import BackendLoadError
    from gptjet.service.log import configure_logging
    from gptjet.service.rpc.server import Server

    resolved = resolve(None, settings)
    # Of the settings in the environment those of the model count; the rest is for other servers.
    model = {name: getattr(resolved, name) for name in MODEL_SETTINGS}
    config = ServerConfig(**model, host="127.0.0.1", port=0)
    configure_logging("error")
    if sys.stderr.isatty():
        print_note(f"loading {config.model} ({config.backend})")
    server = Server(config)
    await server.start()
    try:
        try:
            loaded = await asyncio.to_thread(load_model, config)
            await server.attach(loaded.backend, loaded.tokenizer)
        except BackendLoadError as error:
            fail(str(error), ExitCode.USAGE)
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.drain(0.0)
