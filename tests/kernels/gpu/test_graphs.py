"""Buckets of rows, the buffers that graphs replay over, and what is replayed when."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from gptjet.kernels.batch import SamplingBatch
from gptjet.kernels.gpu.buffers import PADDING, CpuTransfers, IdReader, RowBuffers
from gptjet.kernels.gpu.graphs import BucketedPass, CaptureError, bucket_for, row_buckets
from gptjet.kernels.gpu.model import GpuModel
from gptjet.kernels.gpu.operations import reference_operations


@pytest.mark.parametrize(
    ("max_rows", "buckets"),
    [(1, (1,)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (33, (1, 2, 4, 8, 16, 32, 33))],
)
def test_buckets_double_up_to_the_largest(max_rows: int, buckets: tuple[int, ...]) -> None:
    assert row_buckets(max_rows) == buckets
    for rows in range(1, max_rows + 1):
        chosen = bucket_for(rows, buckets)
        assert chosen >= rows
        assert all(bucket < rows for bucket in buckets if bucket < chosen)
    with pytest.raises(ValueError, match=f"{max_rows + 1} rows do not fit"):
        bucket_for(max_rows + 1, buckets)


def test_only_recorded_buckets_are_replayed_until_they_are_forgotten(small: ModuleType) -> None:
    launched: list[int] = []
    steps, recorder = BucketedPass(launched.append), small.CallingRecorder()
    steps.record(4, recorder)
    launched.clear()
    steps.run(2)
    assert recorder.num_replays == 0
    steps.run(4)
    assert (launched, recorder.num_replays, steps.recorded) == ([2, 4], 1, (4,))
    steps.forget()
    steps.run(4)
    assert (recorder.num_replays, steps.recorded) == (1, ())


class LateTransfers(CpuTransfers):
    """Copies nothing before it is waited for, or a step is launched."""

    def __init__(self) -> None:
        self.started: list[Any] = []

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        transfer = _Late(target, source)
        self.started.append(transfer)
        return transfer


class _Late:
    def __init__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.target, self.source, self.is_done = target, source, False

    def wait(self) -> None:
        if not self.is_done:
            self.target.copy_(self.source)
            self.carried = self.source.clone()
            self.is_done = True


def test_buffers_are_filled_by_one_copy_and_do_not_move(small: ModuleType) -> None:
    transfers = LateTransfers()
    buffers = RowBuffers(8, 5, torch.device("cpu"), transfers)
    before = buffers.views(4)
    buffers.fill(small.batch_of([([7], 3, [2]), ([8], 20, [4, 1]), ([9], 0, [6])]), 4)
    (transfer,) = transfers.started
    transfer.wait()
    after = buffers.views(4)
    for name in ("token_ids", "positions", "block_tables", "sampling"):
        assert getattr(before, name).data_ptr() == getattr(after, name).data_ptr()
    assert after.token_ids.tolist() == [7, 8, 9, 0]
    assert after.positions.tolist() == [3, 20, 0, PADDING]
    assert after.sequence_index.tolist() == [0, 1, 2, 0]
    assert after.sources.tolist() == [-1] * 4
    assert after.block_tables[:3, :2].tolist() == [[2, 0], [4, 1], [6, 0]]
    # Rows of an earlier, fuller batch are padding again.
    buffers.fill(small.batch_of([([1], 1, [0])]), 4)
    transfers.started[-1].wait()
    assert after.positions.tolist() == [1, PADDING, PADDING, PADDING]


def test_host_does_not_overwrite_what_is_still_being_copied(small: ModuleType) -> None:
    """A copy is late until somebody waits for it: by then it must still find its own step."""
    transfers = LateTransfers()
    buffers = RowBuffers(2, 5, torch.device("cpu"), transfers)
    view = buffers.views(1)
    for step in range(6):
        buffers.fill(small.batch_of([([step], step, [0])]), 1)
        assert sum(not transfer.is_done for transfer in transfers.started) <= 2
    seen = []
    for transfer in transfers.started:
        transfer.target.copy_(transfer.carried if transfer.is_done else transfer.source)
        seen.append((view.token_ids.item(), view.positions.item()))
    assert seen == [(step, step) for step in range(6)]


def test_sampling_parameters_arrive_as_the_kernel_reads_them(small: ModuleType) -> None:
    from gptjet.kernels.gpu.sampling import SamplingParameters

    buffers = RowBuffers(6, 5, torch.device("cpu"), CpuTransfers())
    seed = 0xFEDCBA9876543210
    sampling = SamplingBatch(
        sources=np.array([1, -1], np.int32),
        temperature=np.array([0.7, 0.0]),
        top_k=np.array([5, 0]),
        top_p=np.array([0.9, 1.0]),
        min_p=np.array([0.1, 0.0]),
        seed=np.array([seed, 3], np.uint64),
        index=np.array([2, 0]),
        position=np.array([11, 12]),
    )
    buffers.fill(small.batch_of([([7], 3, [2]), ([8], 4, [3])]), 4, sampling)
    view = buffers.views(4)
    assert view.sources.tolist() == [1, -1, -1, -1]
    assert view.sampling.data_ptr() % 16 == view.block_tables.data_ptr() % 16 == 0
    found = SamplingParameters(view.sampling)
    expected = SamplingParameters.allocate(4)
    expected.set_row(
        0, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=seed, index=2, position=11
    )
    expected.set_row(1, temperature=0.0, seed=3, position=12)
    assert torch.equal(found.packed, expected.packed)
    # A step without sampling leaves no source of the step before behind.
    buffers.fill(small.batch_of([([7], 3, [2])]), 4)
    assert view.sources.tolist() == [-1] * 4
    assert found.temperature.tolist() == [0.0] * 4


def test_ids_are_read_before_their_buffer_is_used_again() -> None:
    reader = IdReader(4, CpuTransfers())
    first, second = (reader.start(torch.tensor(ids, dtype=torch.int32)) for ids in ([1, 2], [3]))
    assert first.wait() == [1, 2]
    third = reader.start(torch.tensor([4, -1], dtype=torch.int32))
    assert (second.wait(), third.wait()) == ([3], [4, -1])
    with pytest.raises(RuntimeError, match="two later steps have been launched"):
        first.wait()


@pytest.fixture
def make_model(small: ModuleType) -> Callable[..., GpuModel]:
    def make(kind: str = "fp16", max_rows: int = 12) -> GpuModel:
        head, layers = small.random_weights(kind)
        return GpuModel(small.GEOMETRY, head, layers, reference_operations(), max_rows=max_rows)

    return make


def decode_batch(small: ModuleType, rows: int, start: int) -> Any:
    return small.batch_of([([5 * row + 1], start, [row, row + 12]) for row in range(rows)])


def test_recorded_passes_compute_what_launched_ones_do(
    small: ModuleType, make_model: Callable[..., GpuModel]
) -> None:
    launched, recorded, recorder = make_model(), make_model(), small.CallingRecorder()
    caches = [small.kv_cache() for _ in range(2)]
    done: list[int] = []
    recorded.capture(caches[1], recorder, done.append)
    assert done == [12, 8, 4, 2, 1]
    assert recorded.recorded_buckets == (1, 2, 4, 8, 12)
    caches[1].fill_(torch.nan)
    replays = recorder.num_replays
    assert replays == 5 * 4  # each was held to what is launched; three kinds of sampling
    for position in range(20):
        for rows in (1, 3, 12):
            batch = decode_batch(small, rows, position)
            one = launched.forward(batch, caches[0])
            other = recorded.forward(batch, caches[1])
            assert one.isfinite().all()
            assert torch.equal(one, other)
    assert recorder.num_replays == replays + 60


def test_another_kv_cache_is_never_given_to_a_graph(
    small: ModuleType, make_model: Callable[..., GpuModel]
) -> None:
    model, recorder = make_model(), small.CallingRecorder()
    model.capture(small.kv_cache(), recorder)
    replays = recorder.num_replays
    other = small.kv_cache()
    assert model.forward(decode_batch(small, 2, 0), other).isfinite().all()
    assert recorder.num_replays == replays
    assert other[:, :, :2, :, 0].isfinite().all()


@pytest.mark.parametrize("failing", [1, 3, 7])
def test_pass_that_cannot_be_recorded_is_launched(
    failing: int, small: ModuleType, make_model: Callable[..., GpuModel]
) -> None:
    model, recorder, cache = make_model(), small.CallingRecorder(), small.kv_cache()
    recorder.fails_at = failing
    with pytest.raises(CaptureError, match="switched off by a test"):
        model.capture(cache, recorder)
    assert model.recorded_buckets == ()
    assert model.forward(decode_batch(small, 3, 0), cache).isfinite().all()


def test_graph_that_replays_something_else_is_refused(
    small: ModuleType, make_model: Callable[..., GpuModel]
) -> None:
    model, recorder = make_model(), small.CallingRecorder()
    recorder.spoil = lambda: model._row_pass._buffers.logits.add_(1)
    with pytest.raises(CaptureError, match="graph of 12 rows does not replay what was launched"):
        model.capture(small.kv_cache(), recorder)
    assert model.recorded_buckets == ()


def test_cache_of_fewer_blocks_than_rows_can_be_captured(
    small: ModuleType, make_model: Callable[..., GpuModel]
) -> None:
    model = make_model()
    model.capture(small.kv_cache(num_blocks=3), small.CallingRecorder())
    assert model.recorded_buckets == model.buckets
