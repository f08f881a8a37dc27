"""What is run, in order. A stage is one process, so that nothing it breaks reaches the next."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

# The lengths of issue 3; the published experiment's are in benchmarks/configs.
CELLS = ((50, 50), (50, 200), (1000, 50), (1000, 200))
TINY_CELLS = ((5, 4), (20, 8))
# One more of transformers alone: what 32 streams at once are compared with.
STREAM_CELL = (512, 128)
FUSED_CELLS = ((50, 200), (1000, 50))
BATCHES = (1, 2, 4, 8, 16, 32)
WEIGHT_TYPES = ("float16", "int8", "int4")

_MEASURE = "gptjet.service.backends.measure"
_STATIC = "gptjet.service.backends.measure_static"
_FUSED = "gptjet.service.backends.fused.measure"
_SERVING = "gptjet.service.measure_serving"
_KERNELS = "gptjet.benchmarks.gpu_evidence.kernel_measure"
# Parity of the kernels is nearly all compiling: so many processes at once, where there are cores.
_MOST_JOBS = 8


@dataclass(frozen=True, slots=True)
class Stage:
    """One process of the evidence: its command, and how long it may take.

    needs  subjects that a stage before must have proven: without, it is withheld, as the times of
           something that computes something else mean nothing
    """

    name: str
    command: tuple[str, ...]
    timeout_s: float
    needs: tuple[str, ...] = ()


def plan_stages(
    *,
    device: str,
    tiny: bool,
    repeats: int,
    timeout_s: float,
    python: str = sys.executable,
    cores: int | None = None,
) -> tuple[Stage, ...]:
    """The stages for GPT-J-6B's geometry, or (`tiny`) for one that a CPU does in seconds.

    Parity first, then what the bars ask for, then what explains it: a cut-off loses the least. A
    stage's own limit is what it should take twice over on a card; `timeout_s` is the most of any.
    """
    cores = cores or os.cpu_count() or 1
    jobs = 1 if tiny else max(1, min(_MOST_JOBS, cores // 2))
    on_device = ("--geometry", "tiny" if tiny else "gpt-j-6b", "--device", device)
    repeated = ("--repeats", str(repeats))
    cells = _as_flag(TINY_CELLS if tiny else (*CELLS, STREAM_CELL))
    short_cells = _as_flag(TINY_CELLS if tiny else CELLS)
    latency: tuple[str, ...]
    profile: tuple[str, ...] = ()
    if tiny:
        latency = ("--cells", "3:2", "--batches", "1,2", "--steps", "1", "--repeats", "1")
        serving = ("--streams", "2", "--lengths", "3:2", "--repeats", "1")
        profile = ("--steps", "1")
    else:
        batches = ",".join(map(str, BATCHES))
        latency = ("--cells", _as_flag(FUSED_CELLS), "--batches", batches, *repeated)
        lengths = f"{STREAM_CELL[0]}:{STREAM_CELL[1]}"
        serving = ("--streams", str(BATCHES[-1]), "--lengths", lengths, *repeated)

    def stage(name: str, limit_s: float, module: str, *more: str, needs: str = "") -> Stage:
        proofs = ("kernels/shared", f"kernels/{needs}", f"model/{needs}") if needs else ()
        command = (python, "-m", module, *more, *on_device)
        return Stage(name, command, timeout_s if tiny else min(limit_s, timeout_s), proofs)

    def fused(what: str, limit_s: float, *more: str) -> Iterator[Stage]:
        for weight_type in WEIGHT_TYPES:
            yield stage(
                f"fused-{what}-{weight_type}",
                limit_s,
                _FUSED,
                what,
                *("--weight-type", weight_type, *more),
                needs="" if what == "parity" else weight_type,
            )

    timed = ("--cells", short_cells, *repeated)
    return (
        stage("kernel-parity", 180, _KERNELS, "parity", "--jobs", str(jobs)),
        *fused("parity", 90),
        stage("kernel-speed", 120, _KERNELS, "speed"),
        *fused("latency", 100, *latency),
        stage("serving", 100, _SERVING, *serving, needs="float16"),
        stage(
            "huggingface-latency",
            150,
            _MEASURE,
            *("--backend", "huggingface", "--cells", cells, *repeated),
        ),
        # It proves itself to transformers before it is timed.
        stage("deepspeed-latency", 120, _MEASURE, "--backend", "deepspeed", *timed),
        stage("huggingface-static-latency", 150, _STATIC, "--cells", short_cells, *repeated),
        stage("profile", 60, _FUSED, "profile", *profile, needs="float16"),
    )


def _as_flag(cells: Iterable[tuple[int, int]]) -> str:
    return ",".join(f"{i}:{o}" for i, o in cells)


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
        ("huggingface-static_tokens_per_s", "HF comp."),
        ("fused-float16_ttft_ms", "FP16 TTFT"),
        ("fused-float16_tokens_per_s", "FP16 tok/s"),
        ("fused-int8_tokens_per_s", "INT8 tok/s"),
        ("fused-int4_tokens_per_s", "INT4 tok/s"),
        ("speed_up", "DS / HF"),
    )
    lines = ["  ".join(f"{title:>10}" for _, title in names)]
    lines += ["  ".join(f"{row.get(name, '-')!s:>10}" for name, _ in names) for row in rows]
    return "\n".join(lines)
