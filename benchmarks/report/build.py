"""The one entry point: result files in, a folder with the report out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gptjet.benchmarks.config import load_all_bundled
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

    Returns what was written. Raises ReportError where there is nothing to report or a package is
    missing, and ResultsError for a file that cannot be read. Parquet is left out without pyarrow.
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

    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md", folder / "report.html"]
    written[0].write_text(markdown.render(document), encoding="utf-8")
    written[1].write_text(html.render(document), encoding="utf-8")
    for name, rows in (
        ("cells", export.cell_rows(analysis)),
        ("samples", export.sample_rows(analysis)),
    ):
        export.write_csv(rows, folder / f"{name}.csv")
        written.append(folder / f"{name}.csv")
        try:
            export.write_parquet(rows, folder / f"{name}.parquet", {"source": "gptjet sweep"})
            written.append(folder / f"{name}.parquet")
        except ImportError:
            continue
    for figure in figures:
        plots = folder / "plots"
        plots.mkdir(exist_ok=True)
        (plots / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
        (plots / f"{figure.name}.png").write_bytes(figure.png)
        written += [plots / f"{figure.name}.svg", plots / f"{figure.name}.png"]
    return written
