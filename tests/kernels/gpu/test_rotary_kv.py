from __future__ import annotations

import math

import pytest
import torch

from gptjet.kernels import reference
from gptjet.kernels.batch import INT8_KV_ROWS
from gptjet.kernels.gpu.rotary_kv import rotary_write_kv

HEADS, INNER, BLOCKS = 2, 9, 6
# Of two sequences: neighbours, the ends of blocks, and padding.
POSITIONS = [0, 1, 15, -1, 16, 31, -1, 40]
ROWS = [1, 1, 1, 0, 1, 0, 0, 0]
TABLES = [[5, 0, 2], [3, 1, 4]]


def poisoned_cache(head_dim: int, *, is_int8: bool) -> torch.Tensor:
    if not is_int8:
        return torch.full((2, BLOCKS, HEADS, 16, head_dim), math.nan, dtype=torch.float16)
    cache = torch.full((2, BLOCKS, HEADS, INT8_KV_ROWS, head_dim), -128, dtype=torch.int8)
    reference.int8_kv_scales(cache).fill_(math.nan)
    return cache


def case(
    head_dim: int, rotary_dim: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Rows of a first weight pass, angles, and the index tensors."""
    generator = torch.Generator().manual_seed(seed)
    width = 3 * HEADS * head_dim + INNER
    projected = torch.randn(len(POSITIONS), width, generator=generator).half()
    cos, sin = reference.rotary_tables(64, rotary_dim)
    index = [torch.tensor(values, dtype=torch.int32) for values in (POSITIONS, ROWS, TABLES)]
    return projected, cos, sin, index


def expected(
    projected: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: list[torch.Tensor],
    head_dim: int,
    *,
    is_int8: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and cache by the reference, of the rows that are no padding."""
    cache = poisoned_cache(head_dim, is_int8=is_int8)
    real = index[0] >= 0
    positions, rows = index[0][real], index[1][real]
    width = HEADS * head_dim
    queries, keys, values = (
        projected[real, i * width : (i + 1) * width].reshape(-1, HEADS, head_dim) for i in range(3)
    )
    angles = cos[positions.long()], sin[positions.long()]
    slots = reference.slot_mapping(positions, rows, index[2])
    reference.write_kv(cache, reference.rotary(keys, *angles), values, slots)
    turned = torch.zeros(len(POSITIONS), HEADS, head_dim, dtype=torch.float16)
    turned[real] = reference.rotary(queries, *angles)
    return turned, cache


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(64, 0), (64, 64), (64, 16), (80, 24), (96, 96), (256, 64)],
)
def test_queries_and_cache_equal_the_reference_bit_for_bit(
    head_dim: int, rotary_dim: int, is_int8: bool
) -> None:
    """No slot but the tokens' own is touched; padding writes nothing and asks for nothing."""
    projected, cos, sin, index = case(head_dim, rotary_dim)
    cache = poisoned_cache(head_dim, is_int8=is_int8)
    queries = torch.full((len(POSITIONS), HEADS, head_dim), math.nan, dtype=torch.float16)
    rotary_write_kv(projected, cos, sin, *index, cache, queries)
    turned, held = expected(projected, cos, sin, index, head_dim, is_int8=is_int8)
    assert torch.equal(queries, turned)
    assert torch.equal(cache.view(torch.uint8), held.view(torch.uint8))


@pytest.mark.parametrize("extreme", [0.0, 6e-8, 65504.0])
def test_int8_takes_every_size_of_float16(extreme: float) -> None:
    projected, cos, sin, index = case(64, 16)
    projected[:, : 3 * HEADS * 64] = extreme
    projected[:, 1::3] *= -1
    cache = poisoned_cache(64, is_int8=True)
    queries = torch.empty(len(POSITIONS), HEADS, 64, dtype=torch.float16)
    rotary_write_kv(projected, cos, sin, *index, cache, queries)
    _, held = expected(projected, cos, sin, index, 64, is_int8=True)
    assert torch.equal(cache.view(torch.uint8), held.view(torch.uint8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_int8_does_not_hide_what_is_not_finite(bad: float) -> None:
    """The token's head reads back as NaN, and nothing beside it."""
    projected, cos, sin, index = case(64, 0)
    projected[1, 2 * HEADS * 64 + 7] = bad  # head 0 of the value of the token at position 1
    cache = poisoned_cache(64, is_int8=True)
    queries = torch.empty(len(POSITIONS), HEADS, 64, dtype=torch.float16)
    rotary_write_kv(projected, cos, sin, *index, cache, queries)
    block, token = 3, 1
    scales = reference.int8_kv_scales(cache)[1, block, :, token]
    values = cache[1, block, :, token].float() * scales.unsqueeze(1)
    assert values[0].isnan().all()
    assert values[1].isfinite().all()
    _, held = expected(projected, cos, sin, index, 64, is_int8=True)
    assert torch.equal(cache.view(torch.uint8), held.view(torch.uint8))


def test_sizes_that_do_not_belong_together_are_refused() -> None:
    projected, cos, sin, index = case(64, 16)
    queries = torch.empty(len(POSITIONS), HEADS, 64, dtype=torch.float16)
    cache = poisoned_cache(64, is_int8=False)
    for bad in (cache.float(), cache[:, :, :1], cache[..., :32], cache.transpose(0, 1)):
        with pytest.raises(ValueError, match="layer_cache is"):
            rotary_write_kv(projected, cos, sin, *index, bad, queries)
    with pytest.raises(ValueError, match="projected is"):
        rotary_write_kv(projected[:, :300], cos, sin, *index, cache, queries)
    wide = reference.rotary_tables(64, 66)
    with pytest.raises(ValueError, match="rotary_dim is 66 and head_dim 64"):
        rotary_write_kv(projected, *wide, *index, cache, queries)
