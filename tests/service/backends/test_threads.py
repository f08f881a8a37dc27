"""How many threads a model on the CPU gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptjet.kernels.cpu.model import MAX_THREADS
from gptjet.service.backends.threads import choose_cpu_threads


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("quota", "threads"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("6400000 100000", 8),
        ("nonsense", 8),
    ],
)
def test_threads_are_the_cores_that_affinity_and_quota_leave(
    quota: str, threads: int, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert choose_cpu_threads(cgroup=tmp_path) == threads


@pytest.mark.usefixtures("eight_cores")
def test_machine_without_cgroups_gives_all_its_cores(tmp_path: Path) -> None:
    assert choose_cpu_threads(cgroup=tmp_path) == 8


@pytest.mark.usefixtures("eight_cores")
def test_setting_wins_over_the_environment_and_that_over_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert choose_cpu_threads(cgroup=tmp_path) == 5
    assert choose_cpu_threads(3, cgroup=tmp_path) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")  # of nested regions, which this has not
    assert choose_cpu_threads(cgroup=tmp_path) == 8


def test_a_machine_of_more_cores_than_the_kernels_take_gives_as_many_as_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(384)), raising=False)
    assert choose_cpu_threads(cgroup=tmp_path) == MAX_THREADS
