"""Kernels run through Triton's interpreter: set before anything imports one of their modules."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _language_patched_once() -> Iterator[None]:
    """Triton 3.6's interpreter patches its language anew at every call of a function in a kernel,
    `tl.sum` included: a millisecond each, and most of a kernel's time. Once is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:
        yield  # another Triton, whose ways are not known: slower, and as right
        return

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

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_unless_done)
        yield
