"""Kernels run through Triton's interpreter, and a small model made of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its own module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_small = _load("small_model")


@pytest.fixture(scope="session")
def small() -> ModuleType:
    """A small random model, batches for it, and a recorder."""
    return _small


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter(quick_interpreter: None) -> None:
    """Every test here interprets kernels."""
