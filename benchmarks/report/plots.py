"""The plots. Levels differ in colour, marker and line, so that none of the three is needed alone.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), made to be told apart with any
colour vision.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjet.benchmarks.config import LevelName, SweepConfig
from gptjet.benchmarks.report.analysis import Analysis, CellStats, Machine
from gptjet.benchmarks.report.cost import Price, usd_per_million
from gptjet.benchmarks.report.document import Figure, Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_DPI = 150


class PlotError(Exception):
    """Plots cannot be drawn; the message is one line for a person."""


def draw_all(
    analysis: Analysis, prices: Mapping[str, Price], configs: Sequence[SweepConfig]
) -> list[Figure]:
    """Every plot that the samples allow. Raises PlotError without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise PlotError(
            "the plots need matplotlib: pip install 'gptjet[bench]', or give --no-plots"
        ) from None
    style: Any = {
        "svg.hashsalt": "gptjet",  # the same plot, the same file
        "font.size": 10,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#dddddd",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with mpl.rc_context(style):
        figures = []
        for machine in analysis.machines:
            figures += [_latency(analysis, machine), _split(analysis, machine)]
            if any(one.cell.machine == machine for one in analysis.reductions):
                figures.append(_reduction(analysis, machine, configs))
        if any(level.machine.hardware in prices for level in analysis.levels):
            figures.append(_cost(analysis, prices))
    return figures


def _latency(analysis: Analysis, machine: Machine) -> Figure:
    """The published experiment's figure: latency over output length, a panel an input length."""
    cells = _cells_of(analysis, machine)
    inputs = sorted({cell.input_tokens for cell in cells})
    canvas, axes = _panels(len(inputs))
    for panel, input_tokens in zip(axes, inputs, strict=True):
        for level, look in _looks(analysis).items():
            line = [c for c in cells if c.level == level and c.input_tokens == input_tokens]
            line.sort(key=lambda cell: cell.output_tokens)
            if line:
                panel.errorbar(
                    [cell.output_tokens for cell in line],
                    [cell.e2e.mean / 1000 for cell in line],
                    yerr=[cell.e2e.sd / 1000 for cell in line],
                    capsize=3,
                    label=str(level),
                    **look,
                )
        panel.set_title(f"{input_tokens} input tokens", fontsize=10)
        panel.set_xlabel("output tokens")
        panel.set_xticks(sorted({cell.output_tokens for cell in cells}))
    # The panels share the axis: set before the last is drawn, it would cut the others' bars off.
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("E2E latency, s (mean, SD)")
    _legend(canvas, axes, f"E2E latency over output length: {machine}")
    return _figure(
        canvas,
        f"latency-{_slug(machine)}",
        Kind.MEASURED,
        f"E2E latency over output length, by input length and level: {machine}. Mean and SD.",
    )


def _split(analysis: Analysis, machine: Machine) -> Figure:
    """TTFT and TPOT over the input length."""
    cells = _cells_of(analysis, machine)
    canvas, axes = _panels(2, share=False)
    inputs = sorted({cell.input_tokens for cell in cells})
    for level, look in _looks(analysis).items():
        mine = [cell for cell in cells if cell.level == level]
        if not mine:
            continue
        for panel, pick in zip(axes, (_ttfts, _tpots), strict=True):
            points = {
                tokens: values
                for tokens in inputs
                if (values := [v for c in mine if c.input_tokens == tokens for v in pick(c)])
            }
            if points:
                low, middle, high = (
                    np.array([np.percentile(values, q) for values in points.values()])
                    for q in (5, 50, 95)
                )
                panel.errorbar(
                    list(points),
                    middle,
                    yerr=np.vstack([middle - low, high - middle]),
                    capsize=3,
                    label=str(level),
                    **look,
                )
    for panel, name in zip(axes, ("TTFT", "TPOT"), strict=True):
        panel.set_xlabel("input tokens")
        panel.set_xticks(inputs)
        panel.set_ylabel(f"{name}, ms (median, p5 to p95)")
        panel.set_ylim(bottom=0)
    _legend(canvas, axes, f"First token and further tokens: {machine}")
    return _figure(
        canvas,
        f"split-{_slug(machine)}",
        Kind.MEASURED,
        f"Time to first token and time per output token over input length: {machine}. "
        f"Median over all runs and output lengths, 5th to 95th percentile.",
    )


def _reduction(analysis: Analysis, machine: Machine, configs: Sequence[SweepConfig]) -> Figure:
    """Latency reduction over the input length, with what was published for the same hardware."""
    cells = _cells_of(analysis, machine)
    canvas, axes = _panels(1, width=7.0)
    panel = axes[0]
    for level, look in _looks(analysis).items():
        mine = [one for one in analysis.reductions if one.cell.machine == machine]
        mine = [one for one in mine if one.cell.level == level]
        if not mine:
            continue
        inputs = sorted({one.cell.input_tokens for one in mine})
        means = [
            float(np.mean([o.interval.estimate for o in mine if o.cell.input_tokens == tokens]))
            for tokens in inputs
        ]
        panel.plot(inputs, [100 * value for value in means], label=f"{level}, measured", **look)
        panel.vlines(
            [one.cell.input_tokens for one in mine],
            [100 * one.interval.low for one in mine],
            [100 * one.interval.high for one in mine],
            color=str(look["color"]),
            alpha=0.35,
        )
    for config in configs:
        if config.hardware.name != machine.hardware or not machine.model.startswith("gpt-j-6b"):
            continue
        for result in config.published:
            points = sorted(result.latency_reduction_by_input.items())
            if points:
                panel.plot(
                    [tokens for tokens, _ in points],
                    [100 * value for _, value in points],
                    linestyle="none",
                    marker="*",
                    markersize=13,
                    markerfacecolor="none",
                    color="#000000",
                    label=f"{result.treatment.backend}, published",
                )
    panel.axhline(0, color="#555555", linewidth=0.8)
    panel.set_xlabel("input tokens")
    panel.set_xticks(sorted({cell.input_tokens for cell in cells}))
    panel.set_ylabel("latency reduction, %")
    _legend(canvas, axes, f"Reduction against {analysis.baselines[machine]}: {machine}")
    return _figure(
        canvas,
        f"reduction-{_slug(machine)}",
        Kind.DERIVED,
        f"Latency reduction against {analysis.baselines[machine]} over input length: {machine}. "
        f"Lines: mean over output lengths; bars: 95 % bootstrap interval of each cell.",
    )


def _cost(analysis: Analysis, prices: Mapping[str, Price]) -> Figure:
    levels = [level for level in analysis.levels if level.machine.hardware in prices]
    canvas, axes = _panels(1, width=7.0, height=1.2 + 0.42 * len(levels))
    panel = axes[0]
    names = [f"{level.machine.hardware}  {level.level}" for level in levels]
    costs = [
        usd_per_million(prices[level.machine.hardware].usd_per_hour, level.overall_tokens_per_s)
        for level in levels
    ]
    bars = panel.barh(names, costs, color=_COLOURS[0], height=0.6)
    panel.bar_label(bars, [f"{cost:.2f}" for cost in costs], padding=4)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.grid(visible=False, axis="y")
    panel.set_xlabel("US dollars a million output tokens, one request at a time")
    return _figure(
        canvas, "cost", Kind.DERIVED, "Cost of a million output tokens, machine paid by the hour."
    )


def _panels(
    count: int, *, share: bool = True, width: float | None = None, height: float = 3.6
) -> tuple[Canvas, list[Axes]]:
    from matplotlib.figure import Figure as MatplotlibFigure

    canvas = MatplotlibFigure(
        figsize=(width or max(5.0, 2.9 * count), height), layout="constrained"
    )
    grid = canvas.subplots(1, count, sharey=share, squeeze=False)
    return canvas, list(grid[0])


def _legend(canvas: Canvas, axes: Sequence[Axes], title: str) -> None:
    """Below the panels, no wider than they are; and the title above them."""
    handles, labels = axes[0].get_legend_handles_labels()
    # A label of n characters takes about 0.08 n + 0.6 inches at this font size.
    width = max((0.08 * len(label) + 0.6 for label in labels), default=1.0)
    columns = max(1, min(len(labels), int(canvas.get_figwidth() / width)))
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns)
    canvas.suptitle(title, fontsize=11, fontweight="bold")


def _looks(analysis: Analysis) -> dict[LevelName, dict[str, Any]]:
    """Each level's colour, marker and line: the same in every plot, baselines first."""
    baselines = set(analysis.baselines.values())
    levels = sorted(
        {cell.level for cell in analysis.cells},
        key=lambda level: (level not in baselines, str(level)),
    )
    return {
        level: {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": _LINES[index % len(_LINES)],
            "markersize": 5,
        }
        for index, level in enumerate(levels)
    }


def _cells_of(analysis: Analysis, machine: Machine) -> list[CellStats]:
    return [cell for cell in analysis.cells if cell.machine == machine]


def _ttfts(cell: CellStats) -> list[float]:
    return [sample.ttft_ms for sample in cell.samples]


def _tpots(cell: CellStats) -> list[float]:
    return [sample.tpot_ms for sample in cell.samples if sample.tpot_ms is not None]


def _figure(canvas: Canvas, name: str, kind: Kind, caption: str) -> Figure:
    svg, png = io.StringIO(), io.BytesIO()
    canvas.savefig(svg, format="svg", metadata={"Date": None})
    canvas.savefig(png, format="png", dpi=_DPI)
    return Figure(name, kind, caption, caption, svg.getvalue(), png.getvalue())


def _slug(machine: Machine) -> str:
    text = f"{machine.hardware}-{machine.model}".lower()
    return "".join(character if character.isalnum() else "-" for character in text)
