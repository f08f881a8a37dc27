"""dot_linear through Triton's interpreter, beside float64 arithmetic on the same weights.

Outputs, workspaces and everything beyond the tensors are NaN (or the largest integer) before a
launch, so that what is read out of place, or not written, shows.
"""

from __future__ import annotations

import pytest
import torch

from gptjet.kernels.gpu import dot_linear as module
from gptjet.kernels.gpu.dot_linear import dot_linear
from gptjet.kernels.gpu.gemv_launch import Workspace, align_rows
from gptjet.kernels.gpu.tuning import WEIGHT_TYPES, Tile
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
TYPES = tuple(WEIGHT_TYPES)


def guarded(values: torch.Tensor) -> torch.Tensor:
    """A view of the same values with poison behind each row, and around all of them."""
    poison = NAN if values.is_floating_point() else torch.iinfo(values.dtype).max
    rows = values.view(1, -1) if values.dim() == 1 else values
    width = -(-rows.shape[1] // 16) * 16 + 16
    around = torch.full((rows.shape[0] + 2, width), poison, dtype=values.dtype)
    view = around[1:-1, : rows.shape[1]]
    view.copy_(rows)
    return view[0] if values.dim() == 1 else view


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_weight(kind: str, n: int, k: int, *, bias: bool = True, group: int = 64) -> Weight:
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


def small_tile(k: int, *, split_k: int = 1, block_k: int = 64, **changes: int) -> Tile:
    """Small enough that a few outputs and rows make several tiles."""
    steps = -(-k // block_k)
    tiles = -(-steps // split_k)
    options = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 3, **changes}
    return Tile(block_k=block_k, split_k=split_k, tiles_per_program=tiles, **options)


def exact(x: torch.Tensor, weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, how far float32 sums in any order may be from it), both [T, N] float64.

    A sum of K products, in any order, errs by at most K u of the sum of their sizes (Higham,
    Accuracy and Stability, 2nd ed., 3.1, with u = 2^-24). An INT4 weight is rounded to float16
    first, by 2^-11 of it or 2^-25, and an output in float16 as well.
    """
    values = dequantize(weight).double()
    result = x.double() @ values.T
    sizes = x.double().abs() @ values.abs().T
    if weight.bias is not None:
        result = result + weight.bias.double()
        sizes = sizes + weight.bias.abs()
    limit = (x.shape[1] + 16) * 2.0**-24 * sizes + 2.0**-11 * result.abs() + 2.0**-25
    if isinstance(weight, Int4Weight):
        limit = limit + 2.0**-11 * sizes + 2.0**-25 * x.double().abs().sum(1, keepdim=True)
    return result, limit


def check(
    rows: int,
    weight: Weight,
    tile: Tile | None,
    *,
    dtype: torch.dtype = torch.float16,
    add: bool = False,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    n, k = weight.shape
    x = guarded(random(rows, k, seed=1).half())
    around = torch.full((rows + 2, n + 5), NAN, dtype=dtype)
    out = around[1:-1, :n]
    before = 10 * random(rows, n, seed=5) if add else torch.zeros(rows, n)
    if add:
        out.copy_(before)
    dot_linear(x, weight, out, add=add, workspace=workspace, tile=tile)
    expected, limit = exact(x, weight)
    allowed = limit + 2.0**-23 * before.abs()
    assert ((out.double() - expected - before.double()).abs() <= allowed).all()
    result = out.clone()
    around[1:-1, :n] = NAN
    assert around.isnan().all(), "written beyond the outputs"
    return result


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", [1, 9, 15, 16, 17, 33])
def test_any_number_of_rows(kind: str, rows: int) -> None:
    """N odd and not a multiple of the tile, K neither of the tile nor of the group."""
    check(rows, make_weight(kind, 19, 101), small_tile(101))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("k", [1, 31, 33, 64, 129])
def test_any_number_of_features(kind: str, k: int) -> None:
    check(9, make_weight(kind, 5, k), small_tile(k))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("n", [1, 15, 16, 33])
def test_any_number_of_outputs(kind: str, n: int) -> None:
    check(17, make_weight(kind, n, 64), small_tile(64))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("k", "split_k"), [(128, 2), (200, 2), (129, 3)])
def test_splits_of_the_features_are_added(kind: str, k: int, split_k: int) -> None:
    """The last split of 129 features has one. Four tiles of outputs and rows count their own."""
    workspace = Workspace(torch.full((4096,), NAN), torch.zeros(64, dtype=torch.int32))
    weight = make_weight(kind, 17, k)
    tile = small_tile(k, split_k=split_k)
    first = check(17, weight, tile, workspace=workspace)
    assert not workspace.arrivals.any(), "arrivals must be zero for the next launch"
    assert torch.equal(check(17, weight, tile, workspace=workspace), first), "a used workspace"
    assert torch.equal(check(17, weight, tile), first), "a workspace of its own"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("split_k", [1, 2])
def test_it_adds_to_the_residual_stream_without_rounding_to_float16(
    kind: str, split_k: int
) -> None:
    weight = make_weight(kind, 9, 100, bias=split_k == 1)
    check(9, weight, small_tile(100, split_k=split_k), dtype=torch.float32, add=True)


@pytest.mark.parametrize("kind", TYPES)
def test_logits_are_float32_and_the_bias_may_be_missing(kind: str) -> None:
    out = check(9, make_weight(kind, 7, 64, bias=False), small_tile(64), dtype=torch.float32)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", [9, 17])
def test_the_tile_of_the_table_is_the_default(kind: str, rows: int) -> None:
    check(rows, make_weight(kind, 70, 200, group=128), None)


def test_a_group_shorter_than_a_tile_shortens_the_tile() -> None:
    """Each tile has one scale an output: 128 features are two tiles of a group of 64."""
    for group in (64, 128, 256):
        check(9, make_weight("int4", 6, 256, group=group), small_tile(256, block_k=128, split_k=2))


def test_every_level_is_read_as_what_it_stands_for() -> None:
    levels = torch.arange(-8, 8, dtype=torch.int8)
    four = quantize_int4(torch.stack([levels.roll(shift) for shift in range(16)]).float(), group=64)
    eight = Int8Weight(guarded(torch.arange(-128, 128).to(torch.int8).view(16, 16)), torch.ones(16))
    for weight in (align_rows(four), eight):
        out = torch.full((16, 16), NAN)
        dot_linear(torch.eye(16).half(), weight, out, tile=small_tile(16, block_k=64))
        # INT4 weights are float16 once they are scaled.
        assert torch.equal(out.T, dequantize(weight).half().float())


def test_int4_weights_are_the_float16_ones_that_cublas_gets() -> None:
    from gptjet.kernels.gpu.dequantize import dequantize_rows

    weight = make_weight("int4", 16, 32, bias=False)
    assert isinstance(weight, Int4Weight)
    halves = torch.empty(16, 32, dtype=torch.float16)
    dequantize_rows(weight, 0, 16, halves)
    out = torch.full((32, 16), NAN)
    dot_linear(torch.eye(32, dtype=torch.float16), weight, out, tile=small_tile(32, block_k=64))
    assert torch.equal(out.T, halves.float())


def test_no_rows_are_no_launch() -> None:
    dot_linear(torch.empty(0, 64).half(), make_weight("int8", 4, 64), torch.empty(0, 4))


def _refused(weight: Weight, message: str, **changes: object) -> None:
    n, k = weight.shape
    arguments = {"x": torch.zeros(9, k).half(), "out": torch.full((9, n), NAN), **changes}
    x, out = arguments.pop("x"), arguments.pop("out")
    with pytest.raises(ValueError, match=message):
        dot_linear(x, weight, out, **{"tile": small_tile(k), **arguments})  # type: ignore[arg-type]
    assert torch.as_tensor(out).isnan().all()


def test_what_it_does_not_take_is_refused_before_anything_is_written() -> None:
    weight = make_weight("fp16", 4, 64)
    _refused(weight, r"x must be float16 \[T, 64\]", x=torch.zeros(9, 64))
    _refused(weight, r"x must be float16 \[T, 64\]", x=torch.zeros(9, 63).half())
    _refused(weight, "features together", x=torch.zeros(64, 9).half().T)
    _refused(weight, r"out must be float16 or float32 \[9, 4\]", out=torch.full((9, 5), NAN))
    _refused(weight, "out must be", out=torch.full((9, 4), NAN, dtype=torch.bfloat16))
    _refused(weight, "float32 to be added to", out=torch.full((9, 4), NAN).half(), add=True)
    _refused(weight, "needs a tile with a block_m", tile=Tile(4, 64, 4, 2, 1))
    _refused(weight, "split_k must be 1", tile=small_tile(128, split_k=2))
    _refused(DenseWeight(torch.zeros(4, 63).half()), "align_rows")
    _refused(make_weight("int4", 4, 64, group=32), "groups of at least 64, not 32")
    small = Workspace(torch.full((1,), NAN), torch.zeros(1, dtype=torch.int32))
    weight, tile = make_weight("fp16", 4, 128), small_tile(128, split_k=2)
    _refused(weight, "must hold 72 partial sums and 1 arrivals", tile=tile, workspace=small)


def test_a_card_below_sm_80_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "capability_of", lambda device: 75)
    x = torch.empty(9, 64, dtype=torch.float16, device="meta")
    weight = DenseWeight(torch.empty(4, 64, dtype=torch.float16))

    class OnCard:
        """What stands in for a tensor on a card."""

        device = torch.device("cuda", 0)

    with pytest.raises(ValueError, match="dot_linear needs sm_80 or newer, not sm_75"):
        dot_linear(OnCard(), weight, x)  # type: ignore[arg-type]


def test_the_workspace_for_dot_is_enough_for_each_number_of_rows() -> None:
    weight = make_weight("int8", 2, 4096)
    workspace = Workspace.for_dot("cpu", [(33, weight)], capability=75)
    for rows in (9, 17, 33):
        workspace.partials.fill_(NAN)
        check(rows, weight, None, workspace=workspace)
    assert workspace.partials.numel() > 33 * 2
