"""`gptjet warm-cache` from its flags to files in the folder, and every way to be refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from typer.testing import Result

from gptjet.kernels.gpu import availability
from gptjet.service.commands.terminal import ExitCode

Invoke = Callable[..., Awaitable[Result]]

# The command, of whose kernels two are compiled: the others take as long each.
FIRST_TWO = """
import sys
from gptjet.kernels.gpu import warm
from gptjet.service import cli
every = warm.launches_of
def first_two(*arguments, **options):
    launches = every(*arguments, **options)
    assert len(launches) > 20
    return launches[:2]
if __name__ == "__main__":
    warm.launches_of = first_two
    cli.main()
"""


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the command can tell, kernels can be compiled in this process."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def run(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "first_two.py"
    script.write_text(FIRST_TWO, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(script), "warm-cache", *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_folder_has_kernels_and_what_launches_them(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = run(
        *(tmp_path, "--arch", "sm_75", "--cache-dir", str(cache), "--model", "embedded"),
        *("--dtype", "float16", "--kv-cache-dtype", "float16", "--max-sequences", "1"),
        *("--jobs", "1"),
    )
    assert (done.returncode, done.stdout[:32]) == (0, f"2 kernels for sm_75 in {cache}"[:32]), done
    assert f"TRITON_CACHE_DIR={cache}" in done.stdout
    names = {path.name for path in cache.rglob("*") if path.is_file()}
    assert {"_embed_kernel.cubin", "_layer_norm_linear_kernel.cubin"} <= names
    assert {name.partition(".")[0] for name in names} >= {"cuda_utils", "__triton_launcher"}
    assert len(list(cache.glob("*/*.cubin"))) == 2


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("arch", ["sm_60", "t4", "sm_", "sm_7५"])
async def test_card_that_is_none_is_refused_with_those_that_are(arch: str, invoke: Invoke) -> None:
    result = await invoke("warm-cache", "--arch", arch)
    assert result.exit_code == ExitCode.USAGE
    assert f"--arch {arch}: it must be sm_70 or newer (sm_70, sm_75, sm_80" in result.stderr


async def test_interpreter_is_refused(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = await invoke("warm-cache", "--arch", "sm_75")
    assert result.exit_code == ExitCode.USAGE
    assert "TRITON_INTERPRET is set" in result.stderr


@pytest.mark.usefixtures("compiles")
async def test_missing_compiler_is_named(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = await invoke("warm-cache", "--arch", "sm_75")
    assert result.exit_code == ExitCode.USAGE
    assert "no C compiler" in result.stderr
    assert "apt-get install -y gcc" in result.stderr


@pytest.mark.usefixtures("compiles")
async def test_missing_headers_are_named(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(availability.sysconfig, "get_path", lambda _: str(tmp_path))
    result = await invoke("warm-cache", "--arch", "sm_75")
    assert result.exit_code == ExitCode.USAGE
    assert "no Python headers" in result.stderr


@pytest.mark.usefixtures("compiles")
async def test_model_of_another_family_is_refused_by_name(
    invoke: Invoke, make_causal_lm_checkpoint: Callable[..., Path]
) -> None:
    folder = make_causal_lm_checkpoint("gpt2")
    result = await invoke("warm-cache", "--arch", "sm_75", "--model", str(folder))
    assert result.exit_code == ExitCode.USAGE
    assert "gpt2" in result.stderr


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = run(tmp_path, "--arch", "sm_75", "--cache-dir", str(file / "x"), "--model", "embedded")
    assert done.returncode == ExitCode.USAGE
    assert f"{file}/x cannot be written: " in done.stderr
