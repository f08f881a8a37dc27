"""SIGTERM under full load, and a second process that takes over the port: nothing may fail."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from gptjet.benchmarks.chaos.caller import read_counts
from gptjet.benchmarks.chaos.scenario import Findings, Plan
from gptjet.benchmarks.chaos.server import ChaosServer, free_port
from gptjet.benchmarks.server_process import environment_without_settings

_CALLERS, _UPGRADES = 8, 5


def run(plan: Plan) -> Findings:
    """Callers without a pause while servers replace each other on one port."""
    found = Findings()
    port, upgrades = free_port(), plan.count(_UPGRADES, least=1)
    codes: list[int | None] = []
    server = _server(port)
    target = f"127.0.0.1:{port}"
    callers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "gptjet.benchmarks.chaos.caller"),
                *("--target", target, "--callers", str(_CALLERS // 2)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment_without_settings(),
        )
        for _ in range(2)
    ]
    try:
        time.sleep(2.0)
        for index in range(upgrades):
            successor = _server(port)
            server.signal(signal.SIGTERM)
            codes.append(server.wait(60.0))
            server.kill()
            server = successor
            plan.report(f"  upgrade {index + 1} of {upgrades}: exit code {codes[-1]}")
            time.sleep(1.0)
        counts = [read_counts(caller) for caller in callers]
        held = server.wait_until_idle(10.0)
        codes.append(server.stop())
    finally:
        for caller in callers:
            caller.kill()
            caller.communicate()
        server.kill()
    requests = sum(count["OK"] for count in counts)
    failures: dict[str, int] = {}
    for count in counts:
        for end, number in count.items():
            if end != "OK":
                failures[end] = failures.get(end, 0) + number
    found.figures = {"upgrades": upgrades, "requests": requests, "failures": failures}
    found.equal("failed requests", failures, {})
    found.check("requests made", requests >= 50 * upgrades, requests, f"{50 * upgrades} or more")
    found.equal("exit codes", codes, [0] * (upgrades + 1))
    found.equal("held afterwards", sum(held.values()), 0)
    return found


def _server(port: int) -> ChaosServer:
    return ChaosServer(
        "--reuse-port",
        "--log-level=warning",
        backend="mock",
        model="mock:decode_ms=10",
        port=port,
    )
