"""Sections of the report beside the measured latencies: floors, cost, and what was recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptjet.benchmarks.config import SweepConfig
from gptjet.benchmarks.report.analysis import Analysis
from gptjet.benchmarks.report.cost import Price, compare, crossovers, usd_per_million
from gptjet.benchmarks.report.document import Kind, Paragraph, Section, Table
from gptjet.benchmarks.report.words import number, percent


def floor_section(analysis: Analysis) -> Section:
    """Each cell's modelled floor, and in a table of its own the share that was reached."""
    section = Section("How close to the floor")
    if not analysis.floors:
        return section
    section.parts.append(
        Paragraph(
            "The floor is modelled: the weights once a step, the KV cache, and the FLOPs, at the "
            "bandwidth and matrix rate of the named basis; see gptjet.benchmarks.roofline. No "
            "implementation of the same weight type can be faster than it, unless the model fits a "
            "cache that the bandwidth was not measured in."
        )
    )
    for basis in sorted({floor.floor.basis for floor in analysis.floors}):
        floors = [floor for floor in analysis.floors if floor.floor.basis == basis]
        what = "datasheet rates" if basis == "datasheet" else "rates measured on the machine"
        section.parts.append(
            Table(
                f"Modelled floor in ms, from {what}",
                Kind.MODELLED,
                (
                    "hardware",
                    "model",
                    "weights",
                    "input",
                    "output",
                    "modelled TTFT",
                    "modelled TPOT",
                    "modelled E2E",
                    "a step is bound by",
                ),
                tuple(
                    dict.fromkeys(
                        (
                            floor.cell.machine.hardware,
                            floor.cell.machine.model,
                            floor.cell.level.weight_type,
                            str(floor.cell.input_tokens),
                            str(floor.cell.output_tokens),
                            number(floor.floor.ttft_ms),
                            number(floor.floor.tpot_ms),
                            number(floor.floor.e2e_ms),
                            floor.floor.bound,
                        )
                        for floor in floors
                    )
                ),
                num_text_columns=3,
                folded=True,
            )
        )
        section.parts.append(
            Table(
                f"Share of the floor that was reached (floor / measured mean), from {what}",
                Kind.DERIVED,
                ("hardware", "model", "level", "input", "output", "E2E", "TTFT", "TPOT"),
                tuple(
                    (
                        floor.cell.machine.hardware,
                        floor.cell.machine.model,
                        str(floor.cell.level),
                        str(floor.cell.input_tokens),
                        str(floor.cell.output_tokens),
                        percent(floor.share),
                        percent(floor.floor.ttft_ms / floor.cell.ttft.mean),
                        percent(floor.floor.tpot_ms / floor.cell.tpot.mean)
                        if floor.cell.tpot
                        else "",
                    )
                    for floor in floors
                ),
                num_text_columns=3,
                folded=True,
            )
        )
    return section


def cost_section(
    analysis: Analysis, prices: Mapping[str, Price], configs: Sequence[SweepConfig]
) -> Section:
    """Cost of a million tokens: measured, and from published rates in a table of its own."""
    section = Section("Cost")
    rows = [
        (
            level.machine.hardware,
            level.machine.model,
            str(level.level),
            _priced(prices[level.machine.hardware]),
            number(level.overall_tokens_per_s),
            number(
                usd_per_million(
                    prices[level.machine.hardware].usd_per_hour, level.overall_tokens_per_s
                )
            ),
        )
        for level in analysis.levels
        if level.machine.hardware in prices
    ]
    if rows:
        section.parts.append(
            Table(
                "A million output tokens, one request at a time, machine never idle",
                Kind.DERIVED,
                ("hardware", "model", "level", "price", "tokens/s over all cells", "USD a million"),
                tuple(rows),
                num_text_columns=4,
            )
        )
    section.parts += _between_machines(analysis, prices)
    section.parts += _published_cost(configs)
    without = sorted({m.hardware for m in analysis.machines} - set(prices))
    if without:
        section.parts.append(
            Paragraph(f"No price is known for {', '.join(without)}: give --price NAME=USD an hour.")
        )
    return section


def _between_machines(analysis: Analysis, prices: Mapping[str, Price]) -> list[Table]:
    comparisons = compare(analysis, prices)
    if not comparisons:
        return []
    return [
        Table(
            "Crossover between machines along the output length",
            Kind.DERIVED,
            ("machines", "level", "input", "cheaper at the shortest output", "changes at output"),
            tuple(
                (
                    f"{one.left} / {one.right}",
                    str(one.level),
                    str(one.input_tokens),
                    one.cheaper_at_first,
                    "never" if one.output_tokens is None else f"{one.output_tokens:.0f}",
                )
                for one in crossovers(comparisons)
            ),
            num_text_columns=2,
        ),
        Table(
            "The same cell on two machines: US dollars a million output tokens",
            Kind.DERIVED,
            (
                "machines",
                "level",
                "input",
                "output",
                "first",
                "second",
                "cheaper",
                "second breaks even at USD/h",
            ),
            tuple(
                (
                    f"{one.left} / {one.right}",
                    str(one.level),
                    str(one.input_tokens),
                    str(one.output_tokens),
                    number(one.left_usd),
                    number(one.right_usd),
                    one.cheaper,
                    number(one.break_even_usd),
                )
                for one in comparisons
            ),
            num_text_columns=2,
            folded=True,
        ),
    ]


def _published_cost(configs: Sequence[SweepConfig]) -> list[Table]:
    rows = []
    for config in configs:
        instance = config.hardware.instance
        for result in config.published:
            if instance is None or result.instance != instance.name:
                continue
            for side in (result.baseline, result.treatment):
                rows.append(
                    (
                        result.experiment,
                        config.hardware.name,
                        f"{side.backend}/{side.weight_type}",
                        f"{instance.usd_per_hour:g} USD/h ({instance.name}, {instance.as_of})",
                        number(side.rate),
                        number(usd_per_million(instance.usd_per_hour, side.rate)),
                    )
                )
    if not rows:
        return []
    return [
        Table(
            "What the published rates cost at list price",
            Kind.PUBLISHED,
            (
                "experiment",
                "card",
                "level",
                "price",
                "published: tokens/s",
                "from published: USD a million",
            ),
            tuple(rows),
            num_text_columns=4,
        )
    ]


def record_section(analysis: Analysis) -> Section:
    """Machines, versions, failures and cells that cannot run."""
    section = Section("What was recorded")
    results = analysis.results
    rows = []
    for machine in analysis.machines:
        for session in analysis.sessions_of(machine):
            made = sum(1 for s in results.samples.values() if s.session == session.session)
            rows.append((str(machine), session.started_at, str(made), *_machine(session)))
    section.parts.append(
        Table(
            "Sessions",
            Kind.RECORDED,
            (
                "machine",
                "started",
                "runs",
                "processor or card",
                "measured rates",
                "versions",
                "commit",
                "load",
            ),
            tuple(rows),
            num_text_columns=8,
        )
    )
    if results.infeasible:
        section.parts.append(
            Table(
                "Cells that cannot run",
                Kind.RECORDED,
                ("hardware", "model", "level", "input", "output", "reason"),
                tuple(
                    (
                        cell.hardware,
                        cell.model,
                        f"{cell.backend}/{cell.weight_type}",
                        str(cell.input_tokens),
                        str(cell.output_tokens),
                        cell.reason,
                    )
                    for cell in results.infeasible.values()
                ),
                num_text_columns=6,
            )
        )
    if results.failures:
        counted: dict[tuple[str, ...], int] = {}
        for failure in results.failures.values():
            level = f"{failure.backend}/{failure.weight_type}"
            key = (failure.hardware, failure.model, level, failure.error)
            counted[key] = counted.get(key, 0) + 1
        section.parts.append(
            Table(
                "Failed runs, by error",
                Kind.RECORDED,
                ("hardware", "model", "level", "error", "runs"),
                tuple((*key, str(count)) for key, count in counted.items()),
                num_text_columns=4,
            )
        )
    return section


def _machine(session: Any) -> tuple[str, ...]:
    environment: Mapping[str, Any] = session.environment
    cards = environment.get("gpus") or []
    cpu = environment.get("cpu") or {}
    what = f"{cpu.get('model')}, {cpu.get('usable_cores')} cores"
    if cards:
        card = cards[0]
        what = (
            f"{card.get('name')}, driver {card.get('driver')}, "
            f"{card.get('sm_clock_mhz')} of {card.get('max_sm_clock_mhz')} MHz"
        )
    packages: Mapping[str, str] = environment.get("packages") or {}
    names = ("torch", "transformers", "deepspeed", "triton", "grpcio")
    versions = ", ".join(f"{name} {packages[name]}" for name in names if name in packages)
    git = environment.get("git") or {}
    commit = str(git.get("commit") or "unknown")[:10] + (
        " + changes" if git.get("modified") else ""
    )
    load = " ".join(str(value) for value in environment.get("load_average") or [])
    return what, _rates(session.bandwidth), versions, commit, load


def _rates(bandwidth: Mapping[str, Any] | None) -> str:
    if not bandwidth:
        return "not measured"
    rates = ", ".join(
        f"{name} {rate:g} TFLOP/s" for name, rate in bandwidth.get("matrix_tflops", {}).items()
    )
    return f"copy {bandwidth['copy_gb_s']} GB/s, read {bandwidth['read_gb_s']} GB/s, {rates}"


def _priced(price: Price) -> str:
    return f"{price.usd_per_hour:g} USD/h ({price.instance}, {price.as_of})"
