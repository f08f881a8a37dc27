"""Both weight passes through Triton's interpreter, beside float64 arithmetic on the same weights.

Outputs, workspaces and everything beyond the tensors are NaN (or the largest integer) before a
launch, so that what is read out of place, or not written, shows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from gptjet.kernels import reference
from gptjet.kernels.gpu.gelu_linear_residual import gelu_linear_residual
from gptjet.kernels.gpu.gemv_launch import Workspace, align_rows
from gptjet.kernels.gpu.layer_norm_linear import layer_norm_linear
from gptjet.kernels.gpu.tuning import Tile
from gptjet.kernels.weights import (
    DenseWeight,
    Int4Weight,
    Int8Weight,
    Weight,
    dequantize,
    quantize_int4,
    quantize_int8,
)

NAN = float("nan")
EPS = 1e-5
TYPES = ("fp16", "int8", "int4")


def guarded(values: torch.Tensor) -> torch.Tensor:
    """A view of the same values with 64 columns of poison behind each row and 2 rows around."""
    poison = NAN if values.is_floating_point() else torch.iinfo(values.dtype).max
    if values.dim() == 1:
        around = torch.full((values.shape[0] + 64,), poison, dtype=values.dtype)
        view = around[: values.shape[0]]
    else:
        rows, columns = values.shape
        padded = -(-columns // 16) * 16 + 64
        around = torch.full((rows + 2, padded), poison, dtype=values.dtype)
        view = around[1 : rows + 1, :columns]
    view.copy_(values)
    return view


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_weight(kind: str, n: int, k: int, *, bias: bool = True, group: int = 32) -> Weight:
    """Rows of very different size, some scales negative, poison between the rows."""
    rows = random(n, k, seed=n * k) * torch.logspace(-2, 1, n).unsqueeze(1)
    offset = guarded(random(n, seed=3)) if bias else None
    if kind == "fp16":
        return DenseWeight(guarded(rows.half()), offset)
    if kind == "int8":
        eight = quantize_int8(rows)
        signs = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
        return Int8Weight(guarded(eight.quantized), guarded(eight.scale * signs), offset)
    four = quantize_int4(rows, group=group)
    signs = torch.where(torch.arange(four.scale.shape[1]) % 2 == 0, -1.0, 1.0).half()
    return Int4Weight(guarded(four.packed), guarded(four.scale * signs), k, group, offset)


def small_tile(k: int, *, block_k: int = 64, **changes: int) -> Tile:
    """Small enough that a few outputs make several tiles, programs and splits."""
    options = {"block_n": 4, "num_warps": 4, "num_stages": 2, "tiles_per_program": 2, **changes}
    return Tile(block_k=block_k, split_k=-(-k // block_k), **options)


def poisoned_workspace(elements: int = 4096) -> Workspace:
    return Workspace(torch.full((elements,), NAN), torch.zeros(64, dtype=torch.int32))


def bound(
    x: torch.Tensor, weight: Weight, result: torch.Tensor, added: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """How far float32 sums in any order may be from `result`, [T, N].

    A sum of K products, in any order, errs by at most K u of the sum of their sizes (Higham,
    Accuracy and Stability, 2nd ed., 3.1, with u = 2^-24); the activations themselves, of which
    some are products of rounded statistics, by a few u more, and so do scale and bias. An output in
    float16 is rounded once more, by 2^-11 of it, or 2^-25 where it is subnormal.
    """
    values = dequantize(weight).double()
    unit = 2.0**-24
    sizes = x.abs() @ values.abs().T
    if weight.bias is not None:
        sizes = sizes + weight.bias.abs()
    rounded = 2.0**-11 * result.abs() + 2.0**-25
    return (x.shape[1] + 16) * unit * (sizes + added) + rounded


def exact_layer_norm_linear(
    x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor, weight: Weight
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed [T, K], result [T, N]) in float64."""
    normed = F.layer_norm(x.double(), (x.shape[1],), gain.double(), offset.double(), EPS)
    result = normed @ dequantize(weight).double().T
    return normed, result if weight.bias is None else result + weight.bias.double()


def check_layer_norm_linear(
    rows: int,
    weight: Weight,
    tile: Tile | None,
    *,
    dtype: torch.dtype = torch.float16,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    n, k = weight.shape
    x = guarded(random(rows, k, seed=1) * 3 + 1)
    gain, offset = guarded(1 + 0.3 * random(k, seed=2)), guarded(random(k, seed=4))
    around = torch.full((rows + 2, n + 5), NAN, dtype=dtype)
    out = around[1 : rows + 1, :n]
    layer_norm_linear(x, gain, offset, EPS, weight, out, workspace=workspace, tile=tile)
    normed, expected = exact_layer_norm_linear(x, gain, offset, weight)
    assert ((out.double() - expected).abs() <= bound(normed, weight, expected)).all()
    result = out.clone()
    around[1 : rows + 1, :n] = NAN
    assert around.isnan().all(), "written beyond the outputs"
    return result


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", range(1, 9))
def test_layer_norm_linear_of_1_to_8_rows(kind: str, rows: int) -> None:
    """N odd and not a multiple of the tile, K neither of the tile nor of the group."""
    check_layer_norm_linear(rows, make_weight(kind, 11, 56), small_tile(56))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("k", [1, 31, 33, 64, 130, 257])
def test_layer_norm_linear_of_any_number_of_features(kind: str, k: int) -> None:
    """A split for each 64 features; the last one is short, and so is its INT4 group."""
    workspace = poisoned_workspace()
    check_layer_norm_linear(2, make_weight(kind, 5, k), small_tile(k), workspace=workspace)
    assert not workspace.arrivals.any(), "arrivals must be zero for the next launch"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("n", [1, 3, 4, 8, 9])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_layer_norm_linear_of_any_number_of_outputs(kind: str, n: int, stages: int) -> None:
    check_layer_norm_linear(3, make_weight(kind, n, 40), small_tile(40, num_stages=stages))


@pytest.mark.parametrize("kind", TYPES)
def test_logits_are_float32_and_the_bias_may_be_missing(kind: str) -> None:
    weight = make_weight(kind, 7, 96, bias=False)
    out = check_layer_norm_linear(1, weight, small_tile(96), dtype=torch.float32)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("kind", TYPES)
def test_the_tile_of_the_table_is_the_default(kind: str) -> None:
    check_layer_norm_linear(1, make_weight(kind, 3, 200, group=128), None)


@pytest.mark.parametrize("load_bytes", [4, 8, 16])
def test_narrow_loads_give_the_same_to_the_bit(load_bytes: int) -> None:
    weight = make_weight("int4", 6, 128)
    wide = check_layer_norm_linear(2, weight, small_tile(128))
    narrow = check_layer_norm_linear(2, weight, small_tile(128, load_bytes=load_bytes))
    assert torch.equal(wide, narrow)


def test_every_int4_and_int8_level_is_read_as_what_it_stands_for() -> None:
    """One-hot rows of x cannot pass a LayerNorm; the second pass takes them as they are."""
    levels = torch.arange(-8, 8, dtype=torch.int8)
    four = quantize_int4(torch.stack([levels.roll(shift) for shift in range(16)]).float(), group=32)
    eight = Int8Weight(guarded(torch.arange(-128, 128).to(torch.int8).view(16, 16)), torch.ones(16))
    for weight in (align_rows(four), eight):
        for feature in range(16):
            one = torch.zeros(1, 16, dtype=torch.float16)
            one[0, feature] = 1
            residual = torch.zeros(1, 16)
            gelu_linear_residual(residual, one, one[:, :0], weight, tile=small_tile(16, block_k=32))
            assert torch.equal(residual[0], dequantize(weight)[:, feature])


def exact_gelu_linear_residual(
    residual: torch.Tensor, attended: torch.Tensor, inner: torch.Tensor, weight: Weight
) -> tuple[torch.Tensor, torch.Tensor]:
    """(activations [T, K], result [T, N]) in float64."""
    both = torch.cat((attended.double(), F.gelu(inner.double(), approximate="tanh")), dim=1)
    result = residual.double() + both @ dequantize(weight).double().T
    return both, result if weight.bias is None else result + weight.bias.double()


def check_gelu_linear_residual(
    rows: int, width: int, weight: Weight, tile: Tile | None, workspace: Workspace | None = None
) -> torch.Tensor:
    n, k = weight.shape
    residual = random(rows, n, seed=5) * 10
    around = torch.full((rows + 2, n + 3), NAN)
    stream = around[1 : rows + 1, :n]
    stream.copy_(residual)
    attended = guarded(random(rows, width, seed=6).half())
    # A view of the first pass's outputs, as in a model: what lies before it is poison too.
    projected = guarded((3 * random(rows, 3 + k - width, seed=7)).half())
    projected[:, :3] = NAN
    inner = projected[:, 3:]
    expected = exact_gelu_linear_residual(residual, attended, inner, weight)
    gelu_linear_residual(stream, attended, inner, weight, workspace=workspace, tile=tile)
    limit = bound(expected[0], weight, torch.zeros(()), residual.abs())
    assert ((stream.double() - expected[1]).abs() <= limit).all()
    result = stream.clone()
    around[1 : rows + 1, :n] = NAN
    assert around.isnan().all(), "written beyond the residual stream"
    return result


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", range(1, 9))
def test_gelu_linear_residual_of_1_to_8_rows(kind: str, rows: int) -> None:
    """Attention ends inside a tile, and so do the features."""
    check_gelu_linear_residual(rows, 20, make_weight(kind, 9, 53), small_tile(53))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("width", "k"), [(64, 192), (65, 129), (1, 140), (128, 129)])
def test_gelu_linear_residual_split_over_features(kind: str, width: int, k: int) -> None:
    """Splits of attention alone, of the MLP alone, and of both."""
    workspace = poisoned_workspace()
    weight = make_weight(kind, 10, k)
    check_gelu_linear_residual(3, width, weight, small_tile(k), workspace)
    assert not workspace.arrivals.any()


@pytest.mark.parametrize("kind", TYPES)
def test_gelu_linear_residual_without_bias_and_workspace(kind: str) -> None:
    weight = make_weight(kind, 4, 80, bias=False)
    check_gelu_linear_residual(1, 16, weight, small_tile(80, tiles_per_program=1))


def test_more_outputs_than_the_last_program_adds_up_at_once() -> None:
    weight = make_weight("int8", 150, 66)
    tile = small_tile(66, block_n=64, tiles_per_program=3)
    check_gelu_linear_residual(2, 30, weight, tile)


def test_the_same_launch_gives_the_same_bits_from_a_used_workspace() -> None:
    weight = make_weight("fp16", 10, 200)
    workspace = poisoned_workspace()
    first = check_gelu_linear_residual(4, 70, weight, small_tile(200), workspace)
    again = check_gelu_linear_residual(4, 70, weight, small_tile(200), workspace)
    assert torch.equal(first, again)


def test_gelu_is_that_of_the_reference_up_to_the_largest_float16_values() -> None:
    values = [
        -65504.0,
        -300.0,
        -20.0,
        -3.0,
        -1.0,
        -0.3,
        -1e-7,
        0.0,
        0.1,
        0.7,
        1.5,
        2.5,
        20.0,
        65504.0,
    ]
    inner = torch.tensor([values]).half()
    count = len(values)
    residual = torch.zeros(1, count)
    identity = DenseWeight(guarded(torch.eye(count).half()))
    tile = small_tile(count, block_k=16)
    gelu_linear_residual(residual, inner[:, :0], inner, identity, tile=tile)
    expected = F.gelu(inner.double(), approximate="tanh")
    assert torch.allclose(residual.double(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", TYPES)
def test_both_passes_agree_with_the_references_that_the_engine_is_tested_with(kind: str) -> None:
    """reference.py rounds the normed row to float16 on the way; everything else is float32."""
    weight = make_weight(kind, 6, 72)
    x, gain, offset = random(2, 72, seed=8), 1 + 0.1 * random(72, seed=9), random(72, seed=10)
    out = torch.full((2, 6), NAN)
    layer_norm_linear(x, gain, offset, EPS, weight, out, tile=small_tile(72))
    expected = reference.layer_norm_linear(x, gain, offset, EPS, weight)
    normed = reference.layer_norm(x, gain, offset, EPS).double()
    # Both are float32 here, so that each may err by the bound.
    assert ((out - expected).abs() <= 2 * bound(normed, weight, torch.zeros(()))).all()


@pytest.mark.parametrize("kind", TYPES)
def test_align_rows_keeps_the_values_and_a_weight_that_is_aligned(kind: str) -> None:
    rows = random(3, 37, seed=11)
    made = {
        "fp16": lambda: DenseWeight(rows.half()),
        "int8": lambda: quantize_int8(rows),
        "int4": lambda: quantize_int4(rows, group=32),
    }
    build: Callable[[], Weight] = made[kind]
    weight = build()
    aligned = align_rows(weight)
    assert aligned.shape == weight.shape
    assert torch.equal(dequantize(aligned), dequantize(weight))
    check_layer_norm_linear(2, aligned, small_tile(37))
    wide = make_weight(kind, 2, 64)
    for name in ("weight", "quantized", "packed"):
        if hasattr(wide, name):
            assert getattr(align_rows(wide), name) is getattr(wide, name)


def _refused(weight: Weight, rows: int = 1, *, message: str, **changes: object) -> None:
    n, k = weight.shape
    arguments = {
        "x": torch.zeros(rows, k),
        "norm_weight": torch.ones(k),
        "norm_bias": torch.zeros(k),
        "out": torch.full((rows, n), NAN),
        "tile": small_tile(k),
        "workspace": None,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        layer_norm_linear(
            arguments["x"],  # type: ignore[arg-type]
            arguments["norm_weight"],  # type: ignore[arg-type]
            arguments["norm_bias"],  # type: ignore[arg-type]
            EPS,
            weight,
            arguments["out"],  # type: ignore[arg-type]
            tile=arguments["tile"],  # type: ignore[arg-type]
            workspace=arguments["workspace"],  # type: ignore[arg-type]
        )
    assert torch.as_tensor(arguments["out"]).isnan().all()


def test_what_layer_norm_linear_does_not_take_is_refused_before_anything_is_written() -> None:
    weight = make_weight("fp16", 4, 64)
    _refused(weight, 9, message="1 to 8 rows, not 9")
    _refused(weight, 0, message="1 to 8 rows, not 0")
    _refused(weight, message="x must be float32", x=torch.zeros(1, 64).half())
    _refused(weight, message=r"x must be float32 \[T, 64\]", x=torch.zeros(1, 63))
    _refused(weight, message="norm_weight", norm_weight=torch.ones(63))
    _refused(weight, message="norm_bias", norm_bias=torch.ones(64).half())
    _refused(weight, message="out must be", out=torch.full((1, 5), NAN))
    _refused(weight, message="out must be", out=torch.full((1, 4), NAN, dtype=torch.bfloat16))
    _refused(DenseWeight(torch.zeros(4, 64)), message="float16 on a GPU, not torch.float32")
    _refused(DenseWeight(torch.zeros(4, 63).half()), message="align_rows")
    _refused(quantize_int4(torch.ones(4, 96), group=96), message="group must be a power of two")
    _refused(
        make_weight("int4", 4, 64), message="split_k must be 4", tile=small_tile(48, block_k=16)
    )
    _refused(
        make_weight("int4", 4, 64),
        message="multiple of the group 32",
        tile=small_tile(64, block_k=16),
    )
    _refused(
        weight,
        5,
        message="block_n = 256 times block_k = 1024 for 5 rows is 2097152 products",
        tile=small_tile(64, block_n=256, block_k=1024),
    )
    small = Workspace(torch.full((1,), NAN), torch.zeros(1, dtype=torch.int32))
    _refused(
        weight,
        message="must hold 8 partial sums and 1 arrivals, not 1 and 1",
        tile=small_tile(64, block_k=32),
        workspace=small,
    )


def test_what_gelu_linear_residual_does_not_take_is_refused() -> None:
    weight = make_weight("fp16", 4, 64)
    half = torch.zeros(1, 32).half()
    for residual, attended, inner, message in (
        (torch.zeros(1, 5), half, half, r"residual must be float32 \[T, 4\]"),
        (torch.zeros(1, 4).half(), half, half, "residual must be float32"),
        (torch.zeros(1, 4), half.float(), half, "attended must be float16"),
        (torch.zeros(1, 4), half, half.expand(2, 32), r"inner must be float16 \[1, ...\]"),
        (torch.zeros(1, 4), half, half[:, :31], "64 features together, not 32 \\+ 31"),
    ):
        with pytest.raises(ValueError, match=message):
            gelu_linear_residual(residual, attended, inner, weight, tile=small_tile(64))


def test_the_workspace_for_weights_is_enough_for_each_of_their_launches() -> None:
    """With the tiles of the roofline: 4,100 features in 5 splits of 1,024."""
    weight = make_weight("int8", 2, 4100)
    workspace = Workspace.for_weights("cpu", [("gelu_linear_residual", weight)], max_rows=2)
    assert workspace.partials.numel() == 5 * 2 * 2
    workspace.partials.fill_(NAN)
    check_gelu_linear_residual(2, 40, weight, None, workspace)
