"""KV blocks are copied as one would by hand, and the host neither waits nor allocates for it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptjet.kernels.gpu.block_copier import BlockCopier
from gptjet.kernels.gpu.buffers import CpuTransfers
from gptjet.kernels.gpu.copy_blocks import copy_blocks
from gptjet.kernels.gpu.model import GpuModel
from gptjet.kernels.gpu.operations import reference_operations, triton_operations
from gptjet.service.backends.fused.runner import ModelRunner

CPU = torch.device("cpu")


def cache_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(0))
    return values.to(dtype)


def by_hand(cache: torch.Tensor, copies: list[tuple[int, int]]) -> torch.Tensor:
    """All sources are read before any destination is written."""
    result = cache.clone()
    for source, destination in copies:
        result[:, :, destination] = cache[:, :, source]
    return result


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 2, 6, 1, 16, 64), torch.float16),
        ((1, 2, 6, 1, 17, 64), torch.int8),
        ((1, 2, 6, 3, 16, 96), torch.float16),  # 4,608 words: a whole chunk and a part
    ],
)
def test_kernel_copies_whole_blocks_and_nothing_else(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    cache = cache_of(shape, dtype)
    copies = [(5, 0), (2, 4), (5, 1)]
    expected = by_hand(cache, copies)
    copy_blocks(cache, torch.tensor(copies, dtype=torch.int32))
    assert torch.equal(cache, expected)


def test_cache_whose_blocks_are_not_words_is_refused() -> None:
    pairs = torch.tensor([[0, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        copy_blocks(torch.zeros(1, 1, 2, 1, 1, 3, dtype=torch.int8), pairs)
    with pytest.raises(ValueError, match="must be contiguous"):
        copy_blocks(torch.zeros(1, 1, 2, 1, 4, 4).transpose(4, 5), pairs)


@pytest.mark.parametrize(
    "copies",
    [
        pytest.param([(0, 3), (1, 4)], id="apart"),
        pytest.param([(0, 3), (1, 0)], id="a source that was freed is written after it is read"),
        pytest.param([(1, 0), (0, 3), (2, 1)], id="a chain, in any order"),
        pytest.param([(7, i) for i in range(8, 150)], id="more than the buffers hold"),
    ],
)
def test_sources_are_read_before_destinations_are_written(copies: list[tuple[int, int]]) -> None:
    cache = cache_of((1, 2, 150, 1, 2, 2), torch.float16)
    expected = by_hand(cache, copies)
    one_after_another = reference_operations().copy_blocks
    BlockCopier(one_after_another, CPU, CpuTransfers()).copy(cache, copies)
    assert torch.equal(cache, expected)


def test_blocks_that_would_change_places_are_refused() -> None:
    cache = cache_of((1, 1, 2, 1, 2, 2), torch.float16)
    with pytest.raises(ValueError, match="cannot change places"):
        BlockCopier(copy_blocks, CPU, CpuTransfers()).copy(cache, [(0, 1), (1, 0)])


class WatchedTransfers(CpuTransfers):
    """Says which transfers are waited for."""

    def __init__(self) -> None:
        self.num_started = 0
        self.waited_for: list[int] = []

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        super().start(target, source)
        self.num_started += 1
        return _Watched(self, self.num_started)


class _Watched:
    def __init__(self, transfers: WatchedTransfers, number: int) -> None:
        self._transfers, self._number = transfers, number

    def wait(self) -> None:
        self._transfers.waited_for.append(self._number)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_copies_wait_for_the_transfer_before_the_last_alone_and_allocate_nothing() -> None:
    transfers = WatchedTransfers()
    addresses: list[int] = []
    copier = BlockCopier(lambda _, pairs: addresses.append(pairs.data_ptr()), CPU, transfers)
    cache = cache_of((1, 1, 9, 1, 2, 2), torch.float16)
    with _Operations() as seen:
        for step in range(3):
            copier.copy(cache, [(step, 8)])
    assert (transfers.num_started, transfers.waited_for) == (3, [1])
    assert len(set(addresses)) == 1
    assert seen.names <= {"slice", "copy_"}


def test_runner_leaves_the_copy_to_a_gpu_model(small: ModuleType) -> None:
    head, layers = small.random_weights("float16")
    model = GpuModel(small.GEOMETRY, head, layers, triton_operations(), max_rows=2)
    cache = small.kv_cache().nan_to_num_()
    cache[:, :, 3] = 7
    runner = ModelRunner(model, small.GEOMETRY, cache, max_tokens=4, max_segments=2)
    with _Operations() as seen:
        runner.copy_blocks([(3, 0), (3, 5)])
        runner.copy_blocks([])
    assert "index_put_" not in seen.names
    assert bool((cache[:, :, [0, 5]] == 7).all())
    assert not bool(cache[:, :, 1].any())
    runner.close()
