"""The command: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gptjet.benchmarks.tune import route_table, table
from gptjet.benchmarks.tune.route_search import (
    LADDER,
    FoundRoute,
    RouteCard,
    search_route,
    ways_of,
)
from gptjet.benchmarks.tune.search import ROWS, Card, Found, launches, search, steps
from gptjet.kernels.gpu.routes import ROUTES_PATH, RouteError
from gptjet.kernels.gpu.tuning import (
    CARDS,
    TABLE_PATH,
    WEIGHT_TYPES,
    Entry,
    Launch,
    TuningError,
    default_tile,
    forget_table,
)

_ROUTE_TYPES = {"fp16": "float16", "int8": "int8", "int4": "int4"}

_DESCRIPTION = """\
Times the kernels on the present card, each result checked against the PyTorch reference first, and
writes what was fastest, with the card's name as its source, into two files that the kernels read:

  tuning.toml  a tile of each launch: kernel, rows, weight type and shape of GPT-J-6B
  routes.toml  for each weight type, up to which number of rows a pass goes through the GEMV
               kernels, and which go through dot_linear (sm_80 and newer) instead of cuBLAS
"""
_EPILOG = """\
examples:
  python -m gptjet.benchmarks.tune --dry-run --capability 90
  python -m gptjet.benchmarks.tune --weight-type int4        # its tiles, then its route
  python -m gptjet.benchmarks.tune --kernel dot_linear --rows 16
  python -m gptjet.benchmarks.tune --only routes             # with the tiles that there are

What a launch or a route comes to is written at once, so that a search may be stopped and gone on
with. --kernel and --rows name tiles: with one of them, routes are left alone. Routes are timed with
the tiles of the kernels' own table, which --output may not be.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gptjet.benchmarks.tune",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    parser.add_argument("--only", choices=("tiles", "routes"), help="leave the other out")
    parser.add_argument("--capability", type=int, default=75, help="of --dry-run")
    parser.add_argument("--kernel", choices=sorted({one.kernel for one in launches(90)}))
    parser.add_argument("--weight-type", choices=tuple(WEIGHT_TYPES))
    parser.add_argument("--rows", type=int, choices=ROWS)
    parser.add_argument("--output", type=Path, default=TABLE_PATH, help="the table of tiles")
    parser.add_argument(
        "--routes-output", type=Path, default=ROUTES_PATH, help="the table of routes"
    )
    return parser


def main(
    arguments: Sequence[str] | None = None,
    card: Card | None = None,
    route_card: RouteCard | None = None,
) -> int:
    """0, 1 where no tile of a launch works, 2 where nothing was done. The cards are for tests."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False, markup=False)
    if options.modelled:
        entries = [one for each in options.modelled for one in table.modelled(launches(each))]
        return _write(options.output, entries, console)
    names_tiles = options.kernel is not None or options.rows is not None
    if names_tiles and options.only == "routes":
        parser.error("--kernel and --rows name tiles, and --only routes leaves them out")
    tiles = options.only != "routes"
    routes = options.only != "tiles" and not names_tiles
    if options.dry_run:
        if tiles:
            _print_space(_wanted(options, options.capability))
        if routes:
            _print_routes(_route_types(options), options.capability)
        return 0
    try:
        # torch and Triton are only needed on a card.
        if tiles and card is None:
            from gptjet.benchmarks.tune.card import CudaCard

            card = CudaCard()
        if routes and route_card is None:
            from gptjet.benchmarks.tune.route_card import CudaRouteCard

            route_card = CudaRouteCard()
    except (ImportError, RuntimeError) as error:
        console.print(f"tuning needs a card: {error}. --dry-run shows what would be tried.")
        return 2
    code = 0
    if tiles and card is not None:
        code = _tune(card, _wanted(options, card.capability), options.output, console)
    if routes and route_card is not None and code != 2:
        of_routes = _tune_routes(route_card, _route_types(options), options.routes_output, console)
        code = max(code, of_routes)
    return code


def _route_types(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(name for kind, name in _ROUTE_TYPES.items() if options.weight_type in (None, kind))


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


def _tune_routes(
    card: RouteCard, weight_types: Sequence[str], output: Path, console: Console
) -> int:
    """Each route is written when it is found."""
    failed = 0
    forget_table()  # it may have been written to just now
    for weight_type in weight_types:
        console.print(f"route of {weight_type}: {len(LADDER)} numbers of rows")
        try:
            found = search_route(weight_type, card, console.print)
        except TuningError as error:
            console.print(str(error))
            failed += 1
            continue
        console.print(_route_summary(found))
        try:
            route_table.update(output, [found.route])
        except (RouteError, OSError) as error:
            console.print(f"the routes are not written: {error}")
            return 2
    return 1 if failed else 0


def _route_summary(found: FoundRoute) -> str:
    """A line a number of rows, and what is made of them."""
    lines = []
    for rows, times in found.seconds.items():
        each = ", ".join(f"{way} {1e6 * seconds:.1f} us" for way, seconds in times.items())
        lines.append(f"  rows {rows}: {each}: {found.route.way(rows)}")
    route = found.route
    dot = "none" if route.dot_rows is None else f"{route.dot_rows[0]} to {route.dot_rows[1]}"
    lines.append(
        f"{route.weight_type} on sm_{route.capability}: GEMV up to {route.max_gemv_rows} rows, "
        f"dot_linear {dot}, everything else cuBLAS"
    )
    return "\n".join(lines)


def _print_routes(weight_types: Sequence[str], capability: int) -> None:
    lines = []
    for weight_type in weight_types:
        lines.append(f"route of {weight_type} on sm_{capability}: both passes of a block by")
        lines += [f"  rows {rows}: {', '.join(ways_of(rows, capability))}" for rows in LADDER]
    sys.stdout.write("\n".join(lines) + "\n")


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
