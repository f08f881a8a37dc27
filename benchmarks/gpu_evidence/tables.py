"""What was measured beside the cells, for a terminal: batches, kernels, a step's profile."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_PROFILE_ROWS = 12


def batch_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Decode tokens/s by batch and weight type, and what launching costs without CUDA graphs."""
    rows = [record for record in records if record["kind"] == "decode"]
    if not rows:
        return ""
    batches = sorted({record["batch_size"] for record in rows})
    lines = [f"{'decode, tokens/s':<34}" + "".join(f"{f'batch {b}':>11}" for b in batches)]
    for backend in dict.fromkeys(record["backend"] for record in rows):
        for graphs in (True, False):
            mine = {
                record["batch_size"]: record["tokens_per_s"]
                for record in rows
                if record["backend"] == backend and record["graphs"] is graphs
            }
            if mine:
                title = f"{backend}, {'CUDA graphs' if graphs else 'launch by launch'}"
                cells = (f"{mine[b]:.1f}" if b in mine else "-" for b in batches)
                lines.append(f"{title:<34}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines + _launching(rows))


def _launching(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a backend whose first batch was timed both ways."""
    lines = []
    for record in rows:
        if record["graphs"]:
            continue
        twin = next(
            (
                other
                for other in rows
                if other["graphs"]
                and (other["backend"], other["batch_size"])
                == (record["backend"], record["batch_size"])
            ),
            None,
        )
        if twin is not None:
            added = statistics.median(record["step_ms"]) - statistics.median(twin["step_ms"])
            lines.append(
                f"{record['backend']}: a step of batch {record['batch_size']} takes {added:.3f} ms "
                f"more outside a CUDA graph"
            )
    return lines


def kernel_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Each kernel's time and its share of the copy bandwidth; a red one has neither."""
    rows = [record for record in records if record["kind"] == "kernel"]
    if not rows:
        return ""
    lines = [f"{'kernel':<64}{'us':>11}{'GB/s':>9}{'of copy':>9}"]
    for record in rows:
        title = f"{record['kernel']}, {record['case']}"
        if record["red"]:
            lines.append(f"{title:<64}{'red: not the reference':>29}")
        else:
            share = f"{100 * record['share_of_copy']:.1f} %"
            lines.append(f"{title:<64}{record['us']:>11.2f}{record['gb_s']:>9.1f}{share:>9}")
    for record in records:
        if record["kind"] == "launch_cost":
            lines.append(f"launch of {record['kernel']}: {record['host_us']:.2f} us of the host")
    return "\n".join(lines)


def profile_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Where a decode step's time goes."""
    rows = [record for record in records if record["kind"] == "profile"]
    whole = next((record for record in records if record["kind"] == "profile_step"), None)
    if whole is None:
        return ""
    lines = [
        f"one decode step: {whole['step_us']:.1f} us, of which the {whole['clock']} is busy "
        f"{whole['busy_us']:.1f} us"
    ]
    for record in rows[:_PROFILE_ROWS]:
        lines.append(f"{record['us']:>10.2f} us {record['calls']:>7.1f} x  {record['name'][:80]}")
    return "\n".join(lines)
