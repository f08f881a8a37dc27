"""The two kernels that go with the row pass and the tiles, interpreted."""

from __future__ import annotations

import pytest
import torch

from gptjet.kernels import reference
from gptjet.kernels.weights import Int4Weight, quantize_int4, quantize_int8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (3, 1024), (5, 1100)])
def test_embedding_takes_the_id_that_the_host_or_the_pass_before_knows(
    dtype: torch.dtype, rows: int, hidden: int
) -> None:
    from gptjet.kernels.gpu.embedding import embed

    embedding = torch.randn(11, hidden).to(dtype)
    token_ids = torch.tensor([4, 9, 2, 7, 0], dtype=torch.int32)[:rows]
    sources = torch.tensor([-1, 0, 2, -1, 1], dtype=torch.int32)[:rows]
    sampled = torch.tensor([10, 3, -1], dtype=torch.int32)  # the last was not finite
    residual = torch.full((rows, hidden), torch.nan)
    embed(token_ids, sources, sampled, embedding, residual)
    assert torch.equal(residual, embedding[torch.tensor([4, 10, 0, 7, 3])[:rows]].float())


@pytest.mark.parametrize("inputs", [64, 101, 2048, 2100])
def test_int8_rows_are_dequantised(inputs: int) -> None:
    from gptjet.kernels.gpu.dequantize import dequantize_rows

    weight = quantize_int8(torch.randn(9, inputs))
    out = torch.full((3, inputs), torch.nan, dtype=torch.float16)
    dequantize_rows(weight, 4, 7, out)
    exact = weight.quantized[4:7].float() * weight.scale[4:7, None]
    assert torch.equal(out, exact.half())


@pytest.mark.parametrize(("inputs", "group"), [(64, 32), (101, 128), (256, 128), (2100, 64)])
def test_int4_rows_are_dequantised(inputs: int, group: int) -> None:
    from gptjet.kernels.gpu.dequantize import dequantize_rows

    rounded = quantize_int4(torch.randn(9, inputs), group=group)
    # GPTQ's scales may be negative.
    scale = rounded.scale * torch.where(torch.arange(9) % 2 == 0, 1, -1).half()[:, None]
    weight = Int4Weight(rounded.packed, scale, inputs, group)
    out = torch.full((4, inputs), torch.nan, dtype=torch.float16)
    dequantize_rows(weight, 2, 6, out)
    exact = torch.empty(4, inputs)
    reference.dequantize_rows(weight, 2, 6, exact)
    assert torch.equal(out, exact.half())
