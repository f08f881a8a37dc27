"""Which way a weight pass goes: the table's boundaries, what it refuses, and Matmul's use of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gptjet.kernels import reference
from gptjet.kernels.gpu import matmul, model
from gptjet.kernels.gpu.gemv_launch import align_rows
from gptjet.kernels.gpu.matmul import Matmul
from gptjet.kernels.gpu.operations import Operations, reference_operations, triton_operations
from gptjet.kernels.gpu.routes import Route, RouteError, max_gemv_rows, read_routes, route_of
from gptjet.kernels.weights import DenseWeight, Weight, quantize_int4, quantize_int8

ENTRY = {
    "capability": "80",
    "weight_type": '"int8"',
    "max_gemv_rows": "8",
    "dot_rows": "[9, 64]",
    "source": '"measured on H100"',
}
KINDS = ("float16", "int8", "int4")


def make(kind: str, n: int = 24, k: int = 64, group: int = 64) -> Weight:
    generator = torch.Generator().manual_seed(n + k)
    values = torch.randn(n, k, generator=generator) * k**-0.5
    bias = torch.randn(n, generator=generator)
    if kind == "int8":
        return align_rows(quantize_int8(values, bias))
    if kind == "int4":
        return align_rows(quantize_int4(values, bias, group))
    return DenseWeight(values.half(), bias)


def written(tmp_path: Path, *entries: dict[str, str]) -> Path:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.toml"
    lines = ["[[route]]\n" + "".join(f"{k} = {v}\n" for k, v in one.items()) for one in entries]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_route_divides_rows_at_its_boundaries(tmp_path: Path) -> None:
    (route,) = read_routes(written(tmp_path, {**ENTRY, "dot_rows": "[17, 64]"}))
    assert route == Route(80, "int8", 8, "measured on H100", (17, 64))
    ways = {rows: route.way(rows) for rows in (1, 8, 9, 16, 17, 64, 65, 4096)}
    assert ways == {
        1: "gemv",
        8: "gemv",
        9: "cublas",
        16: "cublas",
        17: "dot",
        64: "dot",
        65: "cublas",
        4096: "cublas",
    }
    never = replace(route, dot_rows=None)
    assert {never.way(rows) for rows in range(9, 200)} == {"cublas"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"capability": "75"},
            r"route\[0\]: dot_rows of int8 on sm_75: dot_linear needs sm_80 or newer",
        ),
        ({"dot_rows": "[8, 64]"}, r"beyond max_gemv_rows = 8, not \[8, 64\]"),
        ({"dot_rows": "[65, 64]"}, r"dot_rows must be \[first, last\] .*, not \[65, 64\]"),
        ({"dot_rows": "[9]"}, r"dot_rows must be \[first, last\], not \[9\]"),
        ({"dot_rows": "9"}, r"dot_rows must be \[first, last\], not 9"),
        ({"dot_rows": "[9, 64.5]"}, "dot_rows must be"),
        ({"source": '"a guess"'}, 'source must be "modelled" or "measured on <card>"'),
        ({"weight_type": '"fp16"'}, "weight_type must be one of float16, int8, int4, not 'fp16'"),
        ({"max_gemv_rows": "true"}, "max_gemv_rows must be an integer, not True"),
        ({"dots": "1"}, "unknown key 'dots'"),
    ],
)
def test_a_broken_route_is_named(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_routes(written(tmp_path, {**ENTRY, **changes}))


@pytest.mark.parametrize("key", ["capability", "weight_type", "max_gemv_rows", "source"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    entry = {name: value for name, value in ENTRY.items() if name != key}
    with pytest.raises(RouteError, match=f"{key} is missing"):
        read_routes(written(tmp_path, entry))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "routes.toml"
    path.write_text("[[route]", encoding="utf-8")
    with pytest.raises(RouteError, match=r"routes\.toml"):
        read_routes(path)


def test_a_card_takes_the_newest_entry_that_is_not_newer_than_itself() -> None:
    with pytest.raises(RouteError, match="no route for int8 weights on sm_60"):
        route_of(make("int8"), 60)
    for capability in (70, 75):
        for kind in KINDS:
            assert route_of(make(kind), capability).dot_rows is None, "no tl.dot below sm_80"
    for capability in (80, 86, 89, 90, 120):
        assert route_of(make("int4"), capability).way(32) == "dot"
        assert route_of(make("float16"), capability).way(32) == "cublas"
        assert max_gemv_rows(make("float16"), capability) == 8


class Counting:
    """Operations that note which of them were called, with how many rows."""

    def __init__(self, operations: Operations) -> None:
        self.calls: list[tuple[str, int]] = []

        def dot_linear(x: torch.Tensor, *rest: Any, **options: Any) -> None:
            self.calls.append(("dot", x.shape[0]))
            operations.dot_linear(x, *rest, **options)

        def dequantize_rows(weight: Any, start: int, stop: int, out: torch.Tensor) -> None:
            self.calls.append(("tile", stop - start))
            operations.dequantize_rows(weight, start, stop, out)

        self.operations = replace(
            operations, dot_linear=dot_linear, dequantize_rows=dequantize_rows
        )


def passes(by: Matmul, weight: Weight, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm_linear [T, N] float16, gelu_linear_residual [T, N] float32) of random rows."""
    n, k = weight.shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, k, generator=generator)
    gain, offset = 1 + torch.randn(2, k, generator=generator) / 4
    out = torch.full((rows, n), torch.nan, dtype=torch.float16)
    by.layer_norm_linear(x, gain, offset, 1e-5, weight, out)
    residual = torch.randn(rows, n, generator=generator)
    width = k // 4
    by.gelu_linear_residual(residual, x[:, :width].half(), x[:, width:].half(), weight)
    return out, residual


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_go_the_way_of_their_route(kind: str) -> None:
    weight = make(kind)
    first, last = route_of(weight, 90).dot_rows or (0, 0)
    counting = Counting(reference_operations())
    by = Matmul(counting.operations, [weight], torch.device("cpu"), capability=90)
    for rows, way in ((first, "dot"), (last, "dot"), (last + 1, "tile"), (9, "dot")):
        counting.calls.clear()
        passes(by, weight, rows)
        assert {name for name, _ in counting.calls} == {way}, rows
        assert len(counting.calls) == 2
    below = Matmul(counting.operations, [weight], torch.device("cpu"), capability=75)
    counting.calls.clear()
    passes(below, weight, 33)
    assert {name for name, _ in counting.calls} == {"tile"}


def test_a_number_of_rows_that_is_given_comes_before_the_routes() -> None:
    weight = make("int8")
    counting = Counting(reference_operations())
    for most, rows, way in ((0, 33, "tile"), (100, 100, "dot"), (100, 101, "tile")):
        by = Matmul(
            counting.operations, [weight], torch.device("cpu"), capability=90, dot_rows=most
        )
        counting.calls.clear()
        passes(by, weight, rows)
        assert {name for name, _ in counting.calls} == {way}


def test_groups_that_dot_linear_does_not_take_go_to_cublas() -> None:
    weight = make("int4", group=32)
    counting = Counting(reference_operations())
    by = Matmul(counting.operations, [weight], torch.device("cpu"), capability=90)
    passes(by, weight, 33)
    assert {name for name, _ in counting.calls} == {"tile"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_computes_what_cublas_does_and_the_reference(kind: str) -> None:
    weight, rows = make(kind, 24, 96), 17
    ways = {}
    for name, most in (("dot", 64), ("cublas", 0)):
        counting = Counting(triton_operations())
        cpu = torch.device("cpu")
        by = Matmul(counting.operations, [weight], cpu, capability=80, dot_rows=most)
        ways[name] = passes(by, weight, rows)
        assert (("dot", rows) in counting.calls) == (name == "dot")
    exact = Matmul(reference_operations(), [], cpu, dot_rows=0)
    exact.linear = reference.linear  # type: ignore[method-assign, assignment]
    expected = passes(exact, weight, rows)
    for dot, cublas, want in zip(ways["dot"], ways["cublas"], expected, strict=True):
        limit = 2e-3 * float(want.abs().max())
        assert float((dot.float() - want.float()).abs().max()) <= limit
        assert float((dot.float() - cublas.float()).abs().max()) <= 2 * limit


def test_a_model_of_a_newer_card_decodes_a_batch_through_dot_linear(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve sequences at once: GEMV twice over on a T4, one launch of dot_linear on an H100."""
    head, layers = small.random_weights("int8")
    batch = small.batch_of([([row], 0, [row]) for row in range(12)])
    logits = {}
    for capability in (75, 90):
        for module in (matmul, model):
            monkeypatch.setattr(module, "capability_of", lambda _, each=capability: each)
        counting = Counting(reference_operations())
        made = model.GpuModel(small.GEOMETRY, head, layers, counting.operations, max_rows=12)
        logits[capability] = made.forward(batch, small.kv_cache())
        is_dot = counting.calls == [("dot", 12)] * (2 * len(layers) + 1)
        assert is_dot if capability == 90 else not counting.calls
    limit = 5e-3 * float(logits[75].abs().max())
    assert float((logits[90] - logits[75]).abs().max()) <= limit


def test_every_kernel_of_many_rows_is_launched_before_a_prompt_needs_it(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (matmul, model):
        monkeypatch.setattr(module, "capability_of", lambda _: 90)
    head, layers = small.random_weights("int8")
    counting = Counting(reference_operations())
    made = model.GpuModel(small.GEOMETRY, head, layers, counting.operations, max_rows=8)
    made.launch_each(small.kv_cache())
    assert {rows for name, rows in counting.calls if name == "dot"} == {16, 32, 64}
    assert len([name for name, _ in counting.calls if name == "tile"]) == 3
    assert Matmul(reference_operations(), [], torch.device("cpu")).kinds_of_rows == (1,)


def test_the_buffers_are_made_once_and_counted() -> None:
    weight = make("int8", 8, 4096)
    by = Matmul(reference_operations(), [weight], torch.device("cpu"), capability=90)
    none = Matmul(reference_operations(), [weight], torch.device("cpu"), capability=75)
    # The tile of what goes to cuBLAS, and a float32 sum for each split, row and output.
    assert none.nbytes == 2 * 8 * 4096 + 4 + 4
    assert by.nbytes >= none.nbytes + 4 * 2 * 64 * 8
