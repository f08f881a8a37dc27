"""`gptjet sweep` and `gptjet sweep report`: flags, tables on the terminal, exit codes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from types import FrameType

    from gptjet.benchmarks.config import SweepConfig
    from gptjet.benchmarks.sweep import SweepOptions
    from gptjet.benchmarks.sweep_plan import Outcome

# As gptjet.service.commands.terminal.ExitCode, which this room may not import.
_FAILURE, _USAGE, _INTERRUPTED = 1, 2, 130

HELP = """Replay the published latency experiment: backends x weight types x lengths.

Starts a server for each level, or takes running ones (--endpoint), and appends every run to a \
file. A sweep that was killed goes on where it stopped when it is started again.
"""

EXAMPLES = """Examples:

$ gptjet sweep --quick

$ gptjet sweep --config t4 --config v100 --dry-run

$ gptjet sweep --config cpu --out cpu.jsonl

$ gptjet sweep --config t4 --endpoint huggingface=gpu1:50051 --endpoint deepspeed=gpu1:50052

$ gptjet sweep report cpu.jsonl t4.jsonl --out report
"""

app = typer.Typer(
    help=HELP,
    epilog=EXAMPLES,
    invoke_without_command=True,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback()
def sweep(
    context: typer.Context,
    *,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            "-c",
            metavar="NAME|FILE",
            help="t4, v100, a10, h100, cpu, cpu-embedded or "
            "your own file; repeatable. Default: the one of this machine",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="result file (JSON lines), appended to. Default: sweep-CONFIG.jsonl",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the design and its modelled floors, run nothing")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --dry-run: as JSON")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="a minute's look: two cells a level, three runs")
    ] = False,
    backends: Annotated[
        str, typer.Option(metavar="A,B", help="only these, also further ones of the configuration")
    ] = "",
    weight_types: Annotated[
        str, typer.Option(metavar="A,B", help="only these: fp32, bf16, fp16, int8, int4")
    ] = "",
    runs: Annotated[int | None, typer.Option(help="repetitions of each cell", min=1)] = None,
    model: Annotated[
        str | None, typer.Option(help="another checkpoint: a folder, a hub name, or 'embedded'")
    ] = None,
    serve_context: Annotated[
        int | None,
        typer.Option(
            help="serve a copy of the checkpoint that claims this context (rotary models, "
            "speed only; results say so)"
        ),
    ] = None,
    servers: Annotated[
        str | None,
        typer.Option(help="together (all alive, runs shuffled), alternate (one at a time), auto"),
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=HOST:PORT",
            help="a running server instead of starting one; NAME "
            "is a backend or backend/weight-type; repeatable",
        ),
    ] = None,
    serve_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="FLAG", help="passed on to 'gptjet serve'; repeatable, recorded"),
    ] = None,
    any_hardware: Annotated[
        bool,
        typer.Option(
            "--any-hardware",
            help="run on a machine that is not the configuration's; "
            "results are labelled with what is here",
        ),
    ] = False,
    retry_failures: Annotated[
        bool, typer.Option("--retry-failures", help="make failed runs again")
    ] = False,
    bandwidth: Annotated[
        bool, typer.Option(help="measure this machine's bandwidth and matrix rate first")
    ] = True,
) -> None:
    """Run it, or show what would be run."""
    if context.invoked_subcommand is not None:
        return
    from gptjet.benchmarks.config import ConfigError, config_for, load_config
    from gptjet.benchmarks.design import quick as make_quick
    from gptjet.benchmarks.environment import record_environment
    from gptjet.benchmarks.geometry import GeometryError
    from gptjet.benchmarks.results import ResultsError
    from gptjet.benchmarks.server_process import ServerError, parse_endpoints
    from gptjet.benchmarks.sweep import SweepOptions
    from gptjet.benchmarks.sweep import dry_run as make_dry_run

    if as_json and not dry_run:
        _fail("--json is for --dry-run; results are in --out", _USAGE)
    try:
        environment = record_environment()
        names = config or [config_for(environment)]
        configs = [
            load_config(name).updated(
                model=model, serve_context=serve_context, runs=runs, servers=servers
            )
            for name in names
        ]
        if quick:
            configs = [make_quick(each) for each in configs]
        options = SweepOptions(
            backends=_listed(backends),
            weight_types=_listed(weight_types),
            endpoints=parse_endpoints(endpoint or []) or None,
            any_hardware=any_hardware,
            serve=tuple(serve_arg or ()),
            quick=quick,
            retry_failures=retry_failures,
            measure_bandwidth=bandwidth,
        )
        if dry_run:
            design = make_dry_run(configs, options)
            typer.echo(json.dumps(design, indent=2)) if as_json else _print_design(design)
            return
        path = out or Path(f"sweep-{'-'.join(c.name for c in configs)}{'-quick' * quick}.jsonl")
        outcomes = _run(configs, options, path, environment)
    except (ConfigError, GeometryError, ServerError, ResultsError) as error:
        _fail(str(error), _USAGE)
    raise typer.Exit(_FAILURE if any(outcome.failed for outcome in outcomes) else 0)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="result files to merge")],
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="where the report is written")
    ] = Path("sweep-report"),
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="HARDWARE=USD", help="price an hour, instead of the configuration's"),
    ] = None,
    plots: Annotated[bool, typer.Option(help="draw the plots (needs matplotlib)")] = True,
) -> None:
    """Tables and plots of one or more result files: Markdown, HTML, CSV, Parquet, PNG, SVG."""
    from gptjet.benchmarks.config import ConfigError
    from gptjet.benchmarks.report.build import ReportError, write_report
    from gptjet.benchmarks.results import ResultsError

    try:
        prices = dict(_price(value) for value in price or ())
        written = write_report(files, out, prices=prices, with_plots=plots)
    except (ConfigError, ReportError, ResultsError) as error:
        _fail(str(error), _USAGE)
    for file in written:
        typer.echo(file)


class _Signals:
    """Ctrl-C and SIGTERM end a session after the run in progress, a second one at once.

    An exception out of a signal handler may come in the middle of a gRPC call, which can then hang
    on a lock that it left held; between two runs there is nothing to break.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.stop_asked = False
        self._previous: list[Any] = []

    def __enter__(self) -> _Signals:
        self._previous = [signal.signal(number, self._on_signal) for number in self._NUMBERS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self._NUMBERS, self._previous, strict=True):
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_asked:
            signal.default_int_handler(number, frame)
        self.stop_asked = True
        # Not through rich: the interrupted code may be writing through it.
        os.write(2, b"\nstopping after the run in progress; once more to stop at once\n")


def _run(
    configs: list[SweepConfig], options: SweepOptions, path: Path, environment: dict[str, Any]
) -> list[Outcome]:
    from gptjet.benchmarks.progress import SweepProgress
    from gptjet.benchmarks.results import ResultsWriter
    from gptjet.benchmarks.sweep import run_sweep

    outcomes: list[Outcome] = []
    try:
        with ResultsWriter(path) as writer, SweepProgress() as progress, _Signals() as signals:
            for config in configs:
                outcomes.append(
                    run_sweep(
                        config, options, writer, environment, progress, lambda: signals.stop_asked
                    )
                )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {path} holds what was made: the same command goes on", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    made, failed = sum(o.made for o in outcomes), sum(o.failed for o in outcomes)
    there = sum(o.already_there for o in outcomes)
    cells = sum(o.infeasible_cells for o in outcomes)
    cannot = f", {cells} cells are not feasible" if cells else ""
    typer.echo(f"{path}: {made} runs made, {failed} failed, {there} were there already{cannot}")
    return outcomes


_DESIGN_LINE = "{:<12} {:<16} {:<18} {:>6} {:>6} {:>5}   {:>10} {:>10} {:>10}"


def _print_design(design: dict[str, Any]) -> None:
    """Fixed columns, so that it reads the same in a terminal and in a pipe."""
    typer.echo(f"{design['num_cells']} cells, {design['num_runs']} runs\n")
    typer.echo(" " * 71 + "modelled floor in ms, datasheet rates")
    names = ("hardware", "model", "level", "input", "output", "runs", "TTFT", "TPOT", "E2E")
    typer.echo(_DESIGN_LINE.format(*names))
    for cell in design["cells"]:
        floor = cell["modelled_floor"]
        modelled = ("", "", "")
        if floor:
            modelled = (
                f"{floor['ttft_ms']:.1f}",
                f"{floor['tpot_ms']:.2f}",
                f"{floor['e2e_ms']:.0f}",
            )
        line = _DESIGN_LINE.format(
            cell["hardware"],
            cell["model"],
            f"{cell['backend']}/{cell['weight_type']}",
            cell["input_tokens"],
            cell["output_tokens"],
            cell["runs"],
            *modelled,
        )
        typer.echo((line.rstrip() + "  " + (cell["reason"] or "")).rstrip())
    if any(cell["feasible"] and cell["modelled_floor"] is None for cell in design["cells"]):
        typer.echo("\nWithout a datasheet the floor is modelled from the rates a sweep measures.")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _price(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        usd = float(value)
    except ValueError:
        usd = 0.0
    if not name or not 0 < usd < float("inf"):
        _fail(f"--price {text}: give HARDWARE=USD, such as t4=0.94", _USAGE)
    return name, usd


def _fail(message: str, code: int) -> NoReturn:
    """One line on stderr, as every command of gptjet."""
    first, *rest = message.splitlines() or [""]
    label = typer.style("error:", fg="red", bold=True)
    typer.echo("\n".join([f"gptjet: {label} {first}", *(f"  {line}" for line in rest)]), err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
