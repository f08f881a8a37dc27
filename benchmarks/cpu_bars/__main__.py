"""`python -m gptjet.benchmarks.cpu_bars`: measure the bars of the CPU path and print their table.

python -m gptjet.benchmarks.cpu_bars --out benchmarks/results/cpu-bars.jsonl
python -m gptjet.benchmarks.cpu_bars --only S --quick --out look.jsonl
python -m gptjet.benchmarks.cpu_bars --out FILE.jsonl --report --markdown bars.md
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gptjet.benchmarks.bandwidth import BandwidthError, measure_in_subprocess
from gptjet.benchmarks.cpu_bars.bars import Bars, Verdict
from gptjet.benchmarks.cpu_bars.build import check_same, fingerprint
from gptjet.benchmarks.cpu_bars.busy import usable_cores
from gptjet.benchmarks.cpu_bars.checkpoints import MODELS, checkpoint_folder
from gptjet.benchmarks.cpu_bars.design import STREAMS, Entry, Race, make_races
from gptjet.benchmarks.cpu_bars.report import make_document, print_document
from gptjet.benchmarks.cpu_bars.runner import SESSION, Recorded, Runner
from gptjet.benchmarks.environment import record_environment, utc_now
from gptjet.benchmarks.peers.contestants import Contestant, start
from gptjet.benchmarks.peers.environments import PEERS, ROOT, PeerError
from gptjet.benchmarks.report.markdown import render
from gptjet.benchmarks.results import ResultsError, ResultsWriter, read_records

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 every bar holds, 1 one does not or is not measured, 2 it cannot be run as
    asked, 130 interrupted: the same command goes on where it stopped.
    """
    flags = _parser().parse_args(arguments)
    try:
        races = make_races(flags.only or list(MODELS), flags.backend, quick=flags.quick)
        if flags.report and not flags.out.exists():
            raise ResultsError(f"{flags.out}: no such file")
        recorded = Recorded.of(read_records(flags.out) if flags.out.exists() else ())
        if not flags.report:
            _measure(flags, races, recorded)
    except (ValueError, ResultsError, PeerError, BandwidthError) as error:
        sys.stderr.write(f"cpu_bars: error: {error}\n")
        return USAGE
    except KeyboardInterrupt:
        sys.stderr.write(
            f"interrupted; {flags.out} holds what was made: the same command goes on\n"
        )
        return INTERRUPTED
    bars = Bars(races, recorded, flags.backend)
    document = make_document(bars)
    print_document(document)
    if flags.markdown:
        partial = flags.markdown.with_name(flags.markdown.name + ".partial")
        partial.write_text(render(document), encoding="utf-8")
        partial.replace(flags.markdown)
    wanted = (Verdict.PASS, Verdict.SHOWN)
    return OK if all(bar.verdict in wanted for bar in bars.all()) else FAILURE


def _measure(flags: argparse.Namespace, races: Sequence[Race], recorded: Recorded) -> None:
    # Every library, and the server we start, read their number of threads here.
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)
    environment = record_environment()

    def start_entry(race: Race, entry: Entry, folder: Path) -> AbstractContextManager[Contestant]:
        return start(
            entry.contestant,
            folder,
            entry.weight_type,
            flags.threads,
            flags.root,
            kv_cache_tokens=race.kv_cache_tokens,
        )

    session = {
        "started_at": utc_now(),
        "backend": flags.backend,
        "threads": flags.threads,
        "build": fingerprint(),
        "quick": flags.quick,
        "streams": STREAMS,
        "races": {race.key: {"kv_cache_tokens": race.kv_cache_tokens} for race in races},
        "peers": {name: PEERS[name].requirements for name in PEERS},
        "environment": environment,
    }
    if not flags.mixed:
        check_same(recorded.sessions, session)
    with ResultsWriter(flags.out) as writer, _Bar() as bar:
        writer.append(SESSION, session)
        recorded.add({"kind": SESSION, **session})
        runner = Runner(writer, recorded, start_entry, bar, lambda: measure_in_subprocess("cpu"))
        runner.run(races, lambda name: checkpoint_folder(MODELS[name], flags.root))


class _Bar:
    """A progress bar on stderr; without a terminal, the notes alone."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    def begin(self, steps: int) -> None:
        """See Observer."""
        self._progress.update(self._task, total=steps)
        self.note(f"{steps} measurements to be made")

    def note(self, text: str) -> None:
        """See Observer."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, text: str, steps: int = 1) -> None:
        """See Observer."""
        self._progress.update(self._task, advance=steps, description=text)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(Exception):
            self._progress.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gptjet.benchmarks.cpu_bars")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("cpu-bars.jsonl"),
        metavar="FILE",
        help="result file (JSON lines), appended to: what it holds is not measured again",
    )
    parser.add_argument(
        "--only", action="append", choices=tuple(MODELS), help="this model; repeatable"
    )
    parser.add_argument("--backend", default="fused", help="which of our backends is ours")
    parser.add_argument("--quick", action="store_true", help="a look: short outputs, few rounds")
    parser.add_argument(
        "--mixed", action="store_true", help="add to a file of another build or machine"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing, print the tables")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    parser.add_argument("--threads", type=int, default=len(usable_cores()))
    parser.add_argument("--root", type=Path, default=ROOT, help="peers' environments, checkpoints")
    return parser


if __name__ == "__main__":
    sys.exit(main())
