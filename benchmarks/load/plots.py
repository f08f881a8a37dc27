"""The optional plot of a run: latencies over time, and how they are distributed."""

from __future__ import annotations

import io
from pathlib import Path

from gptjet.benchmarks.files import write_atomically
from gptjet.benchmarks.load.coordinator import RunResult
from gptjet.benchmarks.load.samples import Sample


class PlotError(Exception):
    """The plot cannot be drawn; the message is one line for a person."""


# Okabe and Ito's palette, which colour-blind readers can tell apart; markers and lines differ too.
_STYLES = {"TTFT": ("#0072B2", "o", "-"), "E2E": ("#D55E00", "^", "--")}


def check_can_draw() -> None:
    """Raises PlotError at once for what would stop `draw_run` after a long run."""
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise PlotError("plots need matplotlib: pip install 'gptjet[bench]'") from None


def draw_run(result: RunResult, path: Path) -> None:
    """Write a PNG or SVG, as the suffix says. Raises PlotError without matplotlib, and OSError."""
    check_can_draw()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    over_time, share = figure.subplots(1, 2)
    answered = [sample for sample in result.samples if sample.is_ok]
    for name, (colour, marker, line) in _STYLES.items():
        points = [(s.intended_ns / 1e9, _value_ms(name, s)) for s in answered]
        if not points:
            continue
        over_time.scatter(*zip(*points, strict=True), s=12, c=colour, marker=marker, label=name)
        values = sorted(value for _, value in points)
        shares = [100 * (i + 1) / len(values) for i in range(len(values))]
        share.step(values, shares, where="post", color=colour, linestyle=line, label=name)
    over_time.set(xlabel="intended send time (s)", ylabel="ms", yscale="log")
    share.set(xlabel="ms", ylabel="requests at or below (%)", xscale="log")
    for axes in (over_time, share):
        axes.grid(visible=True, alpha=0.3)
        if answered:
            axes.legend()
    mode = f"{result.spec.mode} loop, {len(answered)} of {len(result.samples)} answered"
    figure.suptitle(mode + (", partial" if result.is_partial else ""))
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."), dpi=150)
    write_atomically(path, drawn.getvalue())


def _value_ms(name: str, sample: Sample) -> float:
    return (sample.ttft_ns or 0) / 1e6 if name == "TTFT" else sample.e2e_ns / 1e6
