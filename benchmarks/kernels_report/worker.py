"""Compiles one case a line: a process that may abort or hang, and is replaced where it does.

Reads JSON lines on stdin and answers each with one on what was stdout; whatever the compiler
prints goes to stderr. Jobs: {"list": null} and {"module", "name", "capability"}.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gptjet.benchmarks.kernels_report.machine_code import (
    loads_in_flight,
    matrix_instructions,
    parse_usage,
)
from gptjet.kernels.gpu.compile_case import CAPABILITIES, MODULES, CompileCase

# Of what this module and machine_code.py make of a compiled kernel: raise it when they change.
_FORMAT = 2
_TOOL_TIMEOUT_S = 60


def list_jobs() -> list[dict[str, Any]]:
    """Every (case, capability) with what is known before it is compiled. Raises ValueError."""
    jobs = []
    for module in MODULES:
        names: dict[int, set[str]] = {capability: set() for capability in CAPABILITIES}
        for case in _cases(module):
            for capability in filter(case.is_for, CAPABILITIES):
                if case.name in names[capability]:
                    raise ValueError(f"{module} has two cases {case.name!r} for sm_{capability}")
                names[capability].add(case.name)
                jobs.append(
                    {
                        "module": module,
                        "name": case.name,
                        "capability": capability,
                        "key": _key(case, capability),
                        "num_warps": case.num_warps,
                        "programs": case.programs,
                        "bytes_moved": case.bytes_moved,
                        "bytes_minimum": case.bytes_minimum,
                    }
                )
    return jobs


def compile_case(module: str, name: str, capability: int) -> dict[str, Any]:
    """Compile it, and read what came of it."""
    case = _find(module, name, capability)
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    source = ASTSource(
        fn=case.kernel,
        signature=dict(case.signature),
        constexprs=dict(case.constexprs),
        attrs=_attributes(case),
    )
    compiled = compile_source(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = parse_usage(_run(knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name))
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    loads = loads_in_flight(sass)
    return {
        "registers": usage.registers,
        "stack": usage.stack + usage.local,
        "shared": compiled.metadata.shared,
        "wide_loads_in_flight": loads.wide,
        "bytes_in_flight": loads.num_bytes,
        "has_dot": "tt.dot" in compiled.asm["ttir"],
        "matrix_instructions": matrix_instructions(sass),
    }


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=True
    )
    return done.stdout


@functools.cache
def _cases(module: str) -> tuple[CompileCase, ...]:
    cases: tuple[CompileCase, ...]
    cases = importlib.import_module(f"gptjet.kernels.gpu.{module}").compile_cases()
    return cases


def _find(module: str, name: str, capability: int) -> CompileCase:
    return next(case for case in _cases(module) if case.name == name and case.is_for(capability))


def _attributes(case: CompileCase) -> dict[tuple[int], list[list[Any]]]:
    """As the JIT specialises: pointers to the start of an allocation, and multiples of 16."""
    return {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(case.kernel.arg_names)
        if case.signature[argument].startswith("*") or argument in case.divisible_by_16
    }


def _key(case: CompileCase, capability: int) -> str:
    """Changes with the kernel's source, what it calls, its specialisation and the compiler."""
    import triton

    parts = (
        _FORMAT,
        triton.__version__,
        case.kernel.cache_key,
        sorted(case.signature.items()),
        sorted(case.constexprs.items()),
        sorted(case.divisible_by_16),
        case.num_warps,
        case.num_stages,
        capability,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """What the job came to; an error is one line."""
    try:
        if "list" in job:
            return {"jobs": list_jobs()}
        return {"result": compile_case(job["module"], job["name"], job["capability"])}
    except subprocess.CalledProcessError as error:
        return {"error": f"{Path(error.cmd[0]).name}: {error.stderr.strip()}"}
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the case's result
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"error": f"{type(error).__name__}: {' | '.join(lines[-3:])}"}


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
