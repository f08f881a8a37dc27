"""Which way a weight pass of so many rows goes: GEMV kernels, eight rows at a time, or cuBLAS."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

from gptjet.kernels.weights import DenseWeight, Int8Weight, Weight

_FILE = Path(__file__).with_name("routes.toml")


@dataclass(frozen=True, slots=True)
class Route:
    """One entry of routes.toml, for cards of `capability` and newer up to the next entry."""

    capability: int
    weight_type: str
    max_gemv_rows: int
    source: str


def max_gemv_rows(weight: Weight, capability: int) -> int:
    """Most rows of a pass over `weight` that the GEMV kernels take on a card (75 for sm_75).

    Raises ValueError where routes.toml has no entry for it.
    """
    name = weight_type_of(weight)
    fitting = [r for r in load_routes() if r.weight_type == name and r.capability <= capability]
    if not fitting:
        raise ValueError(f"{_FILE.name} has no route for {name} weights on sm_{capability}")
    return max(fitting, key=lambda route: route.capability).max_gemv_rows


def weight_type_of(weight: Weight) -> str:
    """ "float16", "int8" or "int4"; another float by its name."""
    if isinstance(weight, DenseWeight):
        return str(weight.weight.dtype).removeprefix("torch.")
    return "int8" if isinstance(weight, Int8Weight) else "int4"


@functools.cache
def load_routes(path: Path = _FILE) -> tuple[Route, ...]:
    """The entries of a file of routes. Raises ValueError for one that cannot be right."""
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("route", [])
    routes = tuple(Route(**entry) for entry in entries)
    for route in routes:
        if route.max_gemv_rows < 1:
            raise ValueError(f"{path.name}: max_gemv_rows is {route.max_gemv_rows}, not 1 or more")
    if len({(route.capability, route.weight_type) for route in routes}) < len(routes):
        raise ValueError(f"{path.name} has two routes for one capability and weight type")
    return routes
