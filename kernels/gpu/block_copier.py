"""Copies of KV blocks between two steps: their numbers reach the device without a wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gptjet.kernels.gpu.buffers import Transfer, Transfers
    from gptjet.kernels.gpu.operations import CopyBlocks

_MAX_PAIRS = 64


class BlockCopier:
    """One buffer on the device, and two on the host that take turns, as RowBuffers has them."""

    def __init__(self, copy: CopyBlocks, device: torch.device, transfers: Transfers) -> None:
        self._copy, self._transfers = copy, transfers
        self._device = torch.zeros(_MAX_PAIRS, 2, dtype=torch.int32, device=device)
        self._hosts = [transfers.host_buffer(2 * _MAX_PAIRS).view(_MAX_PAIRS, 2) for _ in "ab"]
        self._arrays = [host.numpy() for host in self._hosts]
        self._sent: list[Transfer | None] = [None, None]
        self._turn = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer on the device."""
        return self._device.nbytes

    def copy(self, kv_cache: torch.Tensor, copies: Sequence[tuple[int, int]]) -> None:
        """Copy (source, destination) blocks, all sources before any destination is written.

        Returns once everything is launched. It waits only for the transfer before the last one.
        Raises ValueError where blocks would have to change places.
        """
        for round_ in _rounds(copies):
            for first in range(0, len(round_), _MAX_PAIRS):
                part = round_[first : first + _MAX_PAIRS]
                turn, self._turn = self._turn, 1 - self._turn
                sent = self._sent[turn]
                if sent is not None:
                    sent.wait()
                self._arrays[turn][: len(part)] = part
                pairs = self._device[: len(part)]
                self._sent[turn] = self._transfers.start(pairs, self._hosts[turn][: len(part)])
                self._copy(kv_cache, pairs)


def _rounds(copies: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The copies in an order in which no block is written before it has been read.

    Within a round they may be made at once. Nearly always there is one: a block that is shared is
    read, and one that was free is written. A preemption in between may free what was read.
    """
    left = list(copies)
    while left:
        sources = {source for source, _ in left}
        now = [pair for pair in left if pair[1] not in sources]
        if not now:
            raise ValueError(f"blocks cannot change places: {left}")
        yield now
        left = [pair for pair in left if pair[1] in sources]
