"""Which way is the fastest for so many rows: GEMV kernels, dot_linear or cuBLAS, as a route."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gptjet.benchmarks.tune.search import RefusedTileError
from gptjet.kernels.gpu.gemv_launch import MAX_ROWS
from gptjet.kernels.gpu.routes import Route, Way
from gptjet.kernels.gpu.tuning import FIRST_WITH_DOT, TuningError

LADDER = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
"""Rows that are timed, ascending: whole GEMV launches, and whole tiles of dot_linear beyond."""

# A way is taken from cuBLAS, or from GEMV, by more than two timings differ.
_BETTER = 0.97
# GEMV reads the weights once for eight rows: nobody waits for it to be timed at 512.
_MOST_GEMV_ROWS = 128


class RouteCard(Protocol):
    """What times passes. See route_card.CudaRouteCard."""

    @property
    def name(self) -> str:
        """Of the card, for the file."""

    @property
    def capability(self) -> int:
        """80 for 8.0."""

    def prepare_passes(self, weight_type: str) -> None:
        """Make the tensors and the reference of the passes to come."""

    def pass_seconds(self, way: Way, rows: int) -> float:
        """Of a block's two weight passes, checked first. Raises RefusedTileError."""


@dataclass(frozen=True, slots=True)
class FoundRoute:
    """A route, and what it was chosen from: seconds by rows and way, absent where refused."""

    route: Route
    seconds: Mapping[int, Mapping[Way, float]]


def ways_of(rows: int, capability: int) -> tuple[Way, ...]:
    """What is timed at so many rows on such a card. cuBLAS comes first: it is what others beat."""
    ways: list[Way] = ["cublas"]
    if rows <= _MOST_GEMV_ROWS:
        ways.append("gemv")
    if capability >= FIRST_WITH_DOT:
        ways.append("dot")
    return tuple(ways)


def search_route(
    weight_type: str, card: RouteCard, note: Callable[[str], None] = lambda _: None
) -> FoundRoute:
    """Time every way over the ladder and choose. Raises TuningError where cuBLAS gives no time."""
    card.prepare_passes(weight_type)
    seconds: dict[int, dict[Way, float]] = {}
    for rows in LADDER:
        seconds[rows] = {}
        for way in ways_of(rows, card.capability):
            try:
                seconds[rows][way] = card.pass_seconds(way, rows)
            except RefusedTileError as error:
                note(f"{weight_type} rows {rows} by {way}: {error}")
        if "cublas" not in seconds[rows]:
            raise TuningError(f"cuBLAS gives no time for {weight_type} at {rows} rows")
    source = f"measured on {card.name}"
    return FoundRoute(choose_route(weight_type, card.capability, seconds, source), seconds)


def choose_route(
    weight_type: str,
    capability: int,
    seconds: Mapping[int, Mapping[Way, float]],
    source: str,
) -> Route:
    """The route that takes the fastest way at each number of rows, as far as a route can say it.

    A number between two that were timed goes the way of the larger one. GEMV keeps its rows up to
    the first that another way does faster; dot_linear has those beyond, from the first that it does
    faster to the last before one that it does not. What is as fast within noise stays with GEMV,
    and beyond it with cuBLAS.
    """
    ladder = sorted(seconds)
    most_gemv = MAX_ROWS
    for rows in ladder:
        times = seconds[rows]
        if rows > MAX_ROWS and not _keeps_gemv(times):
            break
        most_gemv = max(most_gemv, rows)
    beyond = [rows for rows in ladder if rows > most_gemv]
    first = last = None
    before = most_gemv
    for rows in beyond:
        if _is_for_dot(seconds[rows]):
            first, last = first or before + 1, rows
        elif first is not None:
            break
        before = rows
    span = None if first is None or last is None else (first, last)
    return Route(capability, weight_type, most_gemv, source, span)


def _keeps_gemv(times: Mapping[Way, float]) -> bool:
    if "gemv" not in times:
        return False
    others = [value for way, value in times.items() if way != "gemv"]
    return all(other >= times["gemv"] * _BETTER for other in others)


def _is_for_dot(times: Mapping[Way, float]) -> bool:
    return "dot" in times and times["dot"] < times["cublas"] * _BETTER
