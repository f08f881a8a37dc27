"""The one entry point: result files in, a folder with the report out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptjet.benchmarks.config import load_all_bundled
from gptjet.benchmarks.files import write_atomically
from gptjet.benchmarks.records import Results
from gptjet.benchmarks.report import export, html, markdown
from gptjet.benchmarks.report.analysis import analyse
from gptjet.benchmarks.report.content import Material, compose
from gptjet.benchmarks.report.cost import prices as known_prices
from gptjet.benchmarks.report.plots import PlotError, draw_all


class ReportError(Exception):
    """No report can be made; the message is one line for a person."""


def write_report(
    files: Sequence[Path],
    folder: Path,
    *,
    prices: Mapping[str, float] | None = None,
    with_plots: bool = True,
) -> list[Path]:
    """Merge the files and write report.md, report.html, cells and samples, and plots/.

    Returns what was written, each file whole or not at all. Raises ReportError where there is
    nothing to report, a package is missing or a file cannot be written, and ResultsError for one
    that cannot be read. Parquet is left out without pyarrow.
    """
    results = Results.read(files)
    if not results.samples:
        raise ReportError("no measured run is in these files: there is nothing to report")
    lost = {sample.session for sample in results.samples.values()} - set(results.sessions)
    if lost:
        raise ReportError("the files hold runs of a session whose record is missing")
    analysis = analyse(results)
    configs = load_all_bundled()
    cost = known_prices(analysis, prices or {})
    try:
        figures = tuple(draw_all(analysis, cost, configs)) if with_plots else ()
    except PlotError as error:
        raise ReportError(str(error)) from error
    document = compose(Material(analysis, configs, cost, figures))

    contents: dict[Path, str | bytes] = {
        folder / "report.md": markdown.render(document),
        folder / "report.html": html.render(document),
    }
    for name, rows in (
        ("cells", export.cell_rows(analysis)),
        ("samples", export.sample_rows(analysis)),
    ):
        contents[folder / f"{name}.csv"] = export.csv_text(rows)
        with contextlib.suppress(ImportError):
            parquet = export.parquet_bytes(rows, {"source": "gptjet sweep"})
            contents[folder / f"{name}.parquet"] = parquet
    for figure in figures:
        contents[folder / "plots" / f"{figure.name}.svg"] = figure.svg
        contents[folder / "plots" / f"{figure.name}.png"] = figure.png
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}") from error
    return list(contents)
