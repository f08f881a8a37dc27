"""`gptjet sentiment --file`: its flags, its progress bar, and how it ends."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptjet.service.commands.sentiment_client import (
    ClassifierFlags,
    SentimentConnection,
    open_client,
    run,
)
from gptjet.service.commands.terminal import ExitCode, check_can_be_made, fail, print_note

if TYPE_CHECKING:
    from gptjet.service.apps.sentiment.batch import BatchSpec, BatchSummary
    from gptjet.service.apps.sentiment.template import PromptTemplate

_PANEL = "File"
_ERRORS_SHOWN = 5


@dataclass(frozen=True)
class FileFlags:
    """Rows instead of one text."""

    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="CSV, TSV or JSON lines (.csv, .tsv, .jsonl), with a header",
            rich_help_panel=_PANEL,
        ),
    ] = None
    column: Annotated[
        str | None,
        typer.Option(
            "--column",
            metavar="NAME",
            help="the column with the texts. Default: text",
            rich_help_panel=_PANEL,
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="the rows again, with label, probabilities, explanation and error; a run that was "
            "cut off goes on where it stopped",
            rich_help_panel=_PANEL,
        ),
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="replace --out if it exists", rich_help_panel=_PANEL),
    ] = False
    excel_safe: Annotated[
        bool,
        typer.Option(
            "--excel-safe",
            help="put ' before cells that a spreadsheet would calculate (=, +, -, @)",
            rich_help_panel=_PANEL,
        ),
    ] = False
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            min=1,
            max=1024,
            help="rows in flight. Default: 16",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def check_unused(self) -> None:
        """Ends the command where a flag of files stands beside a text."""
        for field in fields(self):
            if getattr(self, field.name) not in (None, False):
                fail(f"--{field.name.replace('_', '-')} needs --file", ExitCode.USAGE)

    def spec(self, seed: int) -> BatchSpec:
        """What is to be made; ends the command where it is not said."""
        from gptjet.service.apps.sentiment.batch import BatchSpec

        if self.file is None or self.out is None:
            fail("--file needs --out, the file to write", ExitCode.USAGE)
        if self.out.resolve() == self.file.resolve():
            fail("--out must not be --file", ExitCode.USAGE)
        check_can_be_made("--out", self.out)
        return BatchSpec(
            source=self.file,
            column=self.column or "text",
            out=self.out,
            seed=seed,
            concurrency=self.concurrency or 16,
            excel_safe=self.excel_safe,
            overwrite=self.overwrite,
        )


def classify_rows(
    flags: FileFlags,
    asked: ClassifierFlags,
    template: PromptTemplate,
    connection: SentimentConnection,
    settings: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Make the file, or keep what is done and say how to go on."""
    from gptjet.service.apps.sentiment.batch import BatchError, journal_path
    from gptjet.service.apps.sentiment.pipeline import ServerGoneError

    spec = flags.spec(asked.seed)
    kept = f"what is done is kept in {journal_path(spec.out)}; run the same command to go on"
    try:
        summary, seconds = run(
            _classify_rows(spec, asked, template, connection, settings), connection
        )
    except ServerGoneError as error:
        fail(f"{error}\n{kept}", ExitCode.UNREACHABLE)
    except BatchError as error:
        fail(str(error), ExitCode.FAILURE)
    except typer.Exit:
        if journal_path(spec.out).exists():
            print_note(kept)
        raise
    except KeyboardInterrupt:
        print_note(f"interrupted; {kept}" if journal_path(spec.out).exists() else "interrupted")
        raise
    _report(spec, summary, seconds, as_json=as_json)
    if summary.rows and len(summary.errors) == summary.rows:
        raise typer.Exit(ExitCode.FAILURE)


async def _classify_rows(
    spec: BatchSpec,
    asked: ClassifierFlags,
    template: PromptTemplate,
    connection: SentimentConnection,
    settings: dict[str, Any],
) -> tuple[BatchSummary, float]:
    """(what was made, seconds it took without loading a model)"""
    from tqdm import tqdm

    from gptjet.service.apps.sentiment.batch import classify_file, count_rows
    from gptjet.service.apps.sentiment.classify import ClassifierOptions, SentimentClassifier

    total = count_rows(spec.source, spec.column)
    async with open_client(connection, settings, retry=True) as client:
        options = ClassifierOptions(explain=asked.explain)
        classifier = SentimentClassifier(client, template, options=options)
        # disable=None: no bar where stderr is no terminal.
        with tqdm(total=total, unit="row", disable=None, dynamic_ncols=True) as bar:

            def on_progress(rows: int) -> None:
                if bar.n == 0 and rows > 1:
                    bar.initial = rows  # of an earlier run: they say nothing about the speed
                bar.update(rows - bar.n)

            started = time.monotonic()
            summary = await classify_file(classifier, spec, on_progress)
            return summary, time.monotonic() - started


def _report(spec: BatchSpec, summary: BatchSummary, seconds: float, *, as_json: bool) -> None:
    made = summary.rows - summary.resumed
    rate = made / seconds if seconds else 0.0
    if as_json:
        values = {
            "out": str(spec.out),
            "rows": summary.rows,
            "resumed": summary.resumed,
            "labels": dict(summary.labels),
            "errors": summary.errors,
            "rows_per_second": round(rate, 2),
        }
        typer.echo(json.dumps(values, ensure_ascii=False))
        return
    counts = " · ".join(f"{label} {count}" for label, count in summary.labels.most_common())
    typer.echo(f"{spec.out}: {summary.rows} rows · {counts}")
    for line, error in summary.errors[:_ERRORS_SHOWN]:
        print_note(f"line {line}: {error}")
    if len(summary.errors) > _ERRORS_SHOWN:
        print_note(f"{len(summary.errors)} rows have an error; the column error names them all")
    before = f", {summary.resumed} were done before" if summary.resumed else ""
    print_note(f"{rate:.1f} rows/s{before}")
