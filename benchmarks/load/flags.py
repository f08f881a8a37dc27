"""The flags of `gptjet load` and its help: quick to import, as `--help` must be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gptjet.benchmarks.load.arrivals import PROCESSES, check_arrivals
from gptjet.benchmarks.load.lengths import SYNTAX, parse_lengths

HELP = """Put open- or closed-loop load on a server, and say what users of it would see.

Percentiles of TTFT, TPOT, ITL and E2E, goodput under an SLO, and errors by status. In an open \
loop (--rate) latencies count from the time at which a request should have been sent. Ctrl-C ends \
the run and keeps what it has, marked partial.
"""

EXAMPLES = """Examples:

$ gptjet load --rate 4 --duration 60

$ gptjet load --concurrency 8 --prompt-tokens lognormal:200,0.8,1500 --output-tokens uniform:50,200

$ gptjet load --trace trace.jsonl --trace-speed 2 --slo-ttft-ms 500

$ gptjet load --find-rate --slo-ttft-ms 500 --slo-tpot-ms 60 --attainment 0.95
"""

_LOAD, _WORK, _GOAL, _SEARCH = "Load", "Requests", "Objectives", "Search"
_RESULT, _CLIENT = "Results", "Client"


class FlagError(Exception):
    """Flags that do not go together, or a value that cannot be; one line for a person."""


@dataclass(frozen=True)
class LoadFlags:
    """Everything but the connection."""

    rate: Annotated[
        float | None,
        typer.Option(
            help="open loop: requests a second, whether or not the server keeps up",
            rich_help_panel=_LOAD,
        ),
    ] = None
    concurrency: Annotated[
        int | None,
        typer.Option(help="closed loop: requests kept running", min=1, rich_help_panel=_LOAD),
    ] = None
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON lines of arrival_s, prompt or prompt_tokens, output_tokens; with "
            "--concurrency the arrival times are left out of account",
            rich_help_panel=_LOAD,
        ),
    ] = None
    trace_speed: Annotated[
        float, typer.Option(help="play the trace this much faster", rich_help_panel=_LOAD)
    ] = 1.0
    arrivals: Annotated[
        str,
        typer.Option(
            metavar="PROCESS",
            help=f"of the open loop: {', '.join(PROCESSES)}",
            rich_help_panel=_LOAD,
        ),
    ] = "poisson"
    duration: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="how long to send; 30 unless --requests or --trace is given",
            rich_help_panel=_LOAD,
        ),
    ] = None
    requests: Annotated[
        int | None,
        typer.Option(help="how many to send, instead of a time", min=1, rich_help_panel=_LOAD),
    ] = None
    warmup: Annotated[
        int,
        typer.Option(
            help="requests of each process before the run, not counted",
            min=0,
            rich_help_panel=_LOAD,
        ),
    ] = 2
    drain: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="how long requests may still take after the last one was sent",
            rich_help_panel=_LOAD,
        ),
    ] = 30.0
    prompt_tokens: Annotated[
        str, typer.Option(metavar="LENGTHS", help=SYNTAX, rich_help_panel=_WORK)
    ] = "128"
    output_tokens: Annotated[
        str, typer.Option(metavar="LENGTHS", help="the same", rich_help_panel=_WORK)
    ] = "64"
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="text, one prompt a line, instead of random token ids",
            rich_help_panel=_WORK,
        ),
    ] = None
    seed: Annotated[
        int,
        typer.Option(help="of arrivals, lengths and prompts", rich_help_panel=_WORK),
    ] = 0
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="most time to first token", rich_help_panel=_GOAL)
    ] = None
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="most time per output token", rich_help_panel=_GOAL)
    ] = None
    slo_e2e_ms: Annotated[
        float | None, typer.Option(help="most time of a whole request", rich_help_panel=_GOAL)
    ] = None
    find_rate: Annotated[
        bool,
        typer.Option(
            "--find-rate",
            help="search the highest rate that meets the SLO; --rate is the first one tried",
            rich_help_panel=_SEARCH,
        ),
    ] = False
    attainment: Annotated[
        float,
        typer.Option(help="share of requests that must meet the SLO", rich_help_panel=_SEARCH),
    ] = 0.95
    probes: Annotated[
        int,
        typer.Option(
            help="runs at each rate, of which most decide", min=1, rich_help_panel=_SEARCH
        ),
    ] = 3
    tolerance: Annotated[
        float, typer.Option(help="stop when the answer is known so well", rich_help_panel=_SEARCH)
    ] = 0.05
    max_rate: Annotated[
        float, typer.Option(help="never try a higher one", rich_help_panel=_SEARCH)
    ] = 10_000.0
    processes: Annotated[
        int,
        typer.Option(help="client processes that share the load", min=1, rich_help_panel=_CLIENT),
    ] = 1
    connections: Annotated[
        int, typer.Option(help="connections of each process", min=1, rich_help_panel=_CLIENT)
    ] = 1
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="result file (JSON lines). Default: load-TIME.jsonl",
            rich_help_panel=_RESULT,
        ),
    ] = None
    as_json: Annotated[
        bool,
        typer.Option("--json", help="print the figures as JSON", rich_help_panel=_RESULT),
    ] = False
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="draw the run as .png or .svg (needs matplotlib)",
            rich_help_panel=_RESULT,
        ),
    ] = None

    def check(self) -> None:
        """Raise FlagError where they cannot be used together, or a value is out of bounds."""
        for name, message in _objections(self):
            raise FlagError(f"--{name.replace('_', '-')}: {message}")
        try:
            check_arrivals(self.arrivals)
            for text in (self.prompt_tokens, self.output_tokens):
                parse_lengths(text)
        except ValueError as error:
            raise FlagError(str(error)) from None


def _objections(flags: LoadFlags) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if flags.rate is None and flags.concurrency is None and not (flags.trace or flags.find_rate):
        found.append(
            ("rate", "give --rate (open loop), --concurrency (closed loop), --trace or --find-rate")
        )
    if flags.rate is not None and flags.concurrency is not None:
        found.append(("concurrency", "an open loop has none: give it or --rate"))
    if flags.trace and flags.rate is not None:
        found.append(("rate", "a trace has its own arrival times: use --trace-speed"))
    if flags.trace and flags.prompts:
        found.append(("prompts", "a trace has its own prompts"))
    if flags.concurrency is not None and flags.processes > flags.concurrency:
        found.append(("processes", "more than --concurrency have nothing to do"))
    slo = (flags.slo_ttft_ms, flags.slo_tpot_ms, flags.slo_e2e_ms)
    if flags.find_rate:
        if flags.plot is not None:
            found.append(("plot", "it draws one run, a search makes many: leave it out"))
        if flags.trace or flags.concurrency is not None:
            found.append(("find_rate", "it sets the rate itself: no --trace, no --concurrency"))
        if all(limit is None for limit in slo):
            found.append(("find_rate", "give an SLO: --slo-ttft-ms, --slo-tpot-ms, --slo-e2e-ms"))
    if not 0 < flags.attainment <= 1:
        found.append(("attainment", f"is a share of 1, got {flags.attainment:g}"))
    if not flags.drain >= 0:
        found.append(("drain", f"must be 0 or more, got {flags.drain:g}"))
    for name in ("rate", "duration", "trace_speed", "tolerance", "max_rate", *_SLO_NAMES):
        value = getattr(flags, name)
        if value is not None and not 0 < value < float("inf"):
            found.append((name, f"must be above 0, got {value:g}"))
    if flags.plot is not None and flags.plot.suffix not in (".png", ".svg"):
        found.append(("plot", "the file must end in .png or .svg"))
    return found


_SLO_NAMES = ("slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms")
