"""The wall clock jumps while streams run: an hour on, a day back, to 2038 and beyond.

A small library before libc's (LD_PRELOAD) moves CLOCK_REALTIME of the server alone; see
clock_shim.c. Deadlines, timings and order must come from the monotonic clock.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from gptjet.benchmarks.chaos.scenario import Findings, Plan
from gptjet.benchmarks.chaos.server import ChaosServer
from gptjet.service.client import Client, DeadlineExceededError

_SHIM = Path(__file__).with_name("clock_shim.c")
_JUMPS_S = (3600, -86_400, 20 * 365 * 86_400, -10 * 365 * 86_400, 0)
_TOKENS, _DECODE_MS = 40, 10


def run(plan: Plan) -> Findings:
    """A stream across each jump: all its tokens, sane timings; a deadline is still kept."""
    found = Findings()
    with tempfile.TemporaryDirectory(prefix="gptjet-chaos-clock-") as name:
        folder = Path(name)
        shim = build_shim(folder)
        offset = folder / "offset"
        offset.write_bytes(struct.pack("<q", 0))
        server = ChaosServer(
            backend="mock",
            model=f"mock:decode_ms={_DECODE_MS}",
            environment={"LD_PRELOAD": str(shim), "CHAOS_CLOCK_OFFSET": str(offset)},
        )
        with server, Client(server.target, retry=None) as client:
            lengths, e2e_ms = [], []
            for jump in _JUMPS_S:
                plan.report(f"  wall clock {jump:+d} s")
                length, total = _stream_across(client, offset, jump)
                lengths.append(length)
                e2e_ms.append(round(total, 1))
            found.equal("tokens of each stream", lengths, [_TOKENS] * len(_JUMPS_S))
            least, most = _TOKENS * _DECODE_MS * 0.9, _TOKENS * _DECODE_MS * 10
            found.check(
                "end-to-end times the server reports",
                all(least <= value <= most for value in e2e_ms),
                f"{e2e_ms} ms",
                f"{least:g} to {most:g} ms",
            )
            found.equal("a deadline across a jump", _deadline_across(client, offset), True)
            moved = "2046" in server.log_text() or "2045" in server.log_text()
            found.check("the log shows that the clock did jump", moved, moved, True)
            found.equal("exit code", server.stop(), 0)
        found.figures = {"jumps_s": list(_JUMPS_S), "e2e_ms": e2e_ms}
    return found


def build_shim(folder: Path) -> Path:
    """Compile the shim. Raises RuntimeError where there is no C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise RuntimeError("a C compiler is needed to make the clock jump (set CC)")
    library = folder / "clock_shim.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(_SHIM), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def _stream_across(client: Client, offset: Path, jump: int) -> tuple[int, float]:
    """Tokens of a stream in whose middle the clock jumps, and the server's time for it in ms."""
    stream = client.generate_stream(
        (1, 2, 3), max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, ignore_eos=True
    )
    received = 0
    for chunk in stream:
        received += len(chunk.token_ids)
        if received == _TOKENS // 2:
            _jump(offset, jump)
    assert stream.summary is not None
    return received, stream.summary.timings.e2e_ms


def _deadline_across(client: Client, offset: Path) -> bool:
    """Whether a deadline of 0.4 s holds to within 0.4 s although the clock goes back a day."""
    started = time.monotonic()
    try:
        for index, _ in enumerate(
            client.generate_stream((1, 2), max_new_tokens=200, ignore_eos=True, timeout_s=0.4)
        ):
            if index == 2:
                _jump(offset, -86_400)
    except DeadlineExceededError:
        return 0.35 <= time.monotonic() - started <= 0.8
    finally:
        _jump(offset, 0)
    return False


def _jump(offset: Path, seconds: int) -> None:
    with offset.open("r+b") as file:
        file.write(struct.pack("<q", seconds))
