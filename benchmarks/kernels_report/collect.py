"""Hands the cases to compiling processes, with a time limit each, and keeps their results."""

from __future__ import annotations

import json
import os
import queue
import selectors
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptjet.benchmarks.files import write_atomically

WORKER = (sys.executable, "-m", "gptjet.benchmarks.kernels_report.worker")


class CollectError(Exception):
    """No case could be listed; the message is for a person."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A case for one capability, and what came of it; `error` is None where it was compiled.

    stack, shared          bytes of a thread, of a program
    wide_loads_in_flight   loads of 16 bytes that one thread waits for at once
    bytes_in_flight        that one thread waits for at once
    has_dot                whether it uses tl.dot
    matrix_instructions    of the matrix units, in its loop: "16 HMMA"; "" where there are none
    bytes_moved, _minimum  of a launch at GPT-J-6B's sizes, as CompileCase counts them
    """

    module: str
    name: str
    capability: int
    num_warps: int
    programs: int
    bytes_moved: int
    bytes_minimum: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    wide_loads_in_flight: int = 0
    bytes_in_flight: int = 0
    has_dot: bool = False
    matrix_instructions: str = ""
    error: str | None = None


class Worker:
    """A compiling process; started at its first job, and again after one that it did not survive.

    Raises nothing: every way to fail is an answer with an error.
    """

    def __init__(self, command: tuple[str, ...] = WORKER) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The process's answer, or {"error": ...}."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return {"error": self._died()}
        line = _read_line(process, timeout_s)
        if line is None:
            self.close()
            return {"error": f"the compiler took more than {timeout_s:g} s"}
        if not line.endswith(b"\n"):
            return {"error": self._died()}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        # Interpreted kernels cannot be compiled: the variable must not reach the process.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        return self._process

    def _died(self) -> str:
        process, self._process = self._process, None
        assert process is not None
        code = process.wait()
        return f"the compiler died: exit code {code}" if code >= 0 else f"killed by signal {-code}"


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
    """Up to a newline or the end; None where the time runs out first."""
    assert process.stdout is not None
    held = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not held.endswith(b"\n"):
            # A line is one write of a worker that then waits, so that the time is the job's.
            if not selector.select(timeout_s):
                return None
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            held += chunk
    return held


def list_jobs(worker: Worker, timeout_s: float) -> list[dict[str, Any]]:
    """What there is to compile. Raises CollectError."""
    answer = worker.ask({"list": None}, timeout_s)
    if "jobs" not in answer:
        raise CollectError(f"the kernels cannot be listed: {answer['error']}")
    jobs: list[dict[str, Any]] = answer["jobs"]
    return jobs


def collect(
    jobs: Iterable[dict[str, Any]],
    cache: Path,
    *,
    num_workers: int,
    timeout_s: float,
    on_done: Callable[[Compiled], None] = lambda _: None,
    command: tuple[str, ...] = WORKER,
) -> list[Compiled]:
    """Compile what the cache does not hold; results in the order of the jobs.

    Results are kept by content, in a file each; errors are not kept.
    """
    listed = list(jobs)
    results: dict[int, Compiled] = {}
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index, job in enumerate(listed):
        held = _held(cache, job)
        if held is None:
            waiting.put(index)
        else:
            results[index] = held
            on_done(held)

    def work() -> None:
        worker = Worker(command)
        try:
            while True:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                job = listed[index]
                answer = worker.ask(
                    {key: job[key] for key in ("module", "name", "capability")}, timeout_s
                )
                result = _compiled(job, answer)
                if result.error is None:
                    _keep(cache, job["key"], answer["result"])
                results[index] = result
                on_done(result)
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(min(num_workers, waiting.qsize()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[index] for index in range(len(listed))]


def _compiled(job: dict[str, Any], answer: dict[str, Any]) -> Compiled:
    known = {key: value for key, value in job.items() if key != "key"}
    return Compiled(**known, **answer.get("result", {}), error=answer.get("error"))


def _held(cache: Path, job: dict[str, Any]) -> Compiled | None:
    try:
        result = json.loads((cache / f"{job['key']}.json").read_text(encoding="utf-8"))
        return _compiled(job, {"result": result})
    except (OSError, ValueError, TypeError):
        return None


def _keep(cache: Path, key: str, result: dict[str, Any]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(cache / f"{key}.json", json.dumps(result))


def as_record(compiled: Compiled) -> dict[str, Any]:
    """For JSON."""
    return asdict(compiled)
