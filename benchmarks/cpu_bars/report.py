"""What was measured as tables: each contestant's figures, and each bar beside its ratio."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from gptjet.benchmarks.cpu_bars.bars import Bar, Bars, Verdict
from gptjet.benchmarks.cpu_bars.checkpoints import MODELS
from gptjet.benchmarks.cpu_bars.design import Cell, CellKind, Entry, Race
from gptjet.benchmarks.peers.experiment import Spread, spread
from gptjet.benchmarks.report.document import Document, Kind, Paragraph, Section, Table
from gptjet.benchmarks.roofline import WEIGHT_TYPES, decode_work

_PIPE_WIDTH = 200
_LIBRARIES = ("torch", "transformers")


def make_document(bars: Bars) -> Document:
    """Everything on file as tables."""
    judged = list(bars.all())
    document = Document(
        "Bars of the CPU path",
        "Medians of interleaved rounds, quartiles in brackets; ratios are formed inside a round.",
    )
    section = Section("Bars")
    section.parts.append(_bars_table(judged))
    passed = sum(bar.verdict is Verdict.PASS for bar in judged)
    asked = sum(bar.verdict is not Verdict.SHOWN for bar in judged)
    section.parts.append(Paragraph(f"{passed} of {asked} bars hold."))
    section.parts += [Paragraph(text) for text in _measured_with(bars.recorded.sessions)]
    builds = dict.fromkeys(str(each.get("build")) for each in bars.recorded.sessions)
    if len(builds) > 1:
        section.parts.append(Paragraph(f"Rounds of {len(builds)} builds: {', '.join(builds)}."))
    document.sections.append(section)
    for model in dict.fromkeys(race.model for race in bars.races):
        races = [race for race in bars.races if race.model == model]
        section = Section(f"{model}: {MODELS[model].about}", [_contestants(bars, races)])
        section.parts += [Paragraph(text) for text in _notes(bars, model)]
        document.sections.append(section)
    return document


def _measured_with(sessions: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """When, on what and with what, each combination once."""
    found: dict[str, None] = {}
    for session in sessions:
        environment = session.get("environment")
        if not environment:
            continue
        cpu, packages = environment["cpu"], environment["packages"]
        versions = ", ".join(f"{n} {packages[n]}" for n in _LIBRARIES if packages.get(n))
        git = environment.get("git")
        commit = git["commit"][:12] if git else "unknown"
        machine = f"{cpu['model']}, {cpu['usable_cores']} cores, {session['threads']} threads"
        day = session["started_at"][:10]
        found[f"Measured {day} on {machine}: {versions}; commit {commit}."] = None
    yield from found


def print_document(document: Document, console: Console | None = None) -> None:
    """The same on a terminal; in a pipe there is no width to fit into."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_PIPE_WIDTH)
    for section in document.sections:
        console.print(f"\n{section.title}", style="bold", markup=False, highlight=False)
        for part in section.parts:
            if isinstance(part, Paragraph):
                console.print(part.text, markup=False, highlight=False)
            elif isinstance(part, Table):
                console.print(_rich(part))


def _rich(table: Table) -> RichTable:
    drawn = RichTable(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(table.columns):
        is_text = index < table.num_text_columns
        drawn.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(cell.replace("[", "\\[") for cell in row))
    return drawn


def _bars_table(bars: Sequence[Bar]) -> Table:
    rows = [
        (
            bar.model,
            bar.text,
            bar.verdict.value,
            bar.asked,
            _words(bar.ratio, 2),
            bar.measured,
            bar.note,
        )
        for bar in bars
    ]
    columns = ("model", "bar", "verdict", "asked", "ratio", "measured", "note")
    return Table("Each bar beside what was measured", Kind.MEASURED, columns, tuple(rows), 3)


def _contestants(bars: Bars, races: Sequence[Race]) -> Table:
    rows = [
        _contestant(bars, race, entry, cell_of(race, CellKind.DECODE))
        for race in races
        if any(cell.kind is CellKind.DECODE for cell in race.cells)
        for entry in race.entries
    ]
    columns = (
        "contestant",
        "decode tok/s",
        "share of bandwidth",
        "prefill ms",
        "TTFT ms",
        "peak GiB",
        "equal tokens",
    )
    return Table("Contestants, one stream", Kind.MEASURED, columns, tuple(rows))


def cell_of(race: Race, kind: CellKind) -> Cell:
    """The race's cell of a kind that it has."""
    return next(cell for cell in race.cells if cell.kind is kind)


def _contestant(bars: Bars, race: Race, entry: Entry, decode: Cell) -> tuple[str, ...]:
    name, model = str(entry), race.model
    rounds = bars.rounds(model, CellKind.DECODE, name)
    rates = [f["tokens_per_s"] for f in rounds.values() if f["tokens_per_s"]]
    prefills = [f["ttft_ms"] for f in bars.rounds(model, CellKind.PREFILL, name).values()]
    ttfts = [f["ttft_ms"] for f in rounds.values()]
    share = bandwidth_share(bars, race, entry, decode, rates)
    memory = bars.peak_memory(model, name)
    equal = "-"
    if (
        entry.weight_type == "fp32"
        and (differing := bars.differing_rounds(model, name)) is not None
    ):
        equal = f"{differing} rounds differ" if differing else "all"
    return (
        name,
        _words(spread(rates) if rates else None, 1),
        "-" if share is None else f"{share:.2f}",
        _words(spread(prefills) if prefills else None, 0),
        _words(spread(ttfts) if ttfts else None, 1),
        "-" if memory is None else f"{memory / 2**30:.2f}",
        equal,
    )


def bandwidth_share(
    bars: Bars, race: Race, entry: Entry, decode: Cell, rates: Sequence[float]
) -> float | None:
    """Bytes a second that the median decode step must read, over the best read bandwidth measured.

    None where the model fits the processor's cache, so that memory does not bound it, and where
    nothing was measured.
    """
    measured = bars.recorded.bandwidths.get(race.model)
    geometry = MODELS[race.model].geometry
    if not rates or not measured or race.model == "S":
        return None
    context = decode.input_tokens + decode.output_tokens / 2
    work = decode_work(geometry, WEIGHT_TYPES[entry.weight_type], context)
    return work.num_bytes * statistics.median(rates) / 1e9 / max(measured)


def _notes(bars: Bars, model: str) -> Iterator[str]:
    rates = bars.recorded.bandwidths.get(model)
    if rates:
        yield (
            f"Measured read bandwidth: at best {max(rates):.1f} GB/s, the worst of "
            f"{len(rates)} measurements {min(rates):.1f}."
        )
    if model == "S":
        yield "No share of bandwidth: the weights fit the processor's cache."
    for race in bars.races:
        if race.model == model:
            for kind, reasons in (
                ("did not start", bars.recorded.absent),
                ("stopped", bars.recorded.failures),
            ):
                for (key, name), reason in reasons.items():
                    if key == race.key:
                        yield f"{name} {kind}: {reason}"


def _words(value: Spread | None, digits: int) -> str:
    if value is None:
        return "-"
    if value.n == 1:
        return f"{value.median:.{digits}f}"
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
