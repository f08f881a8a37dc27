"""Which way a weight pass of so many rows goes: GEMV kernels, dot_linear, or cuBLAS."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gptjet.kernels.gpu.tuning import DOT_LINEAR, FIRST_WITH_DOT, MODELLED
from gptjet.kernels.weights import DenseWeight, Int8Weight, Weight

ROUTES_PATH = Path(__file__).with_name("routes.toml")

Way: TypeAlias = Literal["gemv", "dot", "cublas"]


class RouteError(ValueError):
    """A file of routes is not usable; the message names the entry, the key and its limit."""


@dataclass(frozen=True, slots=True)
class Route:
    """One entry of routes.toml, for cards of `capability` and newer up to the next entry.

    max_gemv_rows  most rows of a pass that the GEMV kernels take, eight at a time
    dot_rows       (first, last) numbers of rows that dot_linear takes; None: it takes none
    source         "modelled", or "measured on <card>"

    Everything else goes to cuBLAS.
    """

    capability: int
    weight_type: str
    max_gemv_rows: int
    source: str
    dot_rows: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.max_gemv_rows < 1:
            raise RouteError(f"max_gemv_rows is {self.max_gemv_rows}, not 1 or more")
        if self.source != MODELLED and not self.source.startswith("measured on "):
            raise RouteError(
                f'source must be "{MODELLED}" or "measured on <card>", not {self.source!r}'
            )
        if self.dot_rows is None:
            return
        first, last = self.dot_rows
        if self.capability < FIRST_WITH_DOT:
            raise RouteError(
                f"dot_rows of {self.weight_type} on sm_{self.capability}: {DOT_LINEAR} needs "
                f"sm_{FIRST_WITH_DOT} or newer"
            )
        if not self.max_gemv_rows < first <= last:
            raise RouteError(
                f"dot_rows must be [first, last] beyond max_gemv_rows = {self.max_gemv_rows}, "
                f"not [{first}, {last}]"
            )

    def way(self, rows: int) -> Way:
        """Of a pass of so many rows."""
        if rows <= self.max_gemv_rows:
            return "gemv"
        if self.dot_rows is not None and self.dot_rows[0] <= rows <= self.dot_rows[1]:
            return "dot"
        return "cublas"


def route_of(weight: Weight, capability: int) -> Route:
    """The entry for passes over `weight` on a card (75 for sm_75).

    Raises RouteError where routes.toml has none for it.
    """
    return _entry_for(weight_type_of(weight), capability)


@functools.cache
def _entry_for(name: str, capability: int) -> Route:
    fitting = [r for r in load_routes() if r.weight_type == name and r.capability <= capability]
    if not fitting:
        raise RouteError(f"{ROUTES_PATH.name} has no route for {name} weights on sm_{capability}")
    return max(fitting, key=lambda route: route.capability)


def max_gemv_rows(weight: Weight, capability: int) -> int:
    """Most rows of a pass over `weight` that the GEMV kernels take on a card (75 for sm_75).

    Raises RouteError where routes.toml has no entry for it.
    """
    return route_of(weight, capability).max_gemv_rows


def weight_type_of(weight: Weight) -> str:
    """ "float16", "int8" or "int4"; another float by its name."""
    if isinstance(weight, DenseWeight):
        return str(weight.weight.dtype).removeprefix("torch.")
    return "int8" if isinstance(weight, Int8Weight) else "int4"


@functools.cache
def load_routes() -> tuple[Route, ...]:
    """The entries of routes.toml. Raises RouteError for one that cannot be right."""
    return read_routes(ROUTES_PATH)


def read_routes(path: Path) -> tuple[Route, ...]:
    """The entries of a file of routes. Raises RouteError for one that cannot be right."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("route", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RouteError(f"{path}: {error}") from error
    routes: dict[tuple[int, str], Route] = {}
    for number, entry in enumerate(entries):
        try:
            route = _route(entry)
        except RouteError as error:
            raise RouteError(f"{path.name}: route[{number}]: {error}") from None
        if (route.capability, route.weight_type) in routes:
            raise RouteError(f"{path.name} has two routes for one capability and weight type")
        routes[route.capability, route.weight_type] = route
    return tuple(routes.values())


_REQUIRED = tuple(entry.name for entry in fields(Route) if entry.default is MISSING)
_WEIGHT_TYPES = ("float16", "int8", "int4")


def _route(entry: Mapping[str, Any]) -> Route:
    for key in entry:
        if key not in (*_REQUIRED, "dot_rows"):
            raise RouteError(f"unknown key {key!r}")
    for key in _REQUIRED:
        if key not in entry:
            raise RouteError(f"{key} is missing")
    for key in ("capability", "max_gemv_rows"):
        if not _is_integer(entry[key]):
            raise RouteError(f"{key} must be an integer, not {entry[key]!r}")
    if entry["weight_type"] not in _WEIGHT_TYPES:
        known = ", ".join(_WEIGHT_TYPES)
        raise RouteError(f"weight_type must be one of {known}, not {entry['weight_type']!r}")
    span = entry.get("dot_rows")
    if span is not None and not (
        isinstance(span, list) and len(span) == 2 and all(map(_is_integer, span))
    ):
        raise RouteError(f"dot_rows must be [first, last], not {span!r}")
    values = {key: entry[key] for key in _REQUIRED}
    return Route(**values, dot_rows=None if span is None else (span[0], span[1]))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
