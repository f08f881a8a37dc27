"""Logs that cannot be written: a full disk, a read-only one, a reader that has gone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from gptjet.benchmarks.chaos.scenario import Findings, Plan
from gptjet.benchmarks.chaos.server import ChaosServer
from gptjet.benchmarks.chaos.storm import probe

_REQUESTS = 20


def run(plan: Plan) -> Findings:
    """Each kind of broken log: the same tokens, nobody waits, the exit code is 0."""
    found = Findings()
    expected: tuple[int, ...] | None = None
    for name, opened in (
        ("none", _nowhere),
        ("disk full", _full),
        ("read-only", _read_only),
        ("reader gone", _gone),
    ):
        plan.report(f"  log: {name}")
        with opened() as stderr:
            server = ChaosServer("--log-level=debug", stderr=stderr)
        with server:
            answers = {probe(server.target) for _ in range(plan.count(_REQUESTS, least=2))}
            expected = expected or next(iter(answers))
            found.equal(f"{name}: tokens as without it", answers == {expected}, True)
            held = server.wait_until_idle(5.0)
            found.equal(f"{name}: held afterwards", sum(held.values()), 0)
            found.equal(f"{name}: exit code", server.stop(), 0)
    return found


@contextlib.contextmanager
def _nowhere() -> Iterator[int]:
    with Path(os.devnull).open("wb") as file:
        yield file.fileno()


@contextlib.contextmanager
def _full() -> Iterator[int]:
    # every write to it fails with ENOSPC
    with Path("/dev/full").open("wb") as file:
        yield file.fileno()


@contextlib.contextmanager
def _read_only() -> Iterator[int]:
    # EBADF: as a file on a disk that was mounted anew without the right to write
    with Path(os.devnull).open("rb") as file:
        yield file.fileno()


@contextlib.contextmanager
def _gone() -> Iterator[int]:
    # EPIPE: a log collector that has ended
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)
