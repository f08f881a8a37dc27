"""The direction of imports between the rooms, as the README's table of arrows states it.

Every `import` counts, also one inside a function or under TYPE_CHECKING: a module that names
another one depends on it, whenever the name is looked up.
"""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("proto", "service", "kernels", "benchmarks")

# What each part may import of ours, besides itself; the longest matching name counts. A part that
# is not listed here is wiring (cli, commands, demo, ...): nothing listed may import it.
ALLOWED: dict[str, frozenset[str]] = {
    "gptjet.proto": frozenset(),
    "gptjet.kernels": frozenset(),
    "gptjet.service.engine": frozenset(),
    "gptjet.service.embedded": frozenset(),
    "gptjet.service.log": frozenset(),
    "gptjet.service.governance": frozenset({"gptjet.service.log"}),
    "gptjet.service.config": frozenset({"gptjet.service.engine"}),
    # Of the engine, a model knows the error that says "this cannot be loaded", and nothing else.
    "gptjet.service.models": frozenset(
        {"gptjet.kernels", "gptjet.service.embedded", "gptjet.service.engine.errors"}
    ),
    "gptjet.service.backends": frozenset(
        {"gptjet.kernels", "gptjet.service.engine", "gptjet.service.models"}
    ),
    "gptjet.service.observability": frozenset(
        {"gptjet.service.config", "gptjet.service.engine", "gptjet.service.log"}
    ),
    "gptjet.service.rpc": frozenset(
        {
            "gptjet.proto",
            "gptjet.service.config",
            "gptjet.service.engine",
            "gptjet.service.governance",
            "gptjet.service.log",
            "gptjet.service.observability",
        }
    ),
    "gptjet.service.client": frozenset({"gptjet.proto"}),
    "gptjet.service.apps": frozenset({"gptjet.service.client"}),
    "gptjet.service.training": frozenset({"gptjet.service.embedded", "gptjet.service.models"}),
    "gptjet.benchmarks": frozenset({"gptjet.kernels", "gptjet.service.client"}),
}
# Only needed to make the checkpoint again; a server must run without its dependencies.
NEVER_IMPORTED_BY_OTHERS = "gptjet.service.training"

_WIRE = {"google", "grpc", "grpc_health", "grpc_reflection", "grpc_status"}
_HTTP = {"aiohttp", "fastapi", "http", "httpx", "requests", "starlette", "urllib", "uvicorn"}
_WATCHING = {"opentelemetry", "prometheus_client"}
_CONCRETE = {"accelerate", "deepspeed", "transformers", "triton"}
# Outside packages that a part must not import itself.
BANNED: dict[str, set[str]] = {
    "gptjet.service.backends": _WIRE,
    "gptjet.service.client": _CONCRETE | {"numpy", "torch"},
    "gptjet.service.engine": _CONCRETE | _HTTP | _WIRE | _WATCHING,
    "gptjet.service.governance": _CONCRETE | _HTTP | _WIRE | {"torch"},
    "gptjet.service.observability": _CONCRETE | _WIRE | {"torch"},
    "gptjet.service.rpc": _CONCRETE | _WATCHING | {"torch"},
}


# Where alone an outside package may be named: the CPU lock brings no Triton.
ONLY_IN: dict[str, tuple[str, ...]] = {"triton": ("gptjet.kernels.gpu", "gptjet.benchmarks")}


def is_within(name: str, part: str) -> bool:
    """Whether `name` is `part`, lies in it, or shares its work: client_types belongs to client."""
    return name == part or name.startswith((f"{part}.", f"{part}_"))


def modules_of(root: Path) -> dict[str, Path]:
    """Map the dotted name of every module of ours under `root` to its file."""
    modules: dict[str, Path] = {}
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            modules[".".join(("gptjet", *parts))] = path
    return modules


def imports_of(name: str, path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything that the module imports, wherever in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                # `from gptjet.service import client` names a module, not an attribute of one.
                longer = f"{base}.{alias.name}"
                is_module = longer in known or base == "gptjet" or longer in _namespaces(known)
                yield node.lineno, longer if is_module else base
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            first = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def _namespaces(known: set[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in known}


def part_of(name: str) -> str | None:
    """Return the listed part that `name` lies in, None for wiring and foreign packages."""
    return max((part for part in ALLOWED if is_within(name, part)), key=len, default=None)


def find_violations(root: Path) -> list[str]:
    """Return one line for each import under `root` that points the wrong way."""
    modules = modules_of(root)
    known = set(modules)
    violations: list[str] = []
    for name, path in modules.items():
        part = part_of(name)
        for line, target in sorted(set(imports_of(name, path, known))):
            reason = _objection(name, part, target)
            if reason:
                where = f"{path.relative_to(root)}:{line}"
                violations.append(f"{where}: {name} imports {target}: {reason}")
    return violations


def _objection(name: str, part: str | None, target: str) -> str | None:
    top = target.split(".")[0]
    if top in {"proto", "service", "benchmarks"}:
        return f"our rooms are imported as gptjet.{top}"
    if top != "gptjet":
        homes = ONLY_IN.get(top)
        if homes is not None and not any(is_within(name, home) for home in homes):
            return f"{top} is for {sorted(homes)}"
        banned = part is not None and top in BANNED.get(part, set())
        return f"{part} must not use {top}" if banned else None
    if is_within(target, NEVER_IMPORTED_BY_OTHERS) and part != NEVER_IMPORTED_BY_OTHERS:
        return f"{NEVER_IMPORTED_BY_OTHERS} is imported by nothing"
    if part is None or is_within(target, part):
        return None
    if any(is_within(target, allowed) for allowed in ALLOWED[part]):
        return None
    return f"{part} may import {sorted(ALLOWED[part]) or 'nothing of ours'}"


def plant(root: Path, files: dict[str, str]) -> None:
    """Write a small tree of rooms for a test to look at."""
    for room in ROOMS:
        (root / room).mkdir(parents=True)
    for relative, source in files.items():
        path = root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")


def test_every_import_in_the_tree_points_the_right_way() -> None:
    assert find_violations(ROOT) == []


def test_the_arrows_of_the_design_are_accepted(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proto/v1/x_pb2.py": "from google.protobuf import descriptor\n",
            "kernels/gpu/gemv.py": "import torch\nimport triton\n",
            "service/engine/engine.py": "import torch\nfrom gptjet.service.engine import request\n",
            "service/engine/request.py": "import enum\n",
            "service/models/gptj.py": "from gptjet.kernels.gpu.gemv import gemv\n",
            "service/backends/fused.py": (
                "import transformers\nfrom gptjet.kernels.gpu import gemv\n"
                "from gptjet.service.engine.request import Request\n"
                "from gptjet.service.models.gptj import Model\n"
            ),
            "service/rpc/servicer.py": (
                "import grpc\nfrom gptjet.proto.v1 import x_pb2\nfrom ..engine import engine\n"
            ),
            "service/client.py": (
                "import grpc\nfrom gptjet.proto.v1 import x_pb2\n"
                "from gptjet.service.client_types import Model\n"
            ),
            "service/apps/sentiment.py": "from gptjet.service.client import Client\n",
            "service/cli.py": (
                "from gptjet.benchmarks import sweep\nfrom gptjet.service.backends import fused\n"
                "from gptjet.service.rpc import servicer\n"
            ),
            "service/client_types.py": "import enum\n",
            "benchmarks/sweep.py": "import gptjet.kernels.gpu.gemv, gptjet.service.client_types\n",
        },
    )
    assert find_violations(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        pytest.param("service/engine/a.py", "import grpc", id="engine to grpc"),
        pytest.param("service/engine/a.py", "from http import client", id="engine to http"),
        pytest.param("service/engine/a.py", "import prometheus_client", id="engine to metrics"),
        pytest.param("service/engine/a.py", "import transformers", id="engine to transformers"),
        pytest.param("service/engine/a.py", "import gptjet.proto.v1", id="engine to proto"),
        pytest.param(
            "service/engine/a.py",
            "from gptjet.service.backends import mock",
            id="to backend",
        ),
        pytest.param(
            "service/engine/a.py",
            "def f():\n    from gptjet.service.rpc import servicer",
            id="inside a function",
        ),
        pytest.param(
            "service/engine/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gptjet.service.rpc",
            id="for annotations only",
        ),
        pytest.param("service/engine/a.py", "from ..backends import mock", id="relative"),
        pytest.param("service/engine/a.py", "from .. import rpc", id="relative to a namespace"),
        pytest.param("service/engine/a.py", "from gptjet import kernels", id="room by its name"),
        pytest.param(
            "service/engine/a.py",
            "import importlib\nimportlib.import_module('gptjet.service.rpc.servicer')",
            id="by import_module",
        ),
        pytest.param("service/engine/a.py", "from proto.v1 import x_pb2", id="top-level proto"),
        pytest.param("kernels/a.py", "from gptjet.service.engine import a", id="to engine"),
        pytest.param("kernels/a.py", "import triton", id="kernels of the CPU to triton"),
        pytest.param("service/backends/a.py", "import triton", id="backends to triton"),
        pytest.param("proto/v1/a.py", "import gptjet.kernels.gemv", id="proto to kernels"),
        pytest.param("service/models/a.py", "import gptjet.service.backends", id="to backends"),
        pytest.param("service/backends/a.py", "import gptjet.service.rpc", id="backends to rpc"),
        pytest.param("service/backends/a.py", "import grpc", id="backends to grpc"),
        pytest.param("service/rpc/a.py", "import gptjet.service.backends", id="rpc to backends"),
        pytest.param("service/rpc/a.py", "import torch", id="rpc to torch"),
        pytest.param("service/rpc/a.py", "from gptjet.service import cli", id="rpc to wiring"),
        pytest.param("service/client.py", "import torch", id="client to torch"),
        pytest.param("service/client.py", "import gptjet.service.engine", id="client to engine"),
        pytest.param("service/apps/a.py", "import gptjet.service.engine", id="apps to engine"),
        pytest.param("service/cli.py", "import gptjet.service.training", id="cli to training"),
        pytest.param("benchmarks/a.py", "import gptjet.service.engine", id="benchmarks to engine"),
    ],
)
def test_a_reversed_arrow_fails_and_names_file_and_line(
    tmp_path: Path, path: str, source: str
) -> None:
    plant(
        tmp_path,
        {
            "service/engine/__init__.py": "",
            "service/rpc/servicer.py": "",
            "service/backends/mock.py": "",
            path: source + "\n",
        },
    )
    (violation,) = find_violations(tmp_path)
    assert violation.startswith(f"{path}:{len(source.splitlines())}: ")


def test_the_client_starts_without_torch_and_without_the_server() -> None:
    """A client machine needs no model stack, and a command line must answer at once."""
    heavy = ("torch", "transformers", "numpy", "gptjet.service.engine", "gptjet.service.rpc")
    script = (
        "import sys, gptjet.service.client\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")


def readme_section(name: str) -> str:
    """Return what stands between the README's markers of a generated section."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.split(f"<!-- generated: {name} -->")[1].split("<!-- end -->")[0]


def test_the_module_map_in_the_readme_lists_exactly_the_modules_in_the_tree() -> None:
    listed: list[str] = []
    folder = ""
    for line in readme_section("module map").splitlines():
        name = line.split()[0] if line.strip(" `") else ""
        if name.endswith("/"):
            folder = name
        elif line.startswith("  "):
            listed.append(folder + name)
    in_the_tree = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for suffix in ("py", "proto")
        for path in (ROOT / room).rglob(f"*.{suffix}")
        if path.name != "__init__.py" and not path.stem.endswith(("_pb2", "_pb2_grpc"))
    }
    assert sorted(listed) == sorted(in_the_tree), "run `make readme`"


def test_the_generated_sections_of_the_readme_are_current() -> None:
    """The map's words are the modules' docstrings, the figures are evaluation.json's."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    generator = runpy.run_path(str(ROOT / ".ci" / "readme.py"))
    assert generator["render"](readme, ROOT) == readme, "run `make readme`"
