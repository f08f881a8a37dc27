"""Parity and speed of each kernel of `kernels.gpu` on the present device, printed as JSON lines.

    python -m gptjet.benchmarks.gpu_evidence.kernel_measure parity --jobs 8
    python -m gptjet.benchmarks.gpu_evidence.kernel_measure speed

On a CPU kernels are interpreted and timed by the clock: that tries the command, and says nothing.

    kernel_parity  one launch against the PyTorch reference: largest difference, limit, passed
    proof          a subject ("kernels/int8"), and whether all of its launches passed
    bandwidth      of a copy, and the FP16 matrix rate, by CUDA events
    kernel         a launch's time with nothing in the second-level cache, and its share of the
                   copy's bandwidth; `red` and no time where it is not what the reference computes
    launch_cost    what the host takes to launch a kernel outside a CUDA graph
    error          why it stopped
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

Record = dict[str, Any]

ROWS = {"gpt-j-6b": (1, 2, 3, 4, 5, 6, 7, 8), "tiny": (1, 3)}
# Of dot_linear: full and broken tiles of 16, 32, 64 and 128 rows. A CPU interprets it.
DOT_ROWS = {"gpt-j-6b": (9, 16, 17, 33, 64, 100), "tiny": (16,)}
_MODULE = "gptjet.benchmarks.gpu_evidence.kernel_measure"
_MIB = 1 << 20
# Far beyond every second-level cache (H100: 50 MiB).
_WORKING_SET_BYTES = {"cuda": 512 * _MIB, "cpu": 0}
_COPIED_BYTES = {"cuda": 1024 * _MIB, "cpu": 16 * _MIB}
_MATRIX_SIZE = {"cuda": 8192, "cpu": 256}
_REPEATS = {"cuda": 9, "cpu": 1}
_LAUNCHES = {"cuda": 300, "cpu": 2}


def check_cases(cases: Iterable[Any], device: torch.device) -> Iterator[Record]:
    """A kernel_parity record a case. What raises has failed, and does not stop the others."""
    for case in cases:
        record: Record = {
            "kind": "kernel_parity",
            "subject": case.subject,
            "kernel": case.kernel,
            "case": case.name,
            "passed": False,
        }
        try:
            difference, limit = case.make(device, 0).error()
        except Exception as error:  # noqa: BLE001 - a kernel that cannot run has failed
            record["message"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        else:
            # NaN is within no limit, and JSON has no word for it.
            record["passed"] = difference <= limit
            record |= {"difference": _finite(difference), "limit": limit}
        yield record


def proofs_of(records: Sequence[Mapping[str, Any]], expected: Mapping[str, int]) -> list[Record]:
    """A proof a subject: every one of its `expected` cases is there, and passed."""
    proofs: list[Record] = []
    for subject, count in expected.items():
        mine = [record for record in records if record["subject"] == subject]
        passed = len(mine) == count and all(record["passed"] for record in mine)
        proofs.append({"kind": "proof", "subject": subject, "passed": passed, "cases": len(mine)})
    return proofs


def time_cases(cases: Iterable[Any], device: torch.device, copy_gb_s: float) -> Iterator[Record]:
    """A kernel record a case, checked against its reference before it is timed."""
    for case in cases:
        record: Record = {
            "kind": "kernel",
            "subject": case.subject,
            "kernel": case.kernel,
            "case": case.name,
            "rows": case.rows,
        }
        try:
            made = case.make(device, _WORKING_SET_BYTES[device.type])
            difference, limit = made.error()
            if not difference <= limit:
                yield {**record, "red": True, "difference": _finite(difference), "limit": limit}
                continue
            # Few copies are run over several times, so that the graph's own start does not count.
            rounds = max(1, 8 // made.copies) if device.type == "cuda" else 1

            def work(made: Any = made, rounds: int = rounds) -> None:
                for _ in range(rounds):
                    for copy in range(made.copies):
                        made.launch(copy)

            seconds = device_seconds(work, device) / (rounds * made.copies)
        except Exception as error:  # noqa: BLE001 - the others are still worth their times
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            yield {**record, "red": True, "message": message}
            continue
        rate = made.num_bytes / seconds / 1e9
        yield {
            **record,
            "red": False,
            "us": round(1e6 * seconds, 3),
            "num_bytes": made.num_bytes,
            "copies": made.copies,
            "gb_s": round(rate, 2),
            "share_of_copy": round(rate / copy_gb_s, 4),
        }


def device_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Median time of `work`, replayed as a CUDA graph between two events; by the clock on a CPU."""
    replay = work
    if device.type == "cuda":
        # Once outside of the capture: what it launches is compiled and loaded then.
        work()
        torch.cuda.synchronize(device)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graph.replay()
        replay = graph.replay
    return statistics.median(_event_seconds(replay, device) for _ in range(_REPEATS[device.type]))


def _event_seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def measure_bandwidth(device: torch.device) -> Record:
    """copy_gb_s: bytes read plus bytes written. matrix_tflops: a square FP16 product's."""
    source = torch.zeros(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(4):
            target.copy_(source)

    copy_s = device_seconds(copy, device) / 4
    size = _MATRIX_SIZE[device.type]
    left, right = torch.randn(2, size, size, device=device).half()
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)

    def multiply() -> None:
        for _ in range(4):
            torch.mm(left, right, out=out)

    matrix_s = device_seconds(multiply, device) / 4
    return {
        "kind": "bandwidth",
        "device": _name(device),
        "copied_bytes": source.nbytes,
        "copy_gb_s": round(2 * source.nbytes / copy_s / 1e9, 2),
        "matrix_size": size,
        "matrix_tflops": round(2 * size**3 / matrix_s / 1e12, 3),
    }


def measure_launch_cost(cases: Sequence[Any], device: torch.device) -> Iterator[Record]:
    """Host microseconds of a launch, the device idle or busy: of the kernels of a decode step."""
    for case in cases:
        made = case.make(device, 0)
        made.launch(0)
        _wait(device)
        count = _LAUNCHES[device.type]
        times = []
        for _ in range(3):
            started = time.perf_counter()
            for _ in range(count):
                made.launch(0)
            times.append((time.perf_counter() - started) / count)
            _wait(device)
        yield {
            "kind": "launch_cost",
            "kernel": case.kernel,
            "case": case.name,
            "host_us": round(1e6 * min(times), 3),
        }


def run_parity(geometry: str, device_name: str, jobs: int) -> Iterator[Record]:
    """All cases, divided between `jobs` processes: nearly all of the time is the compiler's."""
    cases = _cases(geometry, device_name)
    expected: dict[str, int] = {}
    for case in cases:
        expected[case.subject] = expected.get(case.subject, 0) + 1
    records: list[Record] = []
    if jobs == 1:
        for record in check_cases(cases, _device(device_name)):
            records.append(record)
            yield record
    else:
        with ThreadPoolExecutor(jobs) as pool:
            flags = ["--geometry", geometry, "--device", device_name]
            parts = pool.map(lambda part: _run_part(flags, f"{part}/{jobs}"), range(jobs))
            for part in parts:
                records += part
                yield from part
    yield from proofs_of(records, expected)


def _run_part(flags: Sequence[str], part: str) -> list[Record]:
    """The records of a process of its own; what it did not get to is missing, and so not proven."""
    command = [sys.executable, "-m", _MODULE, "parity", *flags, "--part", part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    records = []
    for line in done.stdout.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") == "kernel_parity":
            records.append(record)
    return records


def _run_one_part(geometry: str, device_name: str, part: str) -> Iterator[Record]:
    index, count = (int(number) for number in part.split("/"))
    cases = _cases(geometry, device_name)[index::count]
    yield from check_cases(cases, _device(device_name))


def run_speed(geometry: str, device_name: str) -> Iterator[Record]:
    """The bandwidth, each timed case's share of it, and the cost of launches."""
    device = _device(device_name)
    bandwidth = measure_bandwidth(device)
    yield bandwidth
    cases = [case for case in _cases(geometry, device_name) if case.is_timed]
    # Batch 1 first: a cut-off loses least.
    cases.sort(key=lambda case: case.rows)
    yield from time_cases(cases, device, bandwidth["copy_gb_s"])
    of_a_step = {case.kernel: case for case in cases if case.rows == 1 and case.kernel != "sample"}
    yield from measure_launch_cost(list(of_a_step.values()), device)


def _cases(geometry: str, device_name: str) -> list[Any]:
    """Of the kernels that the device launches."""
    from gptjet.benchmarks.gpu_evidence.kernel_cases import GEOMETRIES, kernel_cases
    from gptjet.kernels.gpu.gemv_launch import capability_of
    from gptjet.kernels.gpu.tuning import FIRST_WITH_DOT

    device = _device(device_name)
    has_dot = device.type == "cpu" or capability_of(device) >= FIRST_WITH_DOT
    dot_rows = DOT_ROWS[geometry] if has_dot else ()
    return list(kernel_cases(GEOMETRIES[geometry], ROWS[geometry], dot_rows))


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("there is no CUDA device")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise UnavailableError("on a CPU, set TRITON_INTERPRET=1 to interpret the kernels")
    return device


class UnavailableError(Exception):
    """This machine cannot run the kernels; the message is one line."""


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="parity and speed of each GPU kernel")
    parser.add_argument("what", choices=("parity", "speed"))
    parser.add_argument("--geometry", choices=tuple(ROWS), default="gpt-j-6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes that check parity")
    parser.add_argument("--part", default=None, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done and nothing red, 1 something is, 2 this machine cannot run it."""
    flags = build_parser().parse_args(arguments)
    red = 0
    try:
        if flags.what == "speed":
            records = run_speed(flags.geometry, flags.device)
        elif flags.part:
            records = _run_one_part(flags.geometry, flags.device, flags.part)
        else:
            records = run_parity(flags.geometry, flags.device, flags.jobs)
        for record in records:
            red += bool(record.get("red")) or record.get("passed") is False
            print(json.dumps(record), flush=True)
    except (UnavailableError, ImportError) as error:
        _print_error(str(error), unavailable=True)
        return 2
    except Exception as error:  # noqa: BLE001 - the caller reads JSON lines, not tracebacks
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _print_error(message, unavailable=False)
        return 1
    if red and not flags.part:
        _print_error(f"{red} records are red", unavailable=False)
    return 1 if red else 0


def _print_error(message: str, *, unavailable: bool) -> None:
    record = {"kind": "error", "message": message, "unavailable": unavailable}
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main())
