"""The plain model to compare with, and packed models that are closed after the test."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from gptjet.kernels.cpu import CpuModel


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its own module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_plain = _load("plain_model")


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    return _plain


@pytest.fixture(scope="session", autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled libraries of this test run, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("GPTJET_CPU_ISA", raising=False)
        yield folder


@pytest.fixture(params=["native", "generic"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test that takes it runs with and without this processor's own instructions."""
    chosen: str = request.param
    monkeypatch.setenv("GPTJET_CPU_ISA", chosen)
    return chosen


@pytest.fixture
def pack() -> Iterator[Callable[..., CpuModel]]:
    """`pack(plain_model, num_threads=2)` packs its weights."""
    models: list[CpuModel] = []

    def make(model: ModuleType, num_threads: int = 2) -> CpuModel:
        packed = CpuModel.pack(model.geometry, model.head, model.layers, num_threads=num_threads)
        models.append(packed)
        return packed

    yield make
    for packed in models:
        packed.close()


@pytest.fixture(params=list(_plain.GEOMETRIES))
def name(request: pytest.FixtureRequest) -> str:
    """Of a geometry."""
    chosen: str = request.param
    return chosen
