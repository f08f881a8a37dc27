"""Measures the present machine: copy bandwidth, read bandwidth and matrix rate.

    python -m gptjet.benchmarks.bandwidth --device cpu

A process of its own, because it needs torch and its threads must be gone when a sweep measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gptjet.benchmarks.environment import load_average, utc_now

if TYPE_CHECKING:
    import torch

_MIB = 2**20
# Far above any last-level cache, so that memory is measured and not a cache.
_CPU_WORKING_SET_BYTES = 512 * _MIB
_GPU_WORKING_SET_BYTES = 1024 * _MIB
_CPU_MATRIX_SIZE = 1024
_GPU_MATRIX_SIZE = 4096
_REPEATS = 7
_BURSTS = 4
_PAUSE_S = 0.5
_TIMEOUT_S = 300


class BandwidthError(Exception):
    """The measurement failed; the message is one line for a person."""


def measure_in_subprocess(device: str, model_bytes: int | None = None) -> dict[str, Any]:
    """Run `measure` in a fresh interpreter. Raises BandwidthError."""
    command = [sys.executable, "-m", __name__, "--device", device]
    if model_bytes:
        command += ["--model-bytes", str(model_bytes)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise BandwidthError(f"the measurement took more than {_TIMEOUT_S} s") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise BandwidthError(lines[-1] if lines else f"exit code {result.returncode}")
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def measure(device: str, model_bytes: int | None = None) -> dict[str, Any]:
    """Rates of a device ("cpu" or "cuda"), best of some repeats: the undisturbed machine.

    copy_gb_s        bytes read plus bytes written, of a copy far beyond every cache
    read_gb_s        bytes read of that size: on a CPU by as many threads as the engine's and as its
                     kernels read (read_method "kernels"), in bursts some time apart; elsewhere, and
                     where no compiler is, by a matrix-vector product
    read_gb_s_median the same, the median of all repeats: what the machine mostly gives
    model_read_gb_s  the same over `model_bytes`: above read_gb_s where a small model fits a cache
    matrix_tflops    of square products, by type; a type the device does not compute is absent
    """
    import torch

    torch.manual_seed(0)
    is_cpu = device == "cpu"
    size = _CPU_WORKING_SET_BYTES if is_cpu else _GPU_WORKING_SET_BYTES
    copied, copy_gb_s = _copy(torch.device(device), size)
    reads = _kernel_reads(size) if is_cpu else None
    product = _read(torch.device(device), size)
    return {
        "measured_at": utc_now(),
        "device": device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads() if is_cpu else None,
        "load_before": load_average(),
        "working_set_mib": copied // _MIB,
        "copy_gb_s": copy_gb_s,
        "read_gb_s": round(max(reads), 2) if reads else product,
        "read_gb_s_median": round(statistics.median(reads), 2) if reads else None,
        "read_method": "kernels" if reads else "matrix-vector product",
        "product_gb_s": product,
        "model_bytes": model_bytes,
        "model_read_gb_s": _model_read(torch.device(device), model_bytes),
        "matrix_tflops": _matrix_tflops(torch.device(device)),
    }


def _copy(device: torch.device, size: int) -> tuple[int, float]:
    import torch

    source = torch.empty(size // 4, device=device).uniform_()
    target = torch.empty_like(source)
    seconds = _best_seconds(device, lambda: target.copy_(source))
    return size, round(2 * size / seconds / 1e9, 2)


def _kernel_reads(size: int, bursts: int = _BURSTS) -> list[float] | None:
    """GB/s of each repeat; None where the kernels cannot be had."""
    import torch

    from gptjet.kernels.cpu import NativeUnavailableError
    from gptjet.kernels.cpu.bandwidth import measure_read

    # A short read is repeated inside one timing, or the clock and the hand-over would be measured.
    rounds = max(1, 64 * _MIB // max(1, size))
    found: list[float] = []
    for burst in range(bursts):
        if burst:
            time.sleep(_PAUSE_S)  # a neighbour's load comes and goes
        try:
            found += measure_read(torch.get_num_threads(), size, rounds=rounds)
        except (NativeUnavailableError, MemoryError):
            return None
    return [rate / 1e9 for rate in found]


def _model_read(device: torch.device, size: int | None) -> float | None:
    if not size:
        return None
    reads = _kernel_reads(size, bursts=1) if device.type == "cpu" else None
    return round(max(reads), 2) if reads else _read(device, size)


def _read(device: torch.device, size: int) -> float:
    import torch

    columns = 1024
    matrix = torch.empty(max(1, size // 4 // columns), columns, device=device).uniform_()
    vector = torch.empty(columns, device=device).uniform_()
    # A short read is repeated inside one timing, or the clock and the launch would be measured.
    rounds = max(1, 64 * _MIB // max(1, matrix.nbytes))

    def read() -> None:
        for _ in range(rounds):
            torch.mv(matrix, vector)

    return round(rounds * matrix.nbytes / _best_seconds(device, read) / 1e9, 2)


def _matrix_tflops(device: torch.device) -> dict[str, float]:
    import torch

    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type == "cuda":
        types["fp16"] = torch.float16
        # Before Ampere, BF16 is emulated.
        if torch.cuda.get_device_capability(device)[0] < 8:
            del types["bf16"]
    size = _CPU_MATRIX_SIZE if device.type == "cpu" else _GPU_MATRIX_SIZE
    rates = {}
    for name, dtype in types.items():
        left = torch.empty(size, size, device=device).uniform_().to(dtype)
        right = torch.empty(size, size, device=device).uniform_().to(dtype)
        seconds = _best_seconds(device, lambda a=left, b=right: torch.mm(a, b))  # type: ignore[misc]
        rates[name] = round(2 * size**3 / seconds / 1e12, 4)
    return rates


def _best_seconds(device: torch.device, work: Callable[[], object]) -> float:
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    best = float("inf")
    for _ in range(_REPEATS):
        wait()
        started = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m gptjet.benchmarks.bandwidth")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model-bytes", type=int, default=None, metavar="N")
    arguments = parser.parse_args()
    json.dump(measure(arguments.device, arguments.model_bytes), sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
