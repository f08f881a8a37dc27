"""What is run, in order. A stage is one process, so that nothing it breaks reaches the next."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

# The lengths of issue 3; the published experiment's are in benchmarks/configs.
CELLS = ((50, 50), (50, 200), (1000, 50), (1000, 200))
TINY_CELLS = ((5, 4), (20, 8))
_MEASURE = "gptjet.service.backends.measure"


@dataclass(frozen=True, slots=True)
class Stage:
    """One process of the evidence: its command, and how long it may take."""

    name: str
    command: tuple[str, ...]
    timeout_s: float


def plan_stages(
    *, device: str, tiny: bool, repeats: int, timeout_s: float, python: str = sys.executable
) -> tuple[Stage, ...]:
    """The stages for GPT-J-6B's geometry, or (`tiny`) for one that a CPU does in seconds."""
    geometry = "tiny" if tiny else "gpt-j-6b"
    cells = ",".join(f"{i}:{o}" for i, o in (TINY_CELLS if tiny else CELLS))
    common = ("--geometry", geometry, "--device", device, "--repeats", str(repeats))

    def stage(name: str, backend: str, *more: str) -> Stage:
        command = (python, "-m", _MEASURE, "--backend", backend, *common, *more)
        return Stage(name, command, timeout_s)

    return (
        stage("deepspeed-parity", "deepspeed"),
        stage("huggingface-latency", "huggingface", "--cells", cells),
        stage("deepspeed-latency", "deepspeed", "--cells", cells),
    )


def summarize(records: Iterable[Mapping[str, Any]]) -> list[Record]:
    """One row an (input, output) cell: medians of each backend, and how much faster DeepSpeed is.

    ms and tokens/s; a value is absent where its backend gave none. Records stay in the result file,
    so any other statistic can be made from it.
    """
    rows: dict[tuple[int, int], Record] = {}
    for record in records:
        if record.get("kind") != "cell":
            continue
        key = (record["input_tokens"], record["output_tokens"])
        row = rows.setdefault(key, {"input_tokens": key[0], "output_tokens": key[1]})
        name = record["backend"]
        row[f"{name}_ttft_ms"] = round(statistics.median(record["ttft_ms"]), 3)
        row[f"{name}_itl_ms"] = round(
            statistics.median([ms for run in record["itl_ms"] for ms in run]), 4
        )
        row[f"{name}_tokens_per_s"] = round(statistics.median(record["tokens_per_s"]), 3)
    for row in rows.values():
        fast, base = row.get("deepspeed_tokens_per_s"), row.get("huggingface_tokens_per_s")
        if fast and base:
            row["speed_up"] = round(fast / base, 3)
    return [rows[key] for key in sorted(rows)]


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The summary for a terminal; "-" where there is no value."""
    names = (
        ("input_tokens", "in"),
        ("output_tokens", "out"),
        ("huggingface_ttft_ms", "HF TTFT ms"),
        ("huggingface_tokens_per_s", "HF tok/s"),
        ("deepspeed_ttft_ms", "DS TTFT ms"),
        ("deepspeed_tokens_per_s", "DS tok/s"),
        ("speed_up", "DS / HF"),
    )
    lines = ["  ".join(f"{title:>10}" for _, title in names)]
    lines += ["  ".join(f"{row.get(name, '-')!s:>10}" for name, _ in names) for row in rows]
    return "\n".join(lines)
