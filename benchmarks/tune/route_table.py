"""Writes kernels/gpu/routes.toml: the comment it begins with, then an entry a paragraph, sorted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from gptjet.benchmarks.files import write_atomically
from gptjet.kernels.gpu.routes import Route, read_routes

_HEADER = """\
# Which way a pass of so many rows goes: see routes.py, and `python -m gptjet.benchmarks.tune`.
"""
_WEIGHT_TYPES = ("float16", "int8", "int4")


def render(routes: Iterable[Route], header: str = _HEADER) -> str:
    """The file's text. `read_routes` reads the same entries from it."""
    parts = [header]
    for route in sorted(routes, key=_order):
        values = asdict(route)
        values["source"] = values.pop("source")  # the last line
        # A JSON string, number or list of numbers is a TOML one.
        lines = [
            f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
            for key, value in values.items()
            if value is not None
        ]
        parts.append("[[route]]\n" + "".join(lines))
    return "\n".join(parts)


def header_of(text: str) -> str:
    """The comment lines that a file begins with."""
    lines = []
    for line in text.splitlines(keepends=True):
        if not line.startswith("#"):
            break
        lines.append(line)
    return "".join(lines) or _HEADER


def update(path: Path, new: Iterable[Route]) -> None:
    """Put routes into the file at path, which need not be there, in the place of their equals.

    Raises RouteError for a file that is not usable, which stays as it is, and OSError.
    """
    held: tuple[Route, ...] = ()
    header = _HEADER
    if path.exists():
        held = read_routes(path)
        header = header_of(path.read_text(encoding="utf-8"))
    routes = {(route.capability, route.weight_type): route for route in (*held, *new)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(routes.values(), header))


def _order(route: Route) -> tuple[object, ...]:
    return (route.capability, _WEIGHT_TYPES.index(route.weight_type))
