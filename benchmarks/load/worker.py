"""One process that sends its share of a run: `python -m gptjet.benchmarks.load.worker`.

The parent writes JSON lines to its standard input: first {"spec", "worker"}, then, once it has read
{"kind": "ready"}, {"start_ns"}; {"stop": true}, or the end of the input, ends the run early. On its
standard output come progress lines, and at the end every sample. Samples wait in memory until then:
writing them while tokens arrive would disturb what is measured.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from gptjet.benchmarks.load.generator import Generator, RequestFailedError
from gptjet.benchmarks.load.run_spec import RunSpec
from gptjet.benchmarks.load.transport import GrpcTransport, tls_from_json
from gptjet.benchmarks.load.validity import LagMonitor
from gptjet.benchmarks.load.workload import WorkloadError, plan_requests
from gptjet.service.client import GptjetError

_PROGRESS_S = 0.5
# Warm-up requests are planned with a seed of their own: none of them is sent again in the run.
_WARMUP_SEED_OFFSET = 1_000_003

# Never in the spec, which is written into results.
_TOKEN_VARIABLE = "GPTJET_TOKEN"

Emit = Callable[[str, Mapping[str, Any]], None]


async def work(spec: RunSpec, worker: int, emit: Emit, commands: asyncio.Queue[Any]) -> None:
    """Connect, warm up, wait for the start, send, report."""
    transport = GrpcTransport(
        spec.target,
        tls=tls_from_json(spec.tls),
        timeout_s=spec.timeout_s,
        connections=spec.connections,
        token=os.environ.get(_TOKEN_VARIABLE),
    )
    async with transport:
        await warm_up(spec, worker, transport)
        emit("ready", {})
        command = await commands.get()
        if "start_ns" not in command:
            return
        generator = Generator(transport, start_ns=command["start_ns"], drain_s=spec.drain_s)
        monitor = LagMonitor()
        helpers = [
            asyncio.create_task(monitor.watch()),
            asyncio.create_task(_stop_on_command(generator, commands)),
            asyncio.create_task(_report_progress(generator, emit)),
        ]
        try:
            await run_share(spec, worker, generator)
        finally:
            for helper in helpers:
                helper.cancel()
        for sample in generator.samples:
            emit("sample", sample.to_json())
        emit(
            "end",
            {
                "is_stopped": generator.is_stopped,
                "lag_ns": monitor.lag_ns.to_json(),
                "cpu_share": monitor.cpu_share,
                **_counters(generator),
            },
        )


async def warm_up(spec: RunSpec, worker: int, transport: GrpcTransport) -> None:
    """Open every connection and let the server see the lengths once. Raises RequestFailedError."""
    if not spec.warmup:
        return
    count = max(spec.warmup, transport.connections)
    workload = dataclasses.replace(
        spec.workload,
        seed=spec.workload.seed + _WARMUP_SEED_OFFSET,
        requests=count * spec.processes,
        duration_s=None,
    )
    for request in plan_requests(workload, worker, spec.processes):
        await transport.send(request, lambda _: None)


async def run_share(spec: RunSpec, worker: int, generator: Generator) -> None:
    """This worker's part of the run."""
    plan = plan_requests(spec.workload, worker, spec.processes)
    if spec.concurrency is None:
        await generator.run_open(plan)
    else:
        share = spec.concurrency_of(worker)
        await generator.run_closed(plan, share, spec.workload.duration_s)


async def _stop_on_command(generator: Generator, commands: asyncio.Queue[Any]) -> None:
    await commands.get()
    generator.stop()


async def _report_progress(generator: Generator, emit: Emit) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_S)
        emit("progress", _counters(generator))


def _counters(generator: Generator) -> dict[str, int]:
    return dataclasses.asdict(generator.counters)


def _emit(kind: str, fields: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps({"kind": kind, **fields}, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def _read_commands(commands: asyncio.Queue[Any], loop: asyncio.AbstractEventLoop) -> None:
    """Hand the parent's lines to the event loop; the parent's end counts as a stop."""
    for line in sys.stdin:
        loop.call_soon_threadsafe(commands.put_nowait, json.loads(line))
    loop.call_soon_threadsafe(commands.put_nowait, {"stop": True})


async def _main() -> int:
    first = json.loads(sys.stdin.readline())
    commands: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_read_commands, args=(commands, loop), daemon=True).start()
    try:
        await work(RunSpec.from_json(first["spec"]), first["worker"], _emit, commands)
    except RequestFailedError as error:
        cause = error.__cause__
        message = str(cause) if isinstance(cause, GptjetError) else error.status
        _emit("error", {"message": f"the warm-up failed: {message}"})
        return 1
    except (WorkloadError, OSError) as error:
        _emit("error", {"message": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    code = asyncio.run(_main())
    sys.stdout.flush()
    # The thread still waits for the parent's next line; it holds nothing that must be closed.
    sys.exit(code)
