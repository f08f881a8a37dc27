"""Times a ModelRunner as the engine drives it: a step is launched before the last one's ids are
read, and a token counts once its id is in host memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gptjet.kernels.batch import BLOCK_SIZE, SamplingBatch
from gptjet.service.backends.fused.runner import ModelRunner, Segment

Record = dict[str, Any]

_SEED = 6
_PROFILED_ROWS = 25


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences that decode together, each on blocks of its own."""

    tables: tuple[list[int], ...]

    @classmethod
    def allocate(cls, count: int, max_tokens: int) -> Rows:
        """Blocks for `count` sequences of up to `max_tokens` tokens, none of them in order."""
        each = -(-max_tokens // BLOCK_SIZE)
        order = np.random.default_rng(_SEED).permutation(count * each)
        return cls(tuple(part.tolist() for part in order.reshape(count, each)))

    @property
    def num_blocks(self) -> int:
        """Of all of them."""
        return sum(len(table) for table in self.tables)


def prompt_of(vocab_size: int, length: int) -> list[int]:
    """The same arbitrary ids every time."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()


def time_request(
    runner: ModelRunner, table: Sequence[int], prompt: Sequence[int], output_tokens: int
) -> list[float]:
    """A request alone, greedy: ms to the first token, then between tokens."""
    start = time.perf_counter()
    logits = runner.run(_chunks(prompt, table, runner.max_tokens))
    token = int(logits[-1].argmax())
    now = time.perf_counter()
    first_ms = 1000 * (now - start)
    positions = [len(prompt)]
    return [first_ms, *time_steps(runner, [token], positions, [table], output_tokens - 1)]


def time_steps(
    runner: ModelRunner,
    token_ids: Sequence[int],
    positions: Sequence[int],
    tables: Sequence[Sequence[int]],
    steps: int,
) -> list[float]:
    """Greedy decode steps of some sequences: ms from one step's ids on the host to the next's."""
    count = len(token_ids)
    chained = np.arange(count, dtype=np.int32)
    known = np.full(count, -1, np.int32)
    times_ms, in_flight = [], None
    start = time.perf_counter()
    for step in range(steps + 1):
        launched = None
        if step < steps:
            launched = runner.decode_and_sample(
                token_ids,
                [position + step for position in positions],
                tables,
                _greedy(known if step == 0 else chained),
            )
        if in_flight is not None:
            if -1 in in_flight.wait():
                raise RuntimeError("the logits of a timed step were not finite")
            now = time.perf_counter()
            times_ms.append(1000 * (now - start))
            start = now
        in_flight = launched
    return times_ms


def profile_steps(
    runner: ModelRunner, table: Sequence[int], position: int, steps: int
) -> list[Record]:
    """Where a decode step's time goes: microseconds a step by kernel (by operation on a CPU)."""
    from torch.profiler import ProfilerActivity, profile

    device = runner.kv_cache.device
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if is_cuda else [ProfilerActivity.CPU]
    time_steps(runner, [0], [position], [table], steps)
    with profile(activities=activities) as profiler:
        times_ms = time_steps(runner, [0], [position], [table], steps)
        if is_cuda:
            torch.cuda.synchronize(device)
    rows = []
    for event in profiler.key_averages():
        total = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if total > 0:
            rows.append((float(total) / steps, event.count / steps, str(event.key)))
    rows.sort(reverse=True)
    step_us = 1000 * statistics.median(times_ms)
    records: list[Record] = [
        {
            "kind": "profile_step",
            "steps": steps,
            "step_us": round(step_us, 2),
            "busy_us": round(sum(row[0] for row in rows), 2),
            "clock": "device" if is_cuda else "cpu",
        }
    ]
    records += [
        {"kind": "profile", "name": name[:100], "us": round(us, 3), "calls": round(calls, 2)}
        for us, calls, name in rows[:_PROFILED_ROWS]
    ]
    return records


def _chunks(prompt: Sequence[int], table: Sequence[int], most: int) -> list[Segment]:
    """A prompt cut every `most` tokens; the logits are wanted of its last token alone."""
    return [
        Segment(prompt[first : first + most], first, table, wanted=int(first + most >= len(prompt)))
        for first in range(0, len(prompt), most)
    ]


def _greedy(sources: np.ndarray[Any, np.dtype[np.int32]]) -> SamplingBatch:
    count = len(sources)
    return SamplingBatch(
        sources=sources,
        temperature=np.zeros(count),
        top_k=np.zeros(count, np.int64),
        top_p=np.ones(count),
        min_p=np.zeros(count),
        seed=np.zeros(count, np.uint64),
        index=np.zeros(count, np.int64),
        position=np.zeros(count, np.int64),
    )
