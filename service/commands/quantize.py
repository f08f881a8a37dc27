"""`gptjet quantize`: INT8 and INT4 weights, and what they do to the perplexity."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptjet.service.commands.terminal import ExitCode, fail, print_note

if TYPE_CHECKING:
    from gptjet.service.quantization.run import QuantizeReport

HELP = """Write a checkpoint's weights as INT8 or INT4, and print perplexity before and after.

MODEL is "embedded", a folder or a hub name of a GPT-J or CodeGen checkpoint; OUTPUT becomes a \
folder that `gptjet serve --model OUTPUT --backend fused` loads. INT8 has one scale an output \
feature, rounded to nearest. INT4 has one for 128 input features and is rounded by GPTQ against \
text that the checkpoint writes itself, or --calibration.
"""

EXAMPLES = """Examples:

$ gptjet quantize embedded ./embedded-int8 --bits 8
$ gptjet quantize EleutherAI/gpt-j-6b ./gpt-j-6b-int4 --calibration texts.txt --text heldout.txt
$ gptjet quantize embedded ./embedded-int4 --json | jq .perplexity_delta
"""


class MethodName(enum.StrEnum):
    """How values are rounded."""

    RTN = "rtn"
    GPTQ = "gptq"


def quantize(
    model: Annotated[str, typer.Argument(help='"embedded", a folder or a hub name')],
    output: Annotated[Path, typer.Argument(help="folder to write")],
    *,
    bits: Annotated[int, typer.Option(help="8 or 4", min=4, max=8)] = 4,
    method: Annotated[
        MethodName | None,
        typer.Option(help="rtn (round to nearest) or gptq; gptq for 4 bits, rtn for 8 by default"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="text file that gptq rounds against instead of the model's own text"),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(help="tokens of calibration text", min=2)
    ] = 16384,
    text: Annotated[
        Path | None,
        typer.Option(help="text file for the perplexity instead of the shipped held-out rows"),
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(help="most tokens of it; all by default", min=2)
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="measure the perplexity before and after")] = True,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="load pickles where there is nothing else")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="replace what an earlier run wrote to OUTPUT")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Quantise, with a bar on stderr where that is a terminal."""
    # Here, not above: they bring torch and transformers.
    from gptjet.service.engine.errors import BackendLoadError
    from gptjet.service.quantization.run import QuantizeOptions
    from gptjet.service.quantization.run import quantize as run

    options = QuantizeOptions(
        model=model,
        output=output,
        bits=bits,
        method=None if method is None else method.value,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        text=text,
        text_tokens=text_tokens,
        evaluate=evaluate,
        force=force,
        allow_pickle=allow_pickle,
    )
    before = _identity(output)
    try:
        with _Bars() as bars:
            report = run(options, bars.stage)
    except BackendLoadError as error:
        written = _identity(output) != before
        fail(
            f"{error}; {output} was written before that" if written else str(error), ExitCode.USAGE
        )
    except KeyboardInterrupt:
        written = _identity(output) != before
        what = f"{output} was written before that" if written else "nothing was written"
        fail(f"interrupted: {what}", ExitCode.INTERRUPTED)
    if calibration is not None and text is not None and calibration.resolve() == text.resolve():
        print_note("calibration and perplexity are of the same text: the delta flatters")
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        typer.echo(_table(report))


def _identity(folder: Path) -> tuple[int, int] | None:
    """Another one once a new folder has taken the name; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


class _Bars:
    """One bar for each stage, on stderr where that is a terminal; a context manager."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._progress = Progress(console=console, disable=not console.is_terminal)

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        """See quantization.run.Stage."""
        task = self._progress.add_task(name, total=total)
        return lambda count: self._progress.update(task, advance=count)


def _table(report: QuantizeReport) -> str:
    recipe = report.recipe
    group = f", groups of {recipe.group}" if recipe.group else ""
    rows = [
        ("written", str(report.output)),
        ("weights", f"INT{recipe.bits} by {recipe.method}{group}"),
    ]
    if recipe.calibration is not None:
        rows.append(
            ("calibration", f"{recipe.calibration['text']}, {recipe.calibration['tokens']} tokens")
        )
    share = report.output_bytes / report.source_bytes
    rows.append(
        (
            "size",
            f"{report.source_bytes / 1e6:.1f} MB -> {report.output_bytes / 1e6:.1f} MB "
            f"({share:.0%})",
        )
    )
    if report.before is not None and report.after is not None and report.delta is not None:
        rows += [
            ("perplexity", f"{report.before.num_tokens} tokens of {report.text}"),
            ("  before", f"{report.before.value:.4f}"),
            ("  after", f"{report.after.value:.4f}"),
            ("  delta", f"{report.delta:+.3%}"),
        ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)
