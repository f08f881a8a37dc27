"""The evaluation as one picture: confusion, calibration, and the comparison.

Colours are those of Okabe and Ito ("Color Universal Design", 2008); nothing is told by colour
alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#555555"
_DPI = 150
_SUFFIXES = (".png", ".svg")


class PlotError(Exception):
    """The plot cannot be drawn; the message is one line for a person."""


def check_plot(path: Path) -> None:
    """Raises PlotError at once for what would stop `draw_evaluation` after a long run."""
    if path.suffix.lower() not in _SUFFIXES:
        raise PlotError(f"{path}: a plot's name must end in {' or '.join(_SUFFIXES)}")
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise PlotError("the plot needs matplotlib: pip install 'gptjet[sentiment]'") from None


def draw_evaluation(report: Mapping[str, Any], path: Path) -> None:
    """Draw what `figures_of` gave; the file is written beside its name and renamed."""
    check_plot(path)
    import matplotlib as mpl

    # "Agg" needs no display; the salt makes the same figures the same SVG file.
    with mpl.rc_context({"font.size": 10, "svg.hashsalt": "gptjet", "backend": "Agg"}):
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(13, 4.2), layout="constrained")
        panels = canvas.subplots(1, 3)
        _confusion(panels[0], report)
        _calibration(panels[1], report)
        _comparison(panels[2], report)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        kind = path.suffix.lower().removeprefix(".")
        # Without a date the same figures are the same file.
        metadata = {"Date": None} if kind == "svg" else None
        try:
            canvas.savefig(unfinished, format=kind, dpi=_DPI, metadata=metadata)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _confusion(panel: Axes, report: Mapping[str, Any]) -> None:
    counts, labels = report["figures"]["confusion"], report["labels"]
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            ink = "white" if shares[i][j] > 0.5 else "black"
            words = f"{count}\n{shares[i][j]:.0%}"
            panel.text(j, i, words, ha="center", va="center", color=ink)
    panel.set_xticks(range(len(labels)), labels)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_xlabel("decided")
    panel.set_ylabel("true")
    panel.set_title(f"Confusion, {report['figures']['rows']} rows")


def _calibration(panel: Axes, report: Mapping[str, Any]) -> None:
    bins = report["calibration"]["bins"]
    panel.plot([0, 1], [0, 1], linestyle="--", color=_GREY, label="perfectly calibrated")
    panel.plot(
        [one["confidence"] for one in bins],
        [one["accuracy"] for one in bins],
        marker="o",
        color=_BLUE,
        label="decisions, by confidence",
    )
    for one in bins:
        panel.annotate(
            f"{one['rows']}",
            (one["confidence"], one["accuracy"]),
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            fontsize=8,
            color=_GREY,
        )
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1)
    panel.set_xlabel("confidence (numbers: rows)")
    panel.set_ylabel("accuracy")
    panel.set_title(f"Expected calibration error {report['calibration']['expected_error']:.3f}")
    panel.legend(frameon=False, loc="upper left")


def _comparison(panel: Axes, report: Mapping[str, Any]) -> None:
    compared = {"all\nrows": report["figures"]}
    abstaining = report["abstaining"]
    if abstaining["figures"] is not None:
        name = f'"uncertain"\nleft out:\n{abstaining["coverage"]:.0%} of rows'
        compared[name] = abstaining["figures"]
    if report["vader"] is not None:
        compared["VADER,\nall rows"] = report["vader"]["figures"]
    for offset, key, colour, hatch, name in (
        (-0.2, "macro_f1", _BLUE, "", "macro-F1"),
        (0.2, "accuracy", _ORANGE, "//", "accuracy"),
    ):
        bars = panel.bar(
            [place + offset for place in range(len(compared))],
            [figures[key] for figures in compared.values()],
            width=0.38,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=name,
        )
        panel.bar_label(bars, fmt="%.3f", fontsize=9)
    panel.set_xticks(range(len(compared)), list(compared))
    panel.set_ylim(0, 1)
    panel.set_title("Macro-F1 and accuracy")
    panel.legend(frameon=False, loc="upper right")
