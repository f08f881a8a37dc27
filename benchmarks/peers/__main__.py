"""`python -m gptjet.benchmarks.peers`: set the peers up, and compare them on one checkpoint.

python -m gptjet.benchmarks.peers setup ctranslate2 openvino
python -m gptjet.benchmarks.peers run --model FOLDER transformers ctranslate2 gptjet:huggingface
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gptjet.benchmarks.environment import load_average, record_environment
from gptjet.benchmarks.peers.contestants import PeerRun, start
from gptjet.benchmarks.peers.environments import PEERS, ROOT, PeerError, find_peer, set_up
from gptjet.benchmarks.peers.experiment import (
    Comparison,
    Design,
    Spread,
    compare,
    run_rounds,
    run_to_json,
)
from gptjet.benchmarks.results import ResultsError, ResultsWriter


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a peer failed or parity is red, 2 it cannot be run as asked, 130
    interrupted: the file keeps the runs that were made.
    """
    flags = _parser().parse_args(arguments)
    try:
        if flags.command == "setup":
            for name in flags.names or PEERS:
                set_up(find_peer(name), flags.root)
                sys.stdout.write(f"{name}: ready\n")
            return 0
        return _run(flags)
    except (PeerError, ResultsError) as error:
        sys.stderr.write(f"peers: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _positive(text: str) -> int:
    """A flag's whole number. Raises argparse.ArgumentTypeError below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text}")
    return int(text)


def _run(flags: argparse.Namespace) -> int:
    names: list[str] = flags.names
    if len(set(names)) != len(names):
        raise PeerError("a contestant is named twice")
    vocab_size = _vocab_size(flags.model)
    design = Design(flags.input, flags.output, flags.rounds, vocab_size, flags.seed)
    environment = record_environment()
    # Every library, and the servers we start, read their number of threads here.
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)
    with contextlib.ExitStack() as stack, ResultsWriter(flags.out) as writer:
        writer.append(
            "peers_session",
            {
                "design": dataclasses.asdict(design),
                "weight_type": flags.weight_type,
                "threads": flags.threads,
                "contestants": names,
                "model": flags.model.resolve().name,
                "environment": environment,
            },
        )
        contestants = {
            name: stack.enter_context(
                start(name, flags.model, flags.weight_type, flags.threads, flags.root)
            )
            for name in names
        }

        def record(number: int, name: str, run: PeerRun) -> None:
            fields = {**run_to_json(number, name, run), "load": load_average()}
            writer.append("peers_run", fields)
            sys.stderr.write(f"round {number + 1} of {design.rounds}: {name} {run.e2e_ms:.0f} ms\n")

        runs = run_rounds(contestants, design, record)
        comparisons = compare(runs, names[0], flags.weight_type)
        for each in comparisons:
            writer.append("peers_comparison", {"baseline": names[0], **dataclasses.asdict(each)})
    _print(comparisons, names[0])
    return 1 if any(each.is_parity_red for each in comparisons) else 0


def _print(comparisons: Sequence[Comparison], baseline: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("median [quartiles]", no_wrap=True)
    for title in ("E2E ms", "TTFT ms", "TPOT ms", f"{baseline} = 1", "peak GiB", "equal tokens"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in comparisons:
        memory = each.peak_memory_bytes
        table.add_row(
            each.name,
            _words(each.e2e_ms, 0),
            _words(each.ttft_ms, 1),
            _words(each.tpot_ms, 2),
            _words(each.speedup, 2) if each.speedup else "PARITY RED",
            f"{memory / 2**30:.2f}" if memory else "-",
            f"{100 * each.equal_tokens:.0f} %",
        )
    # In a pipe there is no width to fit into.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _words(value: Spread, digits: int) -> str:
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _vocab_size(model: Path) -> int:
    try:
        fields: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return int(fields["vocab_size"])
    except (OSError, ValueError, KeyError):
        raise PeerError(f"{model.name} is no checkpoint: it has no usable config.json") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gptjet.benchmarks.peers")
    parser.add_argument("--root", type=Path, default=ROOT, help="environments, converted models")
    commands = parser.add_subparsers(dest="command", required=True)
    setup = commands.add_parser("setup", help="make the peers' environments")
    setup.add_argument("names", nargs="*", metavar="PEER", help=", ".join(PEERS))
    run = commands.add_parser("run", help="compare; the first one named is the baseline")
    run.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="a peer, gptjet:BACKEND (our server) or engine:BACKEND (our engine, no network)",
    )
    run.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    run.add_argument("--weight-type", default="fp32", choices=("fp32", "bf16", "int8", "int4"))
    run.add_argument("--input", type=_positive, default=50, help="prompt tokens")
    run.add_argument("--output", type=_positive, default=50, help="output tokens")
    run.add_argument("--rounds", type=_positive, default=8)
    run.add_argument("--threads", type=_positive, default=os.cpu_count() or 1)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--out", type=Path, default=Path("peers.jsonl"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
