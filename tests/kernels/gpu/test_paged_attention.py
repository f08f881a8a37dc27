from __future__ import annotations

import math

import pytest
import torch

from gptjet.kernels import reference
from gptjet.kernels.batch import INT8_KV_ROWS
from gptjet.kernels.gpu.attention_tile import AttentionTile, default_tile, workspace_elements
from gptjet.kernels.gpu.paged_attention import paged_attention


class Case:
    """Sequences whose blocks are out of order in a cache in which all else is poison."""

    def __init__(
        self,
        positions: list[int],
        rows: list[int] | None = None,
        *,
        heads: int = 1,
        head_dim: int = 64,
        max_context: int = 64,
        is_int8: bool = False,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = list(range(len(positions))) if rows is None else rows
        sequences = max(rows) + 1
        width = -(-max_context // 16)
        blocks = sequences * width
        order = torch.randperm(blocks, generator=generator).int()
        self.tables = order.view(sequences, width)
        self.positions = torch.tensor(positions, dtype=torch.int32)
        self.rows = torch.tensor(rows, dtype=torch.int32)
        self.queries = torch.randn(len(rows), heads, head_dim, generator=generator).half()
        rows_held = INT8_KV_ROWS if is_int8 else 16
        shape = (2, blocks, heads, rows_held, head_dim)
        if is_int8:
            self.cache = torch.full(shape, -128, dtype=torch.int8)
            reference.int8_kv_scales(self.cache).fill_(math.nan)
        else:
            self.cache = torch.full(shape, math.nan, dtype=torch.float16)
        for row in set(rows):
            longest = max(p for p, r in zip(positions, rows, strict=True) if r == row)
            # What stands after a sequence's blocks in its table is no block at all.
            self.tables[row, longest // 16 + 1 :] = 2**30
            if longest < 0:
                continue
            past = torch.arange(longest + 1)
            slots = reference.slot_mapping(past, torch.full_like(past, row), self.tables)
            keys, values = (
                (torch.randn(len(past), heads, head_dim, generator=generator) * scale).half()
                for _ in range(2)
            )
            reference.write_kv(self.cache, keys, values, slots)

    def run(self, tile: AttentionTile | None = None) -> torch.Tensor:
        tokens, heads, head_dim = self.queries.shape
        out = torch.full((tokens, heads * head_dim), math.nan, dtype=torch.float16)
        chosen = tile or default_tile(head_dim, 75)
        size = workspace_elements(tokens, heads, head_dim, self.tables.shape[1], chosen)
        paged_attention(
            self.queries,
            self.cache,
            self.positions,
            self.rows,
            self.tables,
            out,
            workspace=torch.full((size,), math.nan),
            tile=tile,
        )
        return out

    def expected(self) -> torch.Tensor:
        """In float32, of the rows that are no padding; zeros for those."""
        tokens, heads, head_dim = self.queries.shape
        result = torch.zeros(tokens, heads * head_dim)
        for token in range(tokens):
            one = slice(token, token + 1)
            if int(self.positions[token]) >= 0:
                result[one] = reference.paged_attention(
                    self.queries[one].float(),
                    self.cache,
                    self.positions[one],
                    self.rows[one],
                    self.tables,
                )
        return result


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of the result to float16."""
    assert got.isfinite().all()
    assert torch.allclose(got.float(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


SMALL = AttentionTile(tokens=16, split_tokens=32, num_warps=1)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("context", [1, 15, 16, 17, 31, 32, 33, 64])
def test_contexts_around_blocks_and_splits(context: int, is_int8: bool) -> None:
    case = Case([context - 1], heads=2, is_int8=is_int8, seed=context)
    assert_close(case.run(SMALL), case.expected())


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("context", [2047, 2048])
def test_full_contexts(context: int, is_int8: bool) -> None:
    case = Case([context - 1], max_context=2048, is_int8=is_int8, seed=context)
    assert_close(case.run(AttentionTile(64, 128, 4)), case.expected())


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("is_int8", [False, True])
def test_head_sizes_with_their_default_tiles(head_dim: int, is_int8: bool) -> None:
    case = Case([40, 7], head_dim=head_dim, is_int8=is_int8)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8])
def test_rows_of_other_contexts_with_padding_between(rows: int) -> None:
    positions = [5, 40, -1, 0, 63, 16, -1, 31][:rows]
    case = Case(positions)
    got = case.run(SMALL)
    assert_close(got, case.expected())
    for row, position in enumerate(positions):
        if position < 0:
            assert torch.equal(got[row], torch.zeros_like(got[row]))


@pytest.mark.parametrize("is_int8", [False, True])
def test_draft_tokens_see_those_before_them_and_none_after(is_int8: bool) -> None:
    """Three tokens of one sequence over the end of a block, beside one of another."""
    case = Case([14, 15, 16, 33], [0, 0, 0, 1], is_int8=is_int8)
    got = case.run(SMALL)
    assert_close(got, case.expected())
    # What is after a token must not move it: its row alone, in a cache that ends with it.
    slots = reference.slot_mapping(torch.tensor([15, 16]), torch.zeros(2).int(), case.tables)
    hole = torch.full((2, 1, 64), math.nan, dtype=torch.float16)
    reference.write_kv(case.cache, hole, hole, slots)
    assert torch.equal(case.run(SMALL)[0], got[0])


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    """Bit for bit: a stream's tokens must not change with the traffic."""
    case = Case([40, 63, 7])
    together = case.run(SMALL)
    for row in range(3):
        case_of_one = Case([40, 63, 7])
        case_of_one.queries = case.queries[row : row + 1]
        case_of_one.positions = case.positions[row : row + 1]
        case_of_one.rows = case.rows[row : row + 1]
        assert torch.equal(case_of_one.run(SMALL)[0], together[row])
    assert torch.equal(case.run(SMALL), together)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_int8_of_small_and_large_values(scale: float) -> None:
    """At 30 the scores are in the hundreds: without a maximum taken away, exp overflows."""
    case = Case([50], is_int8=True, scale=scale)
    assert_close(case.run(SMALL), case.expected())


@pytest.mark.parametrize("is_int8", [False, True])
def test_nan_in_a_slot_that_is_read_comes_out(is_int8: bool) -> None:
    """So that the row fails with an error instead of going on with a guess."""
    case = Case([40, 40], is_int8=is_int8)
    bad = torch.full((1, 1, 64), 1.0, dtype=torch.float16)
    bad[0, 0, 3] = math.nan
    slot = reference.slot_mapping(torch.tensor([35]), torch.tensor([1]), case.tables)
    reference.write_kv(case.cache, bad, torch.ones_like(bad), slot)
    got = case.run(SMALL)
    assert got[0].isfinite().all()
    assert got[1].isnan().all()


def test_sizes_that_do_not_belong_together_are_refused() -> None:
    case = Case([3])
    index = (case.positions, case.rows, case.tables)
    out = torch.empty(1, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="layer_cache is"):
        paged_attention(case.queries, case.cache.float(), *index, out)
    with pytest.raises(ValueError, match=r"out is \[1, 32\]; it must be \[1, 64\]"):
        paged_attention(case.queries, case.cache, *index, out[:, :32])
    with pytest.raises(ValueError, match="workspace has 4 elements"):
        paged_attention(case.queries, case.cache, *index, out, workspace=torch.empty(4))
    with pytest.raises(ValueError, match="power of two"):
        AttentionTile(24, 48, 4)
