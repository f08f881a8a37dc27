"""The whole GPU model on a CPU: both ways through it, against the plain PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from gptjet.kernels.gpu import routes
from gptjet.kernels.gpu.gemv_launch import MAX_ROWS
from gptjet.kernels.gpu.model import GpuModel
from gptjet.kernels.gpu.operations import Operations, reference_operations
from gptjet.service.models.fused.forward import TorchModel

# Activations are rounded to float16 between the passes.
TOLERANCE = {"atol": 2e-2, "rtol": 0.0}


@pytest.fixture
def pair(small: ModuleType) -> Callable[..., tuple[GpuModel, TorchModel]]:
    """`pair(kind, max_rows)`: the GPU model over PyTorch references, and the plain model."""

    def make(
        kind: str = "fp16", max_rows: int = 12, operations: Operations | None = None
    ) -> tuple[GpuModel, TorchModel]:
        head, layers = small.random_weights(kind)
        operations = operations or reference_operations()
        model = GpuModel(small.GEOMETRY, head, layers, operations, max_rows=max_rows)
        return model, TorchModel(small.GEOMETRY, head, layers)

    return make


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 101, (length,), generator=generator).tolist()


@pytest.mark.parametrize("kind", ["fp16", "int8", "int4"])
def test_prompts_chunks_drafts_and_decodes_compute_what_the_plain_model_does(
    kind: str, small: ModuleType, pair: Callable[..., tuple[GpuModel, TorchModel]]
) -> None:
    model, plain = pair(kind)
    caches = small.kv_cache(), small.kv_cache().float()
    tables = [[3, 9, 1, 7], [11, 0, 4, 2], [5, 6, 8, 10]]
    first, second, third = prompt(33), prompt(50, 1), prompt(1, 2)
    passes: list[tuple[list[Any], bool]] = [
        ([(first, 0, tables[0]), (second[:20], 0, tables[1]), (third, 0, tables[2])], False),
        ([(second[20:37], 20, tables[1])], True),  # a chunk in the middle of a prompt
        ([(second[37:], 37, tables[1])], False),
        ([([4], 33, tables[0]), ([5], 50, tables[1]), ([6], 1, tables[2])], False),
        ([([1, 2, 3, 4], 34, tables[0]), ([5], 51, tables[1])], True),  # with drafts
    ]
    for segments, every_row in passes:
        batch = small.batch_of(segments, every_row=every_row)
        expected = plain.forward(batch, caches[1])
        torch.testing.assert_close(model.forward(batch, caches[0]), expected, **TOLERANCE)


def test_int8_kv_cache_is_read_and_written_on_both_ways(
    small: ModuleType, pair: Callable[..., tuple[GpuModel, TorchModel]]
) -> None:
    model, plain = pair()
    caches = small.kv_cache(is_int8=True), small.kv_cache().float()
    text = prompt(50)
    for ids, start in [(text[:20], 0), (text[20:49], 20), (text[49:], 49), ([7], 50)]:
        batch = small.batch_of([(ids, start, [3, 9, 1, 7])])
        expected = plain.forward(batch, caches[1])
        found = model.forward(batch, caches[0])
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.0)


def test_more_rows_than_kernels_take_compute_the_same(
    small: ModuleType, pair: Callable[..., tuple[GpuModel, TorchModel]]
) -> None:
    """Twelve rows: FP16 by one product, INT8 by the kernels in two parts of eight and four."""
    for kind in ("fp16", "int8"):
        model, plain = pair(kind)
        batch = small.batch_of([([7 * row], 0, [row]) for row in range(12)])
        expected = plain.forward(batch, small.kv_cache().float())
        torch.testing.assert_close(model.forward(batch, small.kv_cache()), expected, **TOLERANCE)


def test_weight_passes_go_the_way_that_the_routes_say(
    small: ModuleType, pair: Callable[..., tuple[GpuModel, TorchModel]]
) -> None:
    rows: list[int] = []
    plain = reference_operations()

    def counting(x: torch.Tensor, *arguments: Any, **options: Any) -> None:
        rows.append(x.shape[0])
        plain.layer_norm_linear(x, *arguments, **options)

    operations = replace(plain, layer_norm_linear=counting)
    for kind, expected in [("fp16", []), ("int8", [8, 8] * 3)]:
        model, _ = pair(kind, 16, operations)
        rows.clear()
        model.forward(small.batch_of([([row], 0, [row]) for row in range(16)]), small.kv_cache())
        assert rows == expected


def test_padding_rows_write_no_kv(
    small: ModuleType, pair: Callable[..., tuple[GpuModel, TorchModel]]
) -> None:
    model, _ = pair()
    cache = small.kv_cache()
    model.forward(small.batch_of([([1], 0, [2]), ([2], 0, [4]), ([3], 0, [6])]), cache)
    written = cache.isfinite().flatten(3).any(3)[0, 0]
    assert written.nonzero().flatten().tolist() == [2, 4, 6]


def test_logits_outlive_the_next_pass(
    small: ModuleType, pair: Callable[..., tuple[GpuModel, TorchModel]]
) -> None:
    model, _ = pair()
    cache = small.kv_cache()
    first = model.forward(small.batch_of([([1], 0, [2])]), cache)
    kept = first.clone()
    model.forward(small.batch_of([([9], 0, [3])]), cache)
    assert torch.equal(first, kept)


def test_pass_that_wants_no_logits_gets_none(
    small: ModuleType, pair: Callable[..., tuple[GpuModel, TorchModel]]
) -> None:
    model, _ = pair()
    for length in (3, 20):
        batch = small.batch_of([(prompt(length), 0, [2, 3])])
        nothing = replace(batch, logits_rows=batch.logits_rows[:0])
        assert model.forward(nothing, small.kv_cache()).shape == (0, 101)


def test_model_says_what_it_holds_and_gives_it_back(
    small: ModuleType, pair: Callable[..., tuple[GpuModel, TorchModel]]
) -> None:
    for kind, bytes_of_a_weight in [("fp16", 2), ("int8", 1), ("int4", 0.5)]:
        model, _ = pair(kind)
        weights = 2 * (64 * 288 + 64 * 160) + 64 * 101
        assert model.nbytes > weights * bytes_of_a_weight + 64 * 101 * 2
        assert model.reserved_bytes(100, graphs_wanted=True) > model.reserved_bytes(
            100, graphs_wanted=False
        )
        model.close()
        model.close()
        assert model.nbytes == 0
        with pytest.raises(ValueError, match="the model is closed"):
            model.forward(small.batch_of([([1], 0, [2])]), small.kv_cache())


def test_weights_that_the_kernels_do_not_compute_are_refused(small: ModuleType) -> None:
    head, layers = small.random_weights("fp16")
    with pytest.raises(ValueError, match="1 layers given, 2 expected"):
        GpuModel(small.GEOMETRY, head, layers[:1], reference_operations(), max_rows=8)
    wide = replace(head, lm_head=replace(head.lm_head, weight=head.lm_head.weight.float()))
    with pytest.raises(ValueError, match=r"float16 weights, not torch\.float32"):
        GpuModel(small.GEOMETRY, wide, layers, reference_operations(), max_rows=8)


def test_every_weight_type_has_a_route_on_every_card() -> None:
    for capability in (70, 75, 80, 86, 89, 90, 120):
        for kind in ("float16", "int8", "int4"):
            fitting = [
                route.max_gemv_rows
                for route in routes.load_routes()
                if route.weight_type == kind and route.capability <= capability
            ]
            assert fitting
            assert min(fitting) >= MAX_ROWS


def test_broken_routes_are_named(tmp_path: Any) -> None:
    file = tmp_path / "routes.toml"
    entry = '[[route]]\ncapability = 70\nweight_type = "int8"\nmax_gemv_rows = {}\n'
    entry += 'source = "modelled"\n'
    file.write_text(entry.format(0))
    with pytest.raises(ValueError, match="max_gemv_rows is 0"):
        routes.read_routes(file)
    file = tmp_path / "twice.toml"
    file.write_text(entry.format(8) * 2)
    with pytest.raises(ValueError, match="two routes for one capability"):
        routes.read_routes(file)
