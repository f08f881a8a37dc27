"""The tokens of a row pass as its residual stream: where each token's id comes from, and its row.

The id of a row is the host's, or what the pass before sampled for a row of its own: so the next
step can be launched while nobody knows yet which tokens it computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from gptjet.kernels.gpu.compile_case import GPT_J_6B, CompileCase

if TYPE_CHECKING:
    import torch

_BLOCK = 1024
_NUM_WARPS = 4


def embed(
    token_ids: torch.Tensor,
    sources: torch.Tensor,
    sampled: torch.Tensor,
    embedding: torch.Tensor,
    residual: torch.Tensor,
) -> None:
    """Write the embedding of each row's token into residual [T, H] float32, contiguous.

    token_ids  [T] int32
    sources    [T] int32, index into `sampled` whose id is taken instead, or -1
    sampled    [N] int32; a negative id (a row whose logits were not finite) counts as 0
    embedding  [vocab, H] float16 or float32, contiguous

    Nothing is allocated or waited for.
    """
    rows, hidden = residual.shape
    _embed_kernel[(rows, triton.cdiv(hidden, _BLOCK))](
        token_ids,
        sources,
        sampled,
        embedding,
        residual,
        hidden,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


@triton.jit
def _embed_kernel(token_ids, sources, sampled, embedding, residual, hidden, BLOCK: tl.constexpr):
    """Program (row, block of features)."""
    row = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + row)
    token = tl.load(token_ids + row)
    token = tl.where(source >= 0, tl.load(sampled + tl.maximum(source, 0)), token)
    token = tl.maximum(token, 0).to(tl.int64)
    held = feature < hidden
    value = tl.load(embedding + token * hidden + feature, mask=held, other=0.0)
    tl.store(residual + row.to(tl.int64) * hidden + feature, value.to(tl.float32), mask=held)


def compile_cases() -> tuple[CompileCase, ...]:
    """GPT-J-6B's launch of one row: the kernel is the same for any number."""
    hidden = GPT_J_6B.hidden_size
    moved = 2 * hidden + 4 * hidden + 3 * 4
    return (
        CompileCase(
            name="fp16",
            kernel=_embed_kernel,
            signature={
                "token_ids": "*i32",
                "sources": "*i32",
                "sampled": "*i32",
                "embedding": "*fp16",
                "residual": "*fp32",
                "hidden": "i32",
                "BLOCK": "constexpr",
            },
            constexprs={"BLOCK": _BLOCK},
            num_warps=_NUM_WARPS,
            programs=triton.cdiv(hidden, _BLOCK),
            bytes_moved=moved,
            bytes_minimum=moved,
            divisible_by_16=frozenset({"hidden"}),
        ),
    )
