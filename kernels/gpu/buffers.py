"""Where the row pass reads its indices: buffers that live as long as the model, filled by one copy.

A CUDA graph replays addresses, so everything that changes from step to step must be in memory that
does not move. All of it is one int32 buffer, so a step costs one transfer; floats are in it by
their bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gptjet.kernels.batch import ForwardBatch, SamplingBatch

PADDING = -1
"""Position of a row that is none: kernels write no KV for it."""

# One array each of `max_rows` words, in this order, before the block tables.
_FIELDS = (
    "token_ids",
    "sources",
    "positions",
    "sequence_index",
    "temperature",
    "top_k",
    "top_p",
    "seed_low",
    "seed_high",
    "stream_index",
    "draw_position",
)
_FLOATS = ("temperature", "top_p")


@dataclass(frozen=True, slots=True)
class RowInputs:
    """Views of the device's buffer for one bucket of T rows.

    token_ids       [T] int32, of rows whose `sources` is -1
    sources         [T] int32, row of the pass before whose sampled id this row computes, or -1
    positions       [T] int32, PADDING in rows that are none
    sequence_index  [T] int32
    block_tables    [T, W] int32
    temperature, top_p  [T] float32; top_k [T] int32: 0 and 1.0 leave a filter out, temperature 0 is
                    greedy
    seed_low, seed_high, stream_index, draw_position  [T] int32, words of the random stream
    """

    token_ids: torch.Tensor
    sources: torch.Tensor
    positions: torch.Tensor
    sequence_index: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seed_low: torch.Tensor
    seed_high: torch.Tensor
    stream_index: torch.Tensor
    draw_position: torch.Tensor
    block_tables: torch.Tensor


class Transfers(Protocol):
    """How host and device exchange bytes without waiting for each other."""

    def host_buffer(self, words: int) -> torch.Tensor:
        """[words] int32 zeros on the host, that a transfer may read while the host goes on."""
        ...

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Transfer:
        """Begin a copy; whatever is launched afterwards sees it done."""
        ...


class Transfer(Protocol):
    """A copy on its way."""

    def wait(self) -> None:
        """Return once it is done."""
        ...


class CpuTransfers:
    """Host and device are the same: copies are done at once."""

    def host_buffer(self, words: int) -> torch.Tensor:
        """See Transfers."""
        return torch.zeros(words, dtype=torch.int32)

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Transfer:
        """See Transfers."""
        target.copy_(source)
        return _DONE


class _Done:
    def wait(self) -> None:
        """Nothing to wait for."""


_DONE = _Done()


class CudaTransfers:
    """Pinned memory and the current stream; a transfer is waited for by its event."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def host_buffer(self, words: int) -> torch.Tensor:
        """See Transfers."""
        return torch.zeros(words, dtype=torch.int32, pin_memory=True)

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Transfer:
        """See Transfers."""
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return _CudaTransfer(event)


class _CudaTransfer:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class RowBuffers:
    """The buffer on the device, and two on the host that take turns.

    Two, because the host writes the next step while the copy of the last one may still be going.
    """

    def __init__(
        self, max_rows: int, table_width: int, device: torch.device, transfers: Transfers
    ) -> None:
        self._max_rows, self._width = max_rows, table_width
        words = max_rows * (len(_FIELDS) + table_width)
        self._transfers = transfers
        self._device = torch.zeros(words, dtype=torch.int32, device=device)
        self._hosts = [_Host(transfers.host_buffer(words), max_rows, table_width) for _ in "ab"]
        self._turn = 0

    def views(self, bucket: int) -> RowInputs:
        """The device's buffer as a pass of `bucket` rows reads it. The same memory every time."""
        rows = self._max_rows
        arrays = {
            name: self._device[index * rows : index * rows + bucket]
            for index, name in enumerate(_FIELDS)
        }
        for name in _FLOATS:
            arrays[name] = arrays[name].view(torch.float32)
        first = len(_FIELDS) * rows
        tables = self._device[first : first + bucket * self._width].view(bucket, self._width)
        return RowInputs(**arrays, block_tables=tables)

    def fill(self, batch: ForwardBatch, bucket: int, sampling: SamplingBatch | None = None) -> None:
        """Send the rows of a batch, and PADDING up to `bucket` rows, in one copy.

        Waits for nothing but the copy before the last one, which is long done.
        """
        host = self._hosts[self._turn]
        self._turn = 1 - self._turn
        if host.transfer is not None:
            host.transfer.wait()
        host.write(batch, bucket, sampling)
        words = len(_FIELDS) * self._max_rows + bucket * self._width
        host.transfer = self._transfers.start(self._device[:words], host.words[:words])


class _Host:
    """One of the two buffers on the host, with the fields as numpy sees them."""

    def __init__(self, words: torch.Tensor, max_rows: int, table_width: int) -> None:
        self.words = words
        self.transfer: Transfer | None = None
        array = words.numpy()
        fields: dict[str, NDArray[np.generic]] = {}
        for index, name in enumerate(_FIELDS):
            field = array[index * max_rows : (index + 1) * max_rows]
            fields[name] = field.view(np.float32) if name in _FLOATS else field
        self._fields = fields
        self._tables = array[len(_FIELDS) * max_rows :].reshape(max_rows, table_width)

    def write(self, batch: ForwardBatch, bucket: int, sampling: SamplingBatch | None) -> None:
        rows = batch.token_ids.shape[0]
        self._put("token_ids", batch.token_ids.numpy(), rows, bucket, 0)
        self._put("positions", batch.positions.numpy(), rows, bucket, PADDING)
        self._put("sequence_index", batch.sequence_index.numpy(), rows, bucket, 0)
        sequences, width = batch.block_tables.shape
        # The tables of padding rows stay as they are: nothing reads them.
        self._tables[:sequences, :width] = batch.block_tables.numpy()
        if sampling is None:
            self._put("sources", -1, rows, bucket, -1)
            self._put("temperature", 0.0, rows, bucket, 0.0)
            return
        self._put("sources", sampling.sources, rows, bucket, -1)
        for name, value, padding in _sampling_fields(sampling):
            self._put(name, value, rows, bucket, padding)

    def _put(
        self, name: str, value: NDArray[np.generic] | float, rows: int, bucket: int, padding: float
    ) -> None:
        field = self._fields[name]
        field[:rows] = value
        field[rows:bucket] = padding


def _sampling_fields(
    sampling: SamplingBatch,
) -> Iterable[tuple[str, NDArray[np.generic], float]]:
    seed = sampling.seed
    yield "temperature", sampling.temperature, 0.0
    yield "top_k", sampling.top_k, 0
    yield "top_p", sampling.top_p, 1.0
    yield "seed_low", (seed & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32), 0
    yield "seed_high", (seed >> np.uint64(32)).astype(np.uint32).view(np.int32), 0
    yield "stream_index", sampling.stream_index, 0
    yield "draw_position", sampling.draw_position, 0
