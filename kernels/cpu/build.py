"""Compiles the C sources for this processor, once, and keeps the result in the user's cache.

CC                  the compiler; otherwise cc, gcc or clang, whichever is found first
GPTJET_CPU_ISA      native (the default), or generic: without AVX-512 and its integer dot products
XDG_CACHE_HOME      the library is kept in its folder gptjet/, by default in ~/.cache/gptjet
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "native"
ISA_VARIABLE = "GPTJET_CPU_ISA"
ISAS = ("native", "generic")

# No -ffast-math: NaN must stay NaN, and a sum's order is a promise. Multiply and add may fuse.
_FLAGS = [
    "-std=c11",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=default",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]
_X86 = {"x86_64", "amd64", "i686"}
_COMPILE_TIMEOUT_S = 300
_SHOWN_LINES = 6


class NativeUnavailableError(Exception):
    """The C library cannot be had here; the message is one line that says why."""


def chosen_isa() -> str:
    """What GPTJET_CPU_ISA says; raises NativeUnavailableError for a value that is not known."""
    isa = os.environ.get(ISA_VARIABLE, "") or "native"
    if isa not in ISAS:
        raise NativeUnavailableError(f"{ISA_VARIABLE} is {isa!r}; it may be {' or '.join(ISAS)}")
    return isa


def find_compiler() -> list[str]:
    """The C compiler as the beginning of a command line; raises NativeUnavailableError."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    if given:
        raise NativeUnavailableError(f"no C compiler: CC is {shlex.join(given)!r}, not found")
    raise NativeUnavailableError("no C compiler: none of cc, gcc, clang is on the PATH; set CC")


def compile_flags(isa: str) -> list[str]:
    """Flags for this machine's processor."""
    if platform.machine().lower() not in _X86:
        flags = ["-mcpu=native"] if platform.machine().lower() in {"aarch64", "arm64"} else []
    elif isa == "native":
        # Compilers older than the processor tune for one with narrow vectors.
        flags = ["-march=native", "-mprefer-vector-width=512"]
    else:
        flags = ["-march=native", "-mno-avx512f"]
    return [*_FLAGS, *flags, *(["-DGPTJET_GENERIC"] if isa == "generic" else [])]


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gptjet"


def library_path() -> Path:
    """Path of the compiled library, compiling it unless it is there.

    Raises NativeUnavailableError when this platform has none, no compiler is found, or it fails.
    """
    if sys.platform == "win32":
        raise NativeUnavailableError("the CPU kernels need a POSIX system")
    isa = chosen_isa()
    compiler, *arguments = find_compiler()
    # The user's arguments come last: they win.
    command = [compiler, *compile_flags(isa), *arguments]
    name = f"cpu-{isa}-{_fingerprint(command)}.so"
    folder = _writable_folder(name)
    path = folder / name
    if not path.exists():
        _compile(command, path)
    return path


def _writable_folder(name: str) -> Path:
    try:
        folder = cache_folder()
        if (folder / name).exists():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: no home folder can be found
        # A folder of our own: a shared one with a foreseeable name would let others plant a file.
        # Nobody finds it again, so it goes with the process; a mapped library outlives its file.
        own = Path(tempfile.mkdtemp(prefix="gptjet-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        return own


def _fingerprint(command: list[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    digest.update("\0".join(command).encode() + version.stdout + _processor().encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: the home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    keys = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)}))


def _compile(command: list[str], path: Path) -> None:
    sources = sorted(str(source) for source in SOURCES.glob("*.c"))
    # Under another name first: several processes may start at once, and none must load half a file.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    os.close(handle)
    partial = Path(name)
    try:
        result = subprocess.run(
            [*command, *sources, "-o", name, "-lm"],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_COMPILE_TIMEOUT_S,
        )
        if result.returncode != 0:
            raise NativeUnavailableError(
                f"{command[0]} could not compile the CPU kernels: {_shorten(result.stderr)}"
            )
        partial.chmod(0o755)
        partial.replace(path)
    except OSError as error:
        raise NativeUnavailableError(f"{command[0]} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        message = f"{command[0]} took longer than {_COMPILE_TIMEOUT_S} s"
        raise NativeUnavailableError(message) from error
    finally:
        partial.unlink(missing_ok=True)


def _shorten(message: str) -> str:
    """The lines that matter of a compiler's complaint, in one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines
    shown = "; ".join(telling[:_SHOWN_LINES])[:600]
    return shown or "it said nothing"
