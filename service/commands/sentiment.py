"""`gptjet sentiment`: one text or a file of them; its sub-commands are modules beside this one."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gptjet.service.commands import sentiment_evaluate, sentiment_file, sentiment_serve
from gptjet.service.commands.flags import expand_flags
from gptjet.service.commands.sentiment_client import (
    ClassifierFlags,
    SentimentConnection,
    open_client,
    run,
)
from gptjet.service.commands.sentiment_file import FileFlags
from gptjet.service.commands.sentiment_output import JsonPrinter, TextPrinter
from gptjet.service.commands.server_settings import MODEL_SETTINGS, with_server_settings
from gptjet.service.commands.terminal import ExitCode, fail, print_note

if TYPE_CHECKING:
    from gptjet.service.apps.sentiment.template import PromptTemplate

HELP = """Say which sentiment a text has, how sure the model is, and why it thinks so.

Where the labels are nearly as probable, or the explanation contradicts the label, the answer is \
"uncertain". Without --server a server is started in this process, with the small checkpoint that \
ships.
"""

EXAMPLES = """Examples:

$ gptjet sentiment "The food was wonderful and the staff were kind."

$ gptjet sentiment "The battery died after two days." --server gpu-box:50051 --template gpt-j

$ gptjet sentiment - --json < review.txt | jq .probabilities

$ gptjet sentiment --file reviews.csv --column text --out out.csv

$ gptjet sentiment evaluate

$ gptjet sentiment serve
"""

_DEFAULT = "classify"
_CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}


class _DefaultGroup(TyperGroup):
    """Takes what does not begin with a sub-command for the arguments of `classify`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {*self.commands, *_CONTEXT_SETTINGS["help_option_names"]}
        if args and args[0] not in known:
            args = [_DEFAULT, *args]
        return list(super().parse_args(ctx, args))


app = typer.Typer(
    name="sentiment",
    cls=_DefaultGroup,
    help=HELP,
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    context_settings=_CONTEXT_SETTINGS,
    pretty_exceptions_enable=False,
)


@with_server_settings(*MODEL_SETTINGS, panel="Model (without --server)")
@expand_flags
def classify(
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="the text; - reads it from stdin", show_default=False),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    asked: ClassifierFlags,
    file: FileFlags,
    connection: SentimentConnection,
    settings: dict[str, Any],
) -> None:
    """Classify a text, or the rows of a file."""
    if (text is None) == (file.file is None):
        fail("give one text, or - for stdin, or a --file", ExitCode.USAGE)
    template = asked.load_template()
    if text is None:
        sentiment_file.classify_rows(file, asked, template, connection, settings, as_json=as_json)
        return
    file.check_unused()
    printer = JsonPrinter() if as_json else TextPrinter()
    main = _classify(_text(text), asked, template, connection, settings, printer)
    try:
        run(main, connection)
    except BaseException as error:
        printer.interrupt()
        if isinstance(error, KeyboardInterrupt):
            print_note("interrupted")
        raise


async def _classify(
    text: str,
    asked: ClassifierFlags,
    template: PromptTemplate,
    connection: SentimentConnection,
    settings: dict[str, Any],
    printer: JsonPrinter | TextPrinter,
) -> None:
    from gptjet.service.apps.sentiment.classify import ClassifierOptions, SentimentClassifier

    async with open_client(connection, settings, retry=False) as client:
        options = ClassifierOptions(explain=asked.explain)
        classifier = SentimentClassifier(client, template, options=options)
        async with contextlib.aclosing(classifier.stream(text, seed=asked.seed)) as events:
            async for event in events:
                printer.event(event)


def _text(text: str) -> str:
    try:
        if text == "-":
            return re.sub(r"\r?\n\Z", "", sys.stdin.buffer.read().decode())
        text.encode()  # an argument that is not UTF-8 has surrogates
    except UnicodeError:
        fail("the text is not valid UTF-8", ExitCode.USAGE)
    return text


app.command(
    _DEFAULT,
    help="Classify one text or a file: what runs where no sub-command is named.",
    epilog=EXAMPLES,
    context_settings=_CONTEXT_SETTINGS,
)(classify)
# A sub-command is a module with HELP, EXAMPLES and a function `command`.
for _name, _module in {"evaluate": sentiment_evaluate, "serve": sentiment_serve}.items():
    app.command(
        _name, help=_module.HELP, epilog=_module.EXAMPLES, context_settings=_CONTEXT_SETTINGS
    )(_module.command)
