"""The command: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gptjet.benchmarks.tune import table
from gptjet.benchmarks.tune.search import ROWS, Card, Found, launches, search, steps
from gptjet.kernels.gpu.tuning import (
    CARDS,
    TABLE_PATH,
    WEIGHT_TYPES,
    Entry,
    Launch,
    TuningError,
    default_tile,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m gptjet.benchmarks.tune")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print what would be tried")
    what.add_argument(
        "--modelled",
        type=int,
        action="append",
        choices=tuple(CARDS),
        metavar="CAPABILITY",
        help="write the roofline's tiles for this capability, marked as modelled",
    )
    parser.add_argument("--capability", type=int, default=75, help="of --dry-run")
    parser.add_argument("--kernel", choices=sorted({one.kernel for one in launches(75)}))
    parser.add_argument("--weight-type", choices=tuple(WEIGHT_TYPES))
    parser.add_argument("--rows", type=int, choices=ROWS)
    parser.add_argument("--output", type=Path, default=TABLE_PATH, help="the table")
    return parser


def main(arguments: Sequence[str] | None = None, card: Card | None = None) -> int:
    """0, 1 where no tile of a launch works, 2 where nothing was done. `card` is for tests."""
    options = build_parser().parse_args(arguments)
    console = Console(stderr=True, highlight=False, markup=False)
    if options.modelled:
        entries = [one for each in options.modelled for one in table.modelled(launches(each))]
        return _write(options.output, entries, console)
    if options.dry_run:
        _print_space(_wanted(options, options.capability))
        return 0
    if card is None:
        try:
            # torch and Triton are only needed on a card.
            from gptjet.benchmarks.tune.card import CudaCard

            card = CudaCard()
        except (ImportError, RuntimeError) as error:
            console.print(f"tuning needs a card: {error}. --dry-run shows what would be tried.")
            return 2
    return _tune(card, _wanted(options, card.capability), options.output, console)


def _wanted(options: argparse.Namespace, capability: int) -> tuple[Launch, ...]:
    return tuple(
        launch
        for launch in launches(capability)
        if options.kernel in (None, launch.kernel)
        and options.weight_type in (None, launch.weight_type)
        and options.rows in (None, launch.rows)
    )


def _tune(card: Card, wanted: Sequence[Launch], output: Path, console: Console) -> int:
    """Each launch's tile is written when it is found, so that nothing is lost on the way."""
    failed = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("tuning", total=len(wanted))
        for launch in wanted:
            progress.update(task, description=_title(launch))
            try:
                found = search(launch, card, console.print)
            except TuningError as error:
                console.print(str(error))
                failed += 1
            else:
                console.print(_summary(found))
                code = _write(output, [table.measured(launch, found.tile, card.name)], console)
                if code:
                    return code
            progress.advance(task)
    return 1 if failed else 0


def _write(output: Path, entries: Sequence[Entry], console: Console) -> int:
    try:
        table.update(output, entries)
    except (TuningError, OSError) as error:
        console.print(f"the table is not written: {error}")
        return 2
    return 0


def _title(launch: Launch) -> str:
    shape = f"[{launch.n}, {launch.k}]"
    return f"{launch.kernel} {shape} {launch.weight_type} rows {launch.rows}"


def _summary(found: Found) -> str:
    launch = found.launch
    weights = WEIGHT_TYPES[launch.weight_type] * launch.n * launch.k
    before = f", modelled {1e6 * found.default_seconds:.1f}" if found.default_seconds else ""
    return (
        f"{_title(launch)}: {1e6 * found.seconds:.1f} us{before}, "
        f"{weights / found.seconds / 1e9:.0f} GB/s, {found.tried} tried, {found.refused} refused: "
        f"{found.tile}"
    )


def _print_space(wanted: Sequence[Launch]) -> None:
    lines = []
    for launch in wanted:
        start = default_tile(launch)
        lines.append(f"{_title(launch)} on sm_{launch.capability}, from {start}")
        for name, tiles in steps(launch, start):
            lines.append(f"  {name}: {len(tiles)} more")
            lines += [f"    {tile}" for tile in tiles]
    lines.append(f"{len(wanted)} launches; each step from a better tile adds to what is listed")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
