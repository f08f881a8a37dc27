"""Has Triton's interpreter patch its language once, not at every call of a kernel's functions.

Triton 3.6 patches it anew at each of them, `tl.sum` included: a millisecond, and most of a kernel's
time. Once is enough. Python imports a module of this name by itself in every process that has this
folder in PYTHONPATH; tests/conftest.py uses it for its own process.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

INTERPRETER = "triton.runtime.interpreter"


def quick_patch(interpreter: ModuleType) -> Callable[[Any], Any] | None:
    """What may stand in place of `interpreter._patch_lang`; None: another Triton, whose ways are
    not known: slower, and as right."""
    tl = interpreter.tl
    patch = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:
        return None

    @functools.cache
    def languages_of(function: Any) -> tuple[ModuleType, ...]:
        return tuple(
            value
            for value in function.__globals__.values()
            if isinstance(value, ModuleType) and value in (tl, tl.core)
        )

    def patch_unless_done(function: Any) -> Any:
        languages = languages_of(function)
        # What is patched is no builtin of the compiler any more.
        if any(tl.core.is_builtin(language.load) for language in languages) or not languages:
            return patch(function)
        return scope()

    return patch_unless_done


class _AtImport(importlib.abc.MetaPathFinder):
    """Patches the interpreter when it is imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != INTERPRETER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            quick = quick_patch(module)
            if quick is not None:
                module._patch_lang = quick  # type: ignore[attr-defined]

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _AtImport())
