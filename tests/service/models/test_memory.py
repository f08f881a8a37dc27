"""Free memory: the machine's, or a container's where that is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptjet.service.models.memory import available_host_bytes, format_bytes


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    """A container that uses 700 of its bytes, 100 of them idle page cache, where 10240 are free."""
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:  10 kB\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 100\nactive_file 0\n")
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "available"),
    [("1000", 400), ("max", 10_240), ("500", 0), ("90000", 10_240)],
)
def test_container_limit_counts_where_it_is_the_smaller(
    cgroup: Path, limit: str, available: int
) -> None:
    (cgroup / "memory.max").write_text(limit + "\n")
    assert available_host_bytes(cgroup / "meminfo", cgroup) == available


def test_machine_without_cgroups_is_asked_alone(cgroup: Path) -> None:
    assert available_host_bytes(cgroup / "meminfo", cgroup / "absent") == 10_240


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (12_100_000_000, "11.3 GiB")],
)
def test_bytes_are_written_as_people_read_them(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_this_machine_has_memory() -> None:
    assert 2**20 < available_host_bytes() < 2**50
