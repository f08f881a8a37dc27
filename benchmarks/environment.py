"""The environment record: what a result depends on, and nothing that names a machine or a person.

Read with the standard library and nvidia-smi alone, so that recording it loads no model stack.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PACKAGES = (
    "gptjet",
    "torch",
    "transformers",
    "tokenizers",
    "deepspeed",
    "triton",
    "ctranslate2",
    "openvino",
    "openvino-genai",
    "accelerate",
    "safetensors",
    "numpy",
    "grpcio",
    "protobuf",
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KMP_AFFINITY")
# nvidia-smi --help-query-gpu: name of the field -> name in the record. Clocks in MHz, power in W,
# memory in MiB, temperature in degrees C.
_GPU_FIELDS = {
    "name": "name",
    "driver_version": "driver",
    "memory.total": "memory_mib",
    "memory.used": "memory_used_mib",
    "compute_cap": "compute_capability",
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "max_sm_clock_mhz",
    "clocks.max.mem": "max_memory_clock_mhz",
    "temperature.gpu": "temperature_c",
    "power.limit": "power_limit_w",
    "persistence_mode": "persistence_mode",
    "ecc.mode.current": "ecc",
    "mig.mode.current": "mig",
    "pcie.link.gen.current": "pcie_generation",
    "pcie.link.width.current": "pcie_width",
}
_TEXT_FIELDS = frozenset({"name", "driver", "compute_capability", "persistence_mode", "ecc", "mig"})
_COMMAND_TIMEOUT_S = 20


def record_environment() -> dict[str, Any]:
    """Card, driver, clocks, versions, git commit, load and processor, as plain JSON data.

    What cannot be read is None or absent. Never a host name, user name or path.
    """
    return {
        "recorded_at": utc_now(),
        "gpus": read_gpus(),
        "cpu": _read_cpu(),
        "memory_gib": _memory_gib("MemTotal"),
        "memory_available_gib": _memory_gib("MemAvailable"),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "os": platform.system(),
        "kernel": ".".join(platform.release().split("-")[0].split(".")[:3]),
        "python": platform.python_version(),
        "packages": _package_versions(),
        "git": _git_state(Path(__file__).resolve().parent),
        "threads": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
    }


def utc_now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def load_average() -> float:
    """Processes wanting to run over the last minute."""
    return round(os.getloadavg()[0], 2)


def read_gpus() -> list[dict[str, Any]]:
    """One record a card; empty where there is no NVIDIA driver."""
    query = ",".join(_GPU_FIELDS)
    text = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    return parse_gpus(text) if text else []


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """The rows of `nvidia-smi --query-gpu --format=csv,noheader,nounits`."""
    cards = []
    for line in text.strip().splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_GPU_FIELDS):
            continue
        card: dict[str, Any] = {}
        for name, value in zip(_GPU_FIELDS.values(), values, strict=True):
            known = not value.startswith("[") and value != "N/A"
            card[name] = (value if name in _TEXT_FIELDS else _number(value)) if known else None
        cards.append(card)
    return cards


def without_paths(text: str) -> str:
    """A message with every absolute path cut to its last part: paths name machines and people."""
    return re.sub(r"(?<![\w:/.])(?:/[\w.@+~-]+){2,}", lambda m: m[0].rpartition("/")[2], text)


def _read_cpu() -> dict[str, Any]:
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    useful = (
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_bf16",
        "amx_int8",
        "asimd",
        "bf16",
    )
    return {
        "model": model[1].strip() if model else platform.machine(),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "last_level_cache_mib": last_level_cache_mib(),
        "features": [name for name in useful if name in known],
        "virtual": "hypervisor" in known,
    }


def last_level_cache_mib() -> float | None:
    """Size of the largest cache the first core sees; None where the kernel does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG])", _read(file).strip())
        if match:
            sizes.append(int(match[1]) * {"K": 1 / 1024, "M": 1.0, "G": 1024.0}[match[2]])
    return max(sizes, default=None)


def _memory_gib(field: str) -> float | None:
    match = re.search(rf"^{field}:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return round(int(match[1]) / 2**20, 2) if match else None


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_state(folder: Path) -> dict[str, Any] | None:
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "modified": bool(changes and changes.strip())}


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(text: str) -> float | int | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() else value
