from __future__ import annotations

import ast
from pathlib import Path

from gptjet.kernels.gpu import compile_case

FOLDER = Path(compile_case.__file__).parent


def test_every_module_with_compile_cases_is_listed() -> None:
    """A kernel that is not listed would never be compiled for the other cards."""
    with_cases = {
        path.stem
        for path in FOLDER.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "compile_cases"
    }
    assert sorted(compile_case.MODULES) == sorted(with_cases)
