"""`gptjet sentiment evaluate`: figures on rows whose label is known, VADER beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptjet.service.commands.flags import expand_flags
from gptjet.service.commands.sentiment_client import (
    ClassifierFlags,
    SentimentConnection,
    open_client,
    run,
)
from gptjet.service.commands.server_settings import MODEL_SETTINGS, with_server_settings
from gptjet.service.commands.terminal import ExitCode, check_can_be_made, fail, print_note

if TYPE_CHECKING:
    from gptjet.service.apps.sentiment.evaluate import Decide, LabelledRow
    from gptjet.service.apps.sentiment.template import PromptTemplate

HELP = """Measure the app on rows whose label is known, VADER beside it on the same rows.

Accuracy, macro-F1, confusion, calibration error, what leaving out "uncertain" gains, throughput. \
Without --file: the held-out rows of the checkpoint that ships, which it never saw in training.
"""

EXAMPLES = """Examples:

$ gptjet sentiment evaluate --limit 200

$ gptjet sentiment evaluate --server gpu-box:50051 --template gpt-j --out result.json --plot it.png

$ gptjet sentiment evaluate --file reviews.csv --column text --label-column stars --no-vader
"""

_PANEL = "Rows"


@dataclass(frozen=True)
class RowFlags:
    """Which rows are measured."""

    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="CSV, TSV or JSON lines instead of the held-out rows",
            rich_help_panel=_PANEL,
        ),
    ] = None
    column: Annotated[
        str, typer.Option("--column", help="the column with the texts", rich_help_panel=_PANEL)
    ] = "text"
    label_column: Annotated[
        str,
        typer.Option("--label-column", help="the column with the labels", rich_help_panel=_PANEL),
    ] = "label"
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="so many of the rows", rich_help_panel=_PANEL),
    ] = None
    sample_seed: Annotated[
        int,
        typer.Option("--sample-seed", help="which ones --limit draws", rich_help_panel=_PANEL),
    ] = 0

    def load(self, template: PromptTemplate) -> list[LabelledRow]:
        """Raises TableError and OSError."""
        from gptjet.service import embedded
        from gptjet.service.apps.sentiment.evaluate import LabelledRow, load_rows, sample_rows

        if self.file is None:
            rows = [LabelledRow(row.text, row.label) for row in embedded.heldout_rows()]
        else:
            rows = load_rows(self.file, self.column, self.label_column, template)
        return sample_rows(rows, self.limit, self.sample_seed)


@with_server_settings(*MODEL_SETTINGS, panel="Model (without --server)")
@expand_flags
def command(
    *,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="write every figure as JSON")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="draw the figures, as .png or .svg"),
    ] = None,
    vader: Annotated[
        bool, typer.Option("--vader/--no-vader", help="compare with VADER on the same rows")
    ] = True,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=1024, help="rows in flight")
    ] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="print every figure as JSON")] = False,
    asked: ClassifierFlags,
    rows: RowFlags,
    connection: SentimentConnection,
    settings: dict[str, Any],
) -> None:
    """Measure, print, write."""
    from gptjet.benchmarks.files import write_atomically
    from gptjet.service.apps.sentiment.evaluate import EvaluationError
    from gptjet.service.apps.sentiment.pipeline import ServerGoneError
    from gptjet.service.apps.sentiment.plot import PlotError, check_plot, draw_evaluation

    template = asked.load_template()
    for flag, path in (("--out", out), ("--plot", plot)):
        if path is not None:
            check_can_be_made(flag, path)
    try:
        decide = _vader(template) if vader else None
        if plot is not None:
            check_plot(plot)
        main = _evaluate(template, asked, rows, concurrency, decide, connection, settings)
        report = run(main, connection)
        # First of all: what took so long to measure is not lost where a file cannot be written.
        typer.echo(json.dumps(report, ensure_ascii=False) if as_json else _table(report))
        if out is not None:
            write_atomically(out, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        if plot is not None:
            draw_evaluation(report, plot)
    except (EvaluationError, PlotError) as error:
        fail(str(error), ExitCode.USAGE)
    except ServerGoneError as error:
        fail(str(error), ExitCode.UNREACHABLE)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", ExitCode.USAGE)


async def _evaluate(
    template: PromptTemplate,
    asked: ClassifierFlags,
    row_flags: RowFlags,
    concurrency: int,
    decide: Decide | None,
    connection: SentimentConnection,
    settings: dict[str, Any],
) -> dict[str, Any]:
    from importlib import metadata  # slow to import

    from tqdm import tqdm

    from gptjet.benchmarks.environment import record_environment
    from gptjet.service.apps.sentiment.classify import ClassifierOptions, SentimentClassifier
    from gptjet.service.apps.sentiment.evaluate import evaluate

    rows = row_flags.load(template)
    data = "embedded held-out rows" if row_flags.file is None else row_flags.file.name
    async with open_client(connection, settings, retry=True) as client:
        options = ClassifierOptions(explain=asked.explain)
        classifier = SentimentClassifier(client, template, options=options)
        # disable=None: no bar where stderr is no terminal.
        with tqdm(total=len(rows), unit="row", disable=None, dynamic_ncols=True) as bar:
            report = await evaluate(
                classifier,
                rows,
                seed=asked.seed,
                concurrency=concurrency,
                decide=decide,
                on_progress=lambda done: bar.update(done - bar.n),
            )
    environment = record_environment()
    if decide is not None:
        environment["packages"]["vaderSentiment"] = metadata.version("vaderSentiment")
    sample = {"data": data, "limit": row_flags.limit, "sample_seed": row_flags.sample_seed}
    return report | {"sample": sample, "environment": environment}


def _vader(template: PromptTemplate) -> Decide | None:
    """VADER, where the template's labels are its labels; ends the command where it is missing."""
    from gptjet.service.apps.sentiment.vader import (
        VADER_LABELS,
        VaderMissingError,
        vader_decisions,
    )

    if not {label.name for label in template.labels} >= VADER_LABELS:
        print_note(f"VADER knows {', '.join(sorted(VADER_LABELS))}: not compared")
        return None
    try:
        vader_decisions([])
    except VaderMissingError as error:
        fail(str(error), ExitCode.USAGE)
    return vader_decisions


def _table(report: dict[str, Any]) -> str:
    labels = report["labels"]
    lines = [
        f"{'':<22}{'accuracy':>10}{'macro-F1':>10}  " + "  ".join(f"F1 {name}" for name in labels)
    ]
    compared = {
        "all rows": report["figures"],
        '"uncertain" left out': report["abstaining"]["figures"],
    }
    if report["vader"] is not None:
        compared["VADER, all rows"] = report["vader"]["figures"]
    for name, figures in compared.items():
        if figures is not None:
            f1 = "  ".join(f"{figures['f1'][label]:>{len(label) + 3}.3f}" for label in labels)
            lines.append(
                f"{name:<22}{figures['accuracy']:>10.3f}{figures['macro_f1']:>10.3f}  {f1}"
            )
    if report["vader"] is not None:
        gain = report["vader"]["macro_f1_advantage"]
        lines.append(
            f"macro-F1 above VADER's: {gain['difference']:+.3f} "
            f"(95% interval {gain['low']:+.3f} to {gain['high']:+.3f})"
        )
    lines.append("\nconfusion (rows: true, columns: decided)")
    width = max(len(name) for name in labels) + 2
    lines.append(" " * width + "".join(f"{name:>{width}}" for name in labels))
    for name, counts in zip(labels, report["figures"]["confusion"], strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{count:>{width}}" for count in counts))
    explanations, throughput = report["explanations"], report["throughput"]
    lines += [
        f"\ncoverage {report['abstaining']['coverage']:.1%} · expected calibration error "
        f"{report['calibration']['expected_error']:.3f}",
        f"explanations: {explanations['given']:.1%} of rows · contradict the label "
        f"{explanations['contradict_label']:.1%} · name a missing word "
        f"{explanations['name_missing_words']:.1%}",
        f"{report['rows']} rows in {throughput['seconds']:.1f} s: "
        f"{throughput['rows_per_second']:.1f} rows/s · {report['model']['name']} "
        f"({report['model']['backend']}, {report['model']['device']}, {report['model']['dtype']})",
    ]
    if report["errors"]:
        lines.append(f"{report['errors']} rows have an error; the first: {report['first_error']}")
    return "\n".join(lines)
