"""Where the row pass reads its indices: buffers that live as long as the model, filled by one copy.

A CUDA graph replays addresses, so everything that changes from step to step must be in memory that
does not move. All of it is one buffer, so a step costs one transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gptjet.kernels.batch import ForwardBatch, SamplingBatch

PADDING = -1
"""Position of a row that is none: kernels write no KV for it."""

# One array each of `max_rows` words, in this order; then the sampling parameters, 8 bytes each, a
# row after the other; then the block tables.
_FIELDS = ("token_ids", "sources", "positions", "sequence_index")
# As sampling.SamplingParameters.packed has them.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "index", "position")
_GREEDY = {"top_p": 1.0}
_SAMPLING_WORDS = 2 * len(_SAMPLING)
_BEFORE_TABLES = len(_FIELDS) + _SAMPLING_WORDS
# Rows are counted in fours, so that every array begins at a multiple of 16 bytes.
_ROWS_TOGETHER = 4


@dataclass(frozen=True, slots=True)
class RowInputs:
    """Views of the device's buffer for one bucket of T rows.

    token_ids       [T] int32, of rows whose `sources` is -1
    sources         [T] int32, row of the pass before whose sampled id this row computes, or -1
    positions       [T] int32, PADDING in rows that are none
    sequence_index  [T] int32
    block_tables    [T, W] int32
    sampling        [T, 7] int64, SamplingParameters.packed
    """

    token_ids: torch.Tensor
    sources: torch.Tensor
    positions: torch.Tensor
    sequence_index: torch.Tensor
    sampling: torch.Tensor
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
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return _CudaTransfer(event)


class _CudaTransfer:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


def transfers_for(device: torch.device) -> Transfers:
    """Pinned memory where the device is a card."""
    return CudaTransfers(device) if device.type == "cuda" else CpuTransfers()


class RowBuffers:
    """The buffer on the device, and two on the host that take turns.

    Two, because the host writes the next step while the copy of the last one may still be going.
    """

    def __init__(
        self, max_rows: int, table_width: int, device: torch.device, transfers: Transfers
    ) -> None:
        rows = -(-max_rows // _ROWS_TOGETHER) * _ROWS_TOGETHER
        self._max_rows, self._width = rows, table_width
        words = rows * (_BEFORE_TABLES + table_width)
        self._transfers = transfers
        self._device = torch.zeros(words, dtype=torch.int32, device=device)
        self._hosts = [_Host(transfers.host_buffer(words), rows, table_width) for _ in "ab"]
        self._turn = 0

    def views(self, bucket: int) -> RowInputs:
        """The device's buffer as a pass of `bucket` rows reads it. The same memory every time."""
        rows = self._max_rows
        arrays = {
            name: self._device[index * rows : index * rows + bucket]
            for index, name in enumerate(_FIELDS)
        }
        first, last = len(_FIELDS) * rows, _BEFORE_TABLES * rows
        packed = self._device[first:last].view(torch.int64).view(rows, len(_SAMPLING))
        first = last
        tables = self._device[first : first + bucket * self._width].view(bucket, self._width)
        return RowInputs(**arrays, sampling=packed[:bucket], block_tables=tables)

    def fill(self, batch: ForwardBatch, bucket: int, sampling: SamplingBatch | None = None) -> None:
        """Send the rows of a batch, and PADDING up to `bucket` rows, in one copy.

        Waits for nothing but the copy before the last one, which is long done.
        """
        host = self._hosts[self._turn]
        self._turn = 1 - self._turn
        if host.transfer is not None:
            host.transfer.wait()
        host.write(batch, bucket, sampling)
        words = _BEFORE_TABLES * self._max_rows + bucket * self._width
        host.transfer = self._transfers.start(self._device[:words], host.words[:words])


class _Host:
    """One of the two buffers on the host, with the fields as numpy sees them."""

    def __init__(self, words: torch.Tensor, max_rows: int, table_width: int) -> None:
        self.words = words
        self.transfer: Transfer | None = None
        array = words.numpy()
        self._fields = {
            name: array[index * max_rows : (index + 1) * max_rows]
            for index, name in enumerate(_FIELDS)
        }
        first, last = len(_FIELDS) * max_rows, _BEFORE_TABLES * max_rows
        packed = array[first:last].view(np.int64).reshape(max_rows, len(_SAMPLING))
        self._sampling = dict(zip(_SAMPLING, packed.T, strict=True))
        for name in ("temperature", "top_p", "min_p"):
            self._sampling[name] = self._sampling[name].view(np.float64)
        self._sampling["seed"] = self._sampling["seed"].view(np.uint64)
        self._tables = array[last:].reshape(max_rows, table_width)

    def write(self, batch: ForwardBatch, bucket: int, sampling: SamplingBatch | None) -> None:
        rows = batch.token_ids.shape[0]
        self._put("token_ids", batch.token_ids.numpy(), rows, bucket, 0)
        self._put("positions", batch.positions.numpy(), rows, bucket, PADDING)
        self._put("sequence_index", batch.sequence_index.numpy(), rows, bucket, 0)
        sequences, width = batch.block_tables.shape
        # The tables of padding rows stay as they are: nothing reads them.
        self._tables[:sequences, :width] = batch.block_tables.numpy()
        if sampling is None:
            self._fields["sources"][:bucket] = -1
            self._sampling["temperature"][:bucket] = 0.0
            return
        self._put("sources", sampling.sources, rows, bucket, -1)
        for name, field in self._sampling.items():
            field[:rows] = getattr(sampling, name)
            field[rows:bucket] = _GREEDY.get(name, 0)

    def _put(
        self, name: str, value: NDArray[np.int32], rows: int, bucket: int, padding: int
    ) -> None:
        field = self._fields[name]
        field[:rows] = value
        field[rows:bucket] = padding


class IdReader:
    """Brings sampled ids to the host, without waiting, into two buffers that take turns."""

    def __init__(self, max_rows: int, transfers: Transfers) -> None:
        self._transfers = transfers
        self._hosts = [transfers.host_buffer(max_rows) for _ in "ab"]
        self._count = 0

    def start(self, ids: torch.Tensor) -> SampledIds:
        """Begin to copy ids [T] int32 of the device.

        The one after the next reuses the buffer: read this one before.
        """
        host = self._hosts[self._count % 2][: ids.shape[0]]
        self._count += 1
        return SampledIds(self, self._count, host, self._transfers.start(host, ids))

    def is_current(self, number: int) -> bool:
        """Whether the buffer of the `number`-th copy still belongs to it."""
        return number > self._count - 2


class SampledIds:
    """Ids on their way to the host; for as long as no two others were started after them."""

    def __init__(
        self, reader: IdReader, number: int, host: torch.Tensor, transfer: Transfer
    ) -> None:
        self._reader, self._number, self._host, self._transfer = reader, number, host, transfer

    def wait(self) -> list[int]:
        """The ids [T]; -1 of a row whose logits were not usable. Raises RuntimeError too late."""
        if not self._reader.is_current(self._number):
            raise RuntimeError("two later steps have been launched: these ids are overwritten")
        self._transfer.wait()
        result: list[int] = self._host.tolist()
        return result
