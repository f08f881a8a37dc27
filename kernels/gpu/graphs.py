"""A pass recorded once for each number of rows, and replayed: CUDA graphs per batch bucket.

A decode step is some two hundred launches, and the host takes longer over them than a card over the
weights of a small model. A graph is one launch. It replays addresses and shapes, so there is one
for each bucket of rows, over buffers that do not move, and a batch is padded up to its bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch

Launch: TypeAlias = Callable[[], None]

# A graph's own memory: nodes and their arguments (some 200 launches of under 4 KiB), what torch
# operations allocate between two of them, and the workspace that cuBLAS takes on a stream.
_BYTES_PER_GRAPH = 4 << 20
_WORKSPACE_BYTES = 64 << 20


class CaptureError(Exception):
    """A pass could not be recorded; the message says why, in one line."""


class Recorder(Protocol):
    """What records a launch for replaying."""

    def record(self, launch: Launch) -> Launch:
        """Run `launch` once, then record it; returns what replays it. Raises CaptureError."""
        ...


class CudaRecorder:
    """Records into CUDA graphs that share one memory pool, since no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, launch: Launch) -> Launch:
        """See Recorder. The first run compiles, loads modules and grows buffers: all of which a
        capture would not survive."""
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                launch()
            current.wait_stream(self._stream)
            torch.cuda.synchronize(self._device)
            # "thread_local": another thread's allocation is no part of this capture.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                launch()
        except Exception as error:
            # A sticky error of the device shows here too, and then in the next eager launch.
            message = " ".join(str(error).split())
            raise CaptureError(f"{type(error).__name__}: {message}") from error
        return graph.replay


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `max_rows` itself, ascending."""
    buckets = [1]
    while buckets[-1] < max_rows:
        buckets.append(min(2 * buckets[-1], max_rows))
    return tuple(buckets)


def bucket_for(rows: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `rows` rows; raises ValueError beyond the largest."""
    for bucket in buckets:
        if rows <= bucket:
            return bucket
    raise ValueError(f"{rows} rows do not fit the largest bucket of {buckets[-1]}")


def reserved_bytes(num_graphs: int) -> int:
    """Memory to leave free for so many graphs, before the KV cache takes what there is."""
    return _WORKSPACE_BYTES + num_graphs * _BYTES_PER_GRAPH if num_graphs else 0


class BucketedPass:
    """One pass over fixed buffers: launched, or replayed for the buckets that are recorded."""

    def __init__(self, launch: Callable[[int], None]) -> None:
        """`launch(bucket)` launches the pass over the first `bucket` rows of the buffers."""
        self._launch = launch
        self._replays: dict[int, Launch] = {}

    @property
    def recorded(self) -> tuple[int, ...]:
        """The buckets that are replayed."""
        return tuple(sorted(self._replays))

    def record(self, bucket: int, recorder: Recorder) -> None:
        """Record one bucket. Raises CaptureError, and launches that bucket as before."""
        self._replays.pop(bucket, None)
        self._replays[bucket] = recorder.record(lambda: self._launch(bucket))

    def forget(self) -> None:
        """Launch every bucket from now on; gives the graphs' memory back."""
        self._replays.clear()

    def run(self, bucket: int, *, replay: bool = True) -> None:
        """Do the pass; returns before the device has. `replay=False` launches it in any case."""
        recorded = self._replays.get(bucket) if replay else None
        if recorded is None:
            self._launch(bucket)
        else:
            recorded()
