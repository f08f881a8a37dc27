"""Compiling the C library: warnings, the cache, the compiler's errors, the sanitizers."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from gptjet.kernels.cpu import NativeUnavailableError, build, native_library

SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import plain_model as plain
from gptjet.kernels.cpu import CpuModel
for kind in ("fp32", "int8", "int4"):
    for name in ("odd-inputs", "head48"):
        model = plain.random_model(plain.GEOMETRIES[name], kind, group=50)
        packed = CpuModel.pack(model.geometry, model.head, model.layers, num_threads=3)
        ids = plain.random_ids(model.geometry, model.geometry.max_context)
        sequences = plain.Sequences(model.geometry, [ids, ids])
        parts = [
            packed.forward(sequences.batch({{0: count, 1: 1}}), sequences.kv_cache)
            for count in (1, 30, len(ids) - 31)
        ]
        assert parts[-1].isfinite().all()
        packed.close()
print("clean")
"""


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gptjet"


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`fake_compiler(body)` makes CC a shell script; --version is answered for it."""

    def make(body: str) -> Path:
        path = tmp_path / "fake-cc"
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{body}\n', encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(path))
        return path

    return make


@pytest.mark.parametrize("isa", build.ISAS)
def test_the_sources_compile_without_a_warning(tmp_path: Path, isa: str) -> None:
    command = [*build.find_compiler(), *build.compile_flags(isa)]
    sources = sorted(map(str, build.SOURCES.glob("*.c")))
    strict = ["-Wall", "-Wextra", "-Wvla", "-Wstrict-prototypes", "-Werror"]
    output = str(tmp_path / "library.so")
    result = subprocess.run(
        [*command, *strict, *sources, "-o", output, "-lm"], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_no_source_is_longer_than_a_reader_can_hold() -> None:
    sources = [path for path in build.SOURCES.iterdir() if path.suffix in {".c", ".h"}]
    assert sources
    for path in sources:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name


def test_the_library_is_compiled_once_and_left_without_scraps(
    fresh_cache: Path, fake_compiler: Callable[[str], Path], tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    fake_compiler(
        f'echo called >> {calls}\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"'
    )
    path = build.library_path()
    assert path.read_text(encoding="utf-8") == "library\n"
    assert build.library_path() == path
    assert calls.read_text(encoding="utf-8") == "called\n"
    assert list(fresh_cache.iterdir()) == [path]


def test_another_compiler_or_instruction_set_is_another_library(
    fresh_cache: Path, fake_compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler('while [ "$1" != -o ]; do shift; done; touch "$2"')
    native = build.library_path()
    monkeypatch.setenv("GPTJET_CPU_ISA", "generic")
    generic = build.library_path()
    monkeypatch.setenv("CC", f"{os.environ['CC']} -DX")
    assert len({native, generic, build.library_path()}) == 3


def test_a_compiler_that_fails_is_quoted_in_one_line(
    fresh_cache: Path, fake_compiler: Callable[[str], Path]
) -> None:
    fake_compiler("echo 'pool.c:3: error: no such thing' >&2; echo note >&2; exit 1")
    with pytest.raises(NativeUnavailableError) as raised:
        build.library_path()
    message = str(raised.value)
    assert message.endswith("could not compile the CPU kernels: pool.c:3: error: no such thing")
    assert list(fresh_cache.iterdir()) == []


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    with pytest.raises(NativeUnavailableError, match="CC is 'no-such-compiler -O1', not found"):
        build.library_path()


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailableError, match="none of cc, gcc, clang is on the PATH"):
        build.library_path()


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJET_CPU_ISA", "avx1024")
    with pytest.raises(NativeUnavailableError, match="GPTJET_CPU_ISA is 'avx1024'"):
        build.library_path()


def test_a_cache_that_cannot_be_written_is_replaced_by_a_folder_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_compiler: Callable[[str], Path]
) -> None:
    """A file in its place stops even root."""
    (tmp_path / "cache").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_compiler('while [ "$1" != -o ]; do shift; done; touch "$2"')
    path = build.library_path()
    assert path.exists()
    assert tmp_path not in path.parents
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    shutil.rmtree(path.parent)


def test_a_folder_of_our_own_goes_with_the_process(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder", encoding="utf-8")
    (tmp_path / "temporary").mkdir()
    script = (
        "from pathlib import Path; from gptjet.kernels.cpu import native_library;"
        "print(Path(native_library().path).exists())"
    )
    places = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "temporary")}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | places,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "True\n"
    assert list((tmp_path / "temporary").iterdir()) == []


def test_processes_that_start_at_once_do_not_load_half_a_library(
    tmp_path: Path, fake_compiler: Callable[[str], Path]
) -> None:
    """The compiler writes half of a real library, and the rest of it when both are at work."""
    real = native_library().path
    calls = tmp_path / "calls"
    fake_compiler(
        f'echo called >> {calls}\nwhile [ "$1" != -o ]; do shift; done\n'
        f'head -c 20000 {real} > "$2"\n'
        f'while [ "$(wc -l < {calls})" -lt 2 ]; do sleep 0.05; done\n'
        f'tail -c +20001 {real} >> "$2"'
    )
    script = "from gptjet.kernels.cpu import native_library; print(native_library().path.name)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    names = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert len(names) == 1
    (library,) = (tmp_path / "cache" / "gptjet").iterdir()
    assert library.read_bytes() == real.read_bytes()


@pytest.mark.parametrize("isa", build.ISAS)
def test_a_pass_is_clean_under_the_sanitizers(plain: ModuleType, tmp_path: Path, isa: str) -> None:
    """Addresses and undefined behaviour; the big buffers come from malloc here, to be watched."""
    compiler = build.find_compiler()[0]
    preload = []
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        preload.append(found)
    sanitize = "-fsanitize=address,undefined -fno-sanitize-recover=all -DGPTJET_PLAIN_MEMORY -O1"
    environment = os.environ | {
        "CC": f"{compiler} {sanitize}",
        "GPTJET_CPU_ISA": isa,
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_PRELOAD": " ".join(preload),
        # Python itself frees little at its end.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    folder = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "clean\n"), result.stderr[-3000:]
