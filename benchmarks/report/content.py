"""The report's sections: what is said in which order, each table with its kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gptjet.benchmarks.config import SweepConfig
from gptjet.benchmarks.published import PublishedLevel, disagreements
from gptjet.benchmarks.report.analysis import Analysis, LevelSummary, Machine
from gptjet.benchmarks.report.cost import Price
from gptjet.benchmarks.report.document import (
    Document,
    Figure,
    Kind,
    Paragraph,
    Section,
    Table,
)
from gptjet.benchmarks.report.sections import cost_section, floor_section, record_section
from gptjet.benchmarks.report.warnings import warnings_of
from gptjet.benchmarks.report.words import interval_text, number, percent, with_sd
from gptjet.benchmarks.statistics import CONFIDENCE, RESAMPLES


@dataclass(frozen=True, slots=True)
class Material:
    """What a report is written from."""

    analysis: Analysis
    configs: tuple[SweepConfig, ...]
    prices: Mapping[str, Price]
    figures: tuple[Figure, ...]


def compose(material: Material) -> Document:
    """The whole report."""
    analysis = material.analysis
    samples = len(analysis.results.samples)
    machines = "; ".join(str(machine) for machine in analysis.machines)
    document = Document(
        title="GPTJet latency report",
        subtitle=f"{samples} measured runs in {len(analysis.cells)} cells on {machines}",
    )
    writers: Sequence[Callable[[Material], Section]] = (
        _overview,
        _published,
        _plots,
        _cells,
        _reductions,
        _split,
        lambda m: floor_section(m.analysis),
        lambda m: cost_section(m.analysis, m.prices, m.configs),
        lambda m: record_section(m.analysis),
        _method,
    )
    document.sections = [section for write in writers if (section := write(material)).parts]
    return document


def _overview(material: Material) -> Section:
    analysis = material.analysis
    section = Section("Result")
    section.parts += [Paragraph(text, is_warning=True) for text in warnings_of(analysis)]
    inputs = sorted({tokens for level in analysis.levels for tokens in level.reduction_by_input})
    rows = []
    for level in analysis.levels:
        baseline = analysis.baselines[level.machine]
        rows.append(
            (
                level.machine.hardware,
                level.machine.model,
                str(level.level) + (" (baseline)" if level.level == baseline else ""),
                str(len(level.cells)),
                with_sd(level.tokens_per_s, level.tokens_per_s_sd),
                interval_text(level.reduction),
                percent(level.reduction_sd),
                *(percent(level.reduction_by_input.get(tokens)) for tokens in inputs),
            )
        )
    section.parts.append(
        Table(
            "Each level over its cells: tokens/s (mean of the cells' means, SD over the cells) and "
            "latency reduction against the baseline",
            Kind.MEASURED,
            (
                "hardware",
                "model",
                "level",
                "cells",
                "tokens/s (SD)",
                "latency reduction [95 % CI]",
                "SD over cells",
                *(f"at {tokens} in" for tokens in inputs),
            ),
            tuple(rows),
            num_text_columns=3,
        )
    )
    return section


def _published(material: Material) -> Section:
    section = Section("Published figures")
    ours = {
        (level.machine.hardware, str(level.level)): level
        for level in material.analysis.levels
        if level.machine.model.startswith("gpt-j-6b")
    }
    rows = []
    for config in material.configs:
        for result in config.published:
            for side in (result.baseline, result.treatment):
                is_treatment = side is result.treatment
                mine = ours.get((config.hardware.name, f"{side.backend}/{side.weight_type}"))
                by_input = ", ".join(
                    f"{percent(value)} at {tokens}"
                    for tokens, value in sorted(result.latency_reduction_by_input.items())
                )
                rows.append(
                    (
                        result.experiment,
                        config.hardware.name,
                        f"{side.backend}/{side.weight_type}",
                        _published_rate(side),
                        with_sd(result.latency_reduction, result.latency_reduction_sd, show=percent)
                        if is_treatment
                        else "",
                        by_input if is_treatment else "",
                        *(_measured_beside(mine) if result.same_design else ("another design", "")),
                    )
                )
    if rows:
        section.parts.append(
            Table(
                "Published by others, with what was measured here beside it where the card, the "
                "model (gpt-j-6b) and the level are the same",
                Kind.PUBLISHED,
                (
                    "experiment",
                    "card",
                    "level",
                    "published: tokens/s (SD)",
                    "published: latency reduction (SD)",
                    "published: by input length",
                    "measured here: tokens/s (SD)",
                    "measured here: latency reduction [95 % CI]",
                ),
                tuple(rows),
                num_text_columns=3,
            )
        )
        sources = sorted({r.source for config in material.configs for r in config.published})
        section.parts.append(Paragraph("Sources: " + "; ".join(sources) + "."))
    section.parts += [
        Paragraph(one.sentence(), is_warning=True) for one in disagreements(material.configs)
    ]
    return section


def _published_rate(side: PublishedLevel) -> str:
    """As it was printed; converted only where it was not tokens/s."""
    if side.tokens_per_s is None:
        return f"{number(side.rate)} (from {side.ms_per_token:g} ms)"
    sd = "" if side.tokens_per_s_sd is None else f" ({side.tokens_per_s_sd:g})"
    return f"{side.tokens_per_s:g}{sd}"


def _measured_beside(level: LevelSummary | None) -> tuple[str, str]:
    if level is None:
        return "not measured here", ""
    rate = with_sd(level.tokens_per_s, level.tokens_per_s_sd)
    return rate, interval_text(level.reduction)


def _plots(material: Material) -> Section:
    return Section("Plots", list(material.figures))


def _cells(material: Material) -> Section:
    section = Section("Cells")
    for machine in material.analysis.machines:
        rows = tuple(
            (
                str(cell.level),
                str(cell.input_tokens),
                str(cell.output_tokens),
                str(cell.e2e.n),
                str(cell.num_failures),
                number(cell.e2e.mean),
                number(cell.e2e.sd),
                number(cell.e2e.median),
                number(cell.e2e.p95),
                with_sd(cell.tokens_per_s, cell.tokens_per_s_sd),
            )
            for cell in material.analysis.cells
            if cell.machine == machine
        )
        section.parts.append(
            Table(
                f"E2E latency in ms and tokens/s: {machine}",
                Kind.MEASURED,
                (
                    "level",
                    "input",
                    "output",
                    "runs",
                    "failed",
                    "mean",
                    "SD",
                    "median",
                    "p95",
                    "tokens/s (SD)",
                ),
                rows,
                folded=True,
            )
        )
    return section


def _reductions(material: Material) -> Section:
    section = Section("Latency reduction by cell")
    for machine in material.analysis.machines:
        rows = tuple(
            (
                str(one.cell.level),
                str(one.cell.input_tokens),
                str(one.cell.output_tokens),
                interval_text(one.interval),
                "yes" if _excludes_zero(one.interval.low, one.interval.high) else "no",
            )
            for one in material.analysis.reductions
            if one.cell.machine == machine
        )
        if rows:
            section.parts.append(
                Table(
                    f"Against {material.analysis.baselines[machine]}: {machine}",
                    Kind.MEASURED,
                    ("level", "input", "output", "reduction [95 % CI]", "interval excludes 0"),
                    rows,
                    folded=True,
                )
            )
    return section


def _excludes_zero(low: float, high: float) -> bool:
    return not math.isnan(low) and (low > 0 or high < 0)


def _split(material: Material) -> Section:
    section = Section("First token and further tokens")
    for machine in material.analysis.machines:
        rows = tuple(
            (
                str(cell.level),
                str(cell.input_tokens),
                str(cell.output_tokens),
                number(cell.ttft.mean),
                number(cell.ttft.p95),
                number(cell.tpot.mean) if cell.tpot else "",
                number(cell.tpot.p95) if cell.tpot else "",
                percent(cell.ttft.mean / cell.e2e.mean),
            )
            for cell in material.analysis.cells
            if cell.machine == machine
        )
        section.parts.append(
            Table(
                f"TTFT and TPOT in ms: {machine}",
                Kind.MEASURED,
                (
                    "level",
                    "input",
                    "output",
                    "TTFT mean",
                    "TTFT p95",
                    "TPOT mean",
                    "TPOT p95",
                    "TTFT of E2E",
                ),
                rows,
                folded=True,
            )
        )
    return section


def _method(material: Material) -> Section:
    machines: Sequence[Machine] = material.analysis.machines
    ways = {s.servers for m in machines for s in material.analysis.sessions_of(m)}
    order = {
        "together": "all servers were alive and the runs of a block came in one random order",
        "alternate": "one server was alive at a time, the levels took turns in random order inside "
        "each block, and each level's cells were shuffled",
    }
    return Section(
        "Method",
        [
            Paragraph(
                "Every run is one streamed request over gRPC, alone on the machine, to a warmed-up "
                "server: random prompt ids that no run shares with another, exactly the cell's "
                "input and output lengths (end-of-text ignored), greedy. Times are the client's, "
                "on a monotonic clock: TTFT until the first token arrived, E2E until the stream "
                "had ended. The published experiment sent text; here ids are sent, so tokenising "
                "the prompt (under a millisecond) is not in the numbers; detokenising is."
            ),
            Paragraph(
                "Runs come in randomised blocks, each with the same number of runs of every cell, "
                "so that drift of the machine falls on all levels alike: "
                + "; ".join(order[way] for way in sorted(ways))
                + "."
            ),
            Paragraph(
                f"Latency reduction is 1 - mean / baseline mean; its interval is a percentile "
                f"bootstrap, {100 * CONFIDENCE:.0f} %, {RESAMPLES} resamples, both sides resampled "
                f"independently. SD is of the sample (n - 1). p95 is linear between order "
                f"statistics. tokens/s is output tokens over E2E latency, prompt included."
            ),
        ],
    )
