"""`gptjet generate`: one completion, from a server or from a model in this process."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Generator
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, cast

import typer

from gptjet.service.commands.connection import ConnectionFlags, connect
from gptjet.service.commands.flags import expand_flags
from gptjet.service.commands.output import JsonLinesPrinter, JsonPrinter, Printer, TextPrinter
from gptjet.service.commands.prompt import read_text
from gptjet.service.commands.sampling import SamplingFlags
from gptjet.service.commands.server_settings import (
    MODEL_SETTINGS,
    flag_name,
    resolve,
    with_server_settings,
)
from gptjet.service.commands.terminal import ExitCode, fail, print_note

if TYPE_CHECKING:
    from gptjet.service.client import Client, SamplingOptions
    from gptjet.service.commands.local import Event
    from gptjet.service.engine.request import SamplingParams

HELP = """Stream one completion in the terminal.

The text goes to stdout as it comes; one line about the speed follows on stderr. Ctrl-C stops the \
request on the server too, within one token.
"""

EXAMPLES = """Examples:

$ gptjet generate "The food was wonderful" --max-new-tokens 60 --temperature 0.8
$ gptjet generate "Once upon a time" --server gpu-box:50051 --tls --stop "The end"
$ gptjet generate "The food was wonderful" --in-process
$ cat prompt.txt | gptjet generate - --json | jq -r .text
$ gptjet generate "The food" --n 3 --temperature 1 --seed 7
$ gptjet generate --token-ids 464,2057 --json --stream
"""

Prompt: TypeAlias = str | tuple[int, ...]


@with_server_settings(*MODEL_SETTINGS, panel="Model (with --in-process)")
@expand_flags
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="text to continue; - reads it from stdin, without the newline at its end",
            show_default=False,
        ),
    ] = None,
    *,
    token_ids: Annotated[
        str | None,
        typer.Option(
            "--token-ids", metavar="ID,ID,…", help="the prompt as token ids instead of text"
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="print one JSON object; with --stream one a line and event"),
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="print as it comes, or all at the end (text streams, JSON does not)",
            show_default=False,
        ),
    ] = None,
    request_id: Annotated[
        str, typer.Option("--request-id", help="name of this request in the server's log")
    ] = "",
    in_process: Annotated[
        bool, typer.Option("--in-process", help="load the model here and ask no server")
    ] = False,
    sampling: SamplingFlags,
    connection: ConnectionFlags,
    settings: dict[str, Any],
) -> None:
    """Check what was typed, run the request, print what comes."""
    given = _prompt(prompt, token_ids)
    try:
        params = sampling.to_params()
    except ValueError as error:
        fail(str(error), ExitCode.USAGE)
    if params.logprobs is not None and not as_json:
        fail("--logprobs needs --json", ExitCode.USAGE)
    streamed = not as_json if stream is None else stream
    printer: Printer
    if as_json:
        printer = JsonLinesPrinter() if streamed else JsonPrinter()
    else:
        printer = TextPrinter(params.n, show_seed=not params.is_greedy)
    if in_process:
        _generate_here(given, params, printer, settings, connection, request_id)
        return
    if settings:
        flag = flag_name(next(iter(settings)))
        fail(f"{flag} needs --in-process: a server has its own", ExitCode.USAGE)
    ask = _stream if streamed else _unary
    with connect(connection) as client:
        _print(ask(client, given, params, request_id), printer)


def _generate_here(
    prompt: Prompt,
    params: SamplingParams,
    printer: Printer,
    settings: dict[str, Any],
    connection: ConnectionFlags,
    request_id: str,
) -> None:
    # Here, not above: it brings torch.
    from gptjet.service.commands.local import LocalModel

    config = resolve(None, settings)
    if sys.stderr.isatty():
        print_note(f"loading {config.model} ({config.backend})")
    with contextlib.closing(LocalModel(config)) as model:
        events = model.stream(prompt, params, request_id=request_id, timeout_s=connection.timeout_s)
        _print(events, printer)


def _stream(
    client: Client, prompt: Prompt, params: SamplingParams, request_id: str
) -> Generator[Event]:
    """Events of the streaming RPC; closing the iterator cancels it."""
    from gptjet.service.client import UnavailableError

    received = False
    options = _options(params)
    with client.generate_stream(prompt, request_id=request_id, **options) as stream:
        try:
            for chunk in stream:
                received = True
                yield chunk
        except UnavailableError as error:
            if received:
                fail(f"the server went away: {error.message}", ExitCode.FAILURE)
            raise
        if stream.summary is None:
            fail("the server ended the stream without a summary", ExitCode.FAILURE)
        yield stream.summary


def _unary(
    client: Client, prompt: Prompt, params: SamplingParams, request_id: str
) -> Generator[Event]:
    """The same events from the unary RPC: one chunk a sequence."""
    from gptjet.service.client import TokenChunk

    generation = client.generate(prompt, request_id=request_id, **_options(params))
    for sequence in generation.sequences:
        yield TokenChunk(
            index=sequence.index,
            text=sequence.text,
            token_ids=sequence.token_ids,
            logprobs=sequence.logprobs,
        )
    yield generation.summary


def _options(params: SamplingParams) -> SamplingOptions:
    # Not asdict: it copies, and a MappingProxyType cannot be copied.
    options = {field.name: getattr(params, field.name) for field in fields(params)}
    return cast("SamplingOptions", options)


def _print(events: Generator[Event], printer: Printer) -> None:
    from gptjet.service.client import TokenChunk

    with contextlib.closing(events):
        try:
            for event in events:
                if isinstance(event, TokenChunk):
                    printer.chunk(event)
                else:
                    printer.end(event)
        except BaseException as error:
            printer.interrupt()
            if isinstance(error, KeyboardInterrupt):
                print_note("interrupted")
            raise


def _prompt(text: str | None, token_ids: str | None) -> Prompt:
    """The one prompt among the ways to give it; ends the command where there is not one."""
    if (text is None) == (token_ids is None):
        fail("give the prompt as text, or - for stdin, or --token-ids", ExitCode.USAGE)
    if token_ids is not None:
        try:
            return tuple(int(token_id) for token_id in re.split(r"[,\s]+", token_ids.strip(", ")))
        except ValueError:
            fail(f"--token-ids must be numbers such as 464,2057, got {token_ids!r}", ExitCode.USAGE)
    assert text is not None
    return read_text(text)
