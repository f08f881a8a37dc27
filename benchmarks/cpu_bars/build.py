"""Which build of ours a result file was measured with: rounds of two builds are not one figure."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjet.benchmarks.results import ResultsError

# What an engine's speed is made of; a README or a benchmark may change between two sessions.
_ROOMS = ("gptjet.kernels", "gptjet.service")
_SUFFIXES = frozenset({".py", ".c", ".h"})


def fingerprint(rooms: Sequence[str] = _ROOMS) -> str:
    """Of the sources of the kernels and of the service."""
    digest = hashlib.sha256()
    for room in rooms:
        spec = importlib.util.find_spec(room)
        for folder in sorted(spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in _SUFFIXES:
                    name = str(path.relative_to(folder))
                    digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def check_same(sessions: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> None:
    """Refuse to add to a file whose rounds another build, machine or number of threads made.

    Raises ResultsError saying what differs.
    """
    for session in sessions:
        for what, before, after in (
            ("threads", session.get("threads"), now["threads"]),
            ("backend", session.get("backend"), now["backend"]),
            ("processor", _processor(session), _processor(now)),
            ("build", session.get("build"), now["build"]),
        ):
            if before != after:
                raise ResultsError(
                    f"the file's rounds were made with {what} {before}, this is {after}: give "
                    f"another --out, or --mixed to add to it all the same"
                )


def _processor(session: Mapping[str, Any]) -> Any:
    return session.get("environment", {}).get("cpu", {}).get("model")
