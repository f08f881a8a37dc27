"""Decode attention over a paged KV cache: a query token a row, its context split over programs.

Flash-decoding (Dao, Haziza, Massa, Sizov 2023): program (token, head, split) attends to one part of
the context and leaves its maximum, its sum and its weighted values in a workspace; a second kernel
puts the parts of a row together, in order. A split has a fixed number of tokens, so a row's result
depends on its own context alone and never on the rows beside it, and the grid depends on the sizes
of the buffers alone: programs beyond a row's context leave at once, which a CUDA graph needs.

Within a program every slot of a tile keeps a running softmax of its own (Milakov, Gimelshein 2018),
so the loop has no sum over slots, and no barrier; they are joined once, after it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from gptjet.kernels.batch import BLOCK_SIZE, INT8_KV_ROWS
from gptjet.kernels.gpu.attention_tile import (
    AttentionTile,
    default_tile,
    splits_of,
    workspace_elements,
)
from gptjet.kernels.gpu.compile_case import GPT_J_6B, CompileCase
from gptjet.kernels.gpu.gemv_launch import capability_of
from gptjet.kernels.gpu.rotary_kv import check_layer_cache

_BLOCK_SIZE = tl.constexpr(BLOCK_SIZE)
_INT8_ROWS = tl.constexpr(INT8_KV_ROWS)
_COMBINE_SPLITS = 8
_COMBINE_WARPS = 4


def paged_attention(
    queries: torch.Tensor,
    layer_cache: torch.Tensor,
    positions: torch.Tensor,
    sequence_index: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
    *,
    workspace: torch.Tensor | None = None,
    tile: AttentionTile | None = None,
) -> None:
    """Attention of queries [T, heads, head_dim] float16 to positions 0 to their own, into `out`.

    Scores are divided by sqrt(head_dim). Rows may be tokens of one sequence or of several; all keys
    and values up to their positions must be in the cache.

    layer_cache   [2, num_blocks, heads, BLOCK_SIZE, head_dim] float16, or int8 with INT8_KV_ROWS
                  rows (see BlockGeometry.int8_kv_block_shape); contiguous
    positions, sequence_index [T], block_tables [S, W]   int32, ForwardBatch's; a row of a negative
                  position is padding and becomes zeros
    out           [T, heads * head_dim] float16, rows contiguous
    workspace     float32 of at least `workspace_elements`, contiguous; None allocates it
    tile          None: `default_tile`

    All on one device; nothing is waited for. Raises ValueError for sizes that do not belong
    together.
    """
    tokens, heads, head_dim = queries.shape
    is_int8 = layer_cache.dtype == torch.int8
    scales = check_layer_cache(layer_cache, heads, head_dim)
    if tuple(out.shape) != (tokens, heads * head_dim) or out.stride(1) != 1:
        raise ValueError(f"out is {list(out.shape)}; it must be [{tokens}, {heads * head_dim}]")
    if not queries.is_contiguous() or block_tables.stride(1) != 1:
        raise ValueError("queries must be contiguous, and the rows of block_tables")
    if tokens == 0:
        return
    tile = tile or default_tile(head_dim, capability_of(queries.device))
    needed = workspace_elements(tokens, heads, head_dim, block_tables.shape[1], tile)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.float32, device=queries.device)
    elif (
        workspace.numel() < needed
        or workspace.dtype != torch.float32
        or not workspace.is_contiguous()
    ):
        raise ValueError(
            f"workspace has {workspace.numel()} elements of {workspace.dtype}; "
            f"{needed} contiguous float32 are needed"
        )
    splits = splits_of(block_tables.shape[1], tile)
    features = triton.next_power_of_2(head_dim)
    _split_kernel[(splits, heads, tokens)](
        queries,
        layer_cache,
        scales,
        positions,
        sequence_index,
        block_tables,
        workspace,
        block_tables.stride(0),
        layer_cache.shape[1],
        splits,
        HEADS=heads,
        HEAD_DIM=head_dim,
        FEATURES=features,
        TOKENS=tile.tokens,
        SPLIT_TOKENS=tile.split_tokens,
        SCORE_SCALE=_score_scale(head_dim),
        IS_INT8=is_int8,
        num_warps=tile.num_warps,
    )
    _combine_kernel[(heads, tokens)](
        workspace,
        positions,
        out,
        out.stride(0),
        splits,
        HEADS=heads,
        HEAD_DIM=head_dim,
        FEATURES=features,
        SPLIT_TOKENS=tile.split_tokens,
        SPLITS_AT_ONCE=_COMBINE_SPLITS,
        num_warps=_COMBINE_WARPS,
    )


def _score_scale(head_dim: int) -> float:
    """Of a dot product, so that exp2 of it is exp of the score."""
    return math.log2(math.e) / math.sqrt(head_dim)


# Counts of one would otherwise be compiled for the constant 1, which has no dtype.
@triton.jit(do_not_specialize=["num_blocks", "num_splits"])
def _split_kernel(
    queries,
    cache,
    scales,
    positions,
    sequence_index,
    block_tables,
    workspace,
    table_stride,
    num_blocks,
    num_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Program (split, head, token)."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.program_id(2)
    context = tl.load(positions + token) + 1
    start = split * SPLIT_TOKENS
    if start < context:
        feature = tl.arange(0, FEATURES)
        slot = tl.arange(0, TOKENS)
        held = feature < HEAD_DIM
        query_row = queries + (token * HEADS + head) * HEAD_DIM
        query = tl.load(query_row + feature, mask=held, other=0.0).to(tl.float32) * SCORE_SCALE
        table = block_tables + tl.load(sequence_index + token).to(tl.int64) * table_stride
        values_from = num_blocks.to(tl.int64) * HEADS

        largest = tl.full([TOKENS], float("-inf"), tl.float32)
        total = tl.zeros([TOKENS], tl.float32)
        summed = tl.zeros([TOKENS, FEATURES], tl.float32)
        for first in range(start, tl.minimum(start + SPLIT_TOKENS, context), TOKENS):
            at = first + slot
            inside = at < context
            # What is not inside is not read: the table ends there, and slots hold anything.
            block = tl.load(table + at // _BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            if HEAD_DIM == FEATURES:
                mask = inside[:, None]
            else:
                mask = inside[:, None] & held[None, :]
            where = block * HEADS + head
            key, key_scale = _load_tile(
                cache, scales, where, at, inside, mask, feature, HEAD_DIM, IS_INT8
            )
            value, value_scale = _load_tile(
                cache, scales, values_from + where, at, inside, mask, feature, HEAD_DIM, IS_INT8
            )
            score = tl.sum(key.to(tl.float32) * query[None, :], 1)
            if IS_INT8:
                score *= key_scale
            score = tl.where(inside, score, float("-inf"))
            # NaN must come through, and a maximum may drop it: it stays in the score.
            higher = tl.maximum(largest, score)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(largest - base)
            share = tl.exp2(score - base)
            total = total * shrink + share
            if IS_INT8:
                share *= value_scale
            summed = summed * shrink[:, None] + share[:, None] * value.to(tl.float32)
            largest = higher

        # The first token of a split is inside, so there is a finite maximum, or NaN in `total`.
        best = tl.max(largest, 0)
        best = tl.where(best == float("-inf"), 0.0, best)
        factor = tl.exp2(largest - best)
        part = (token.to(tl.int64) * HEADS + head) * num_splits + split
        tl.store(workspace + part * FEATURES + feature, tl.sum(summed * factor[:, None], 0))
        parts = tl.num_programs(2).to(tl.int64) * HEADS * num_splits
        measures = workspace + parts * FEATURES + part * 2
        tl.store(measures, best)
        tl.store(measures + 1, tl.sum(total * factor, 0))


@triton.jit
def _load_tile(
    cache,
    scales,
    where,
    at,
    inside,
    mask,
    feature,
    HEAD_DIM: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Rows [TOKENS, FEATURES] of the heads numbered `where`, and their scales (int8 only)."""
    if IS_INT8:
        first = where * (_INT8_ROWS * HEAD_DIM)
        scale_at = (first + _BLOCK_SIZE * HEAD_DIM) // 4 + at % _BLOCK_SIZE
        scale = tl.load(scales + scale_at, mask=inside, other=0.0)
    else:
        first = where * (_BLOCK_SIZE * HEAD_DIM)
        scale = 1.0
    row = first + (at % _BLOCK_SIZE) * HEAD_DIM
    return tl.load(cache + row[:, None] + feature[None, :], mask=mask, other=0), scale


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(
    workspace,
    positions,
    out,
    out_stride,
    num_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
):
    """Program (head, token): the parts that the row has, whatever else is in the workspace."""
    head = tl.program_id(0)
    token = tl.program_id(1)
    feature = tl.arange(0, FEATURES)
    lane = tl.arange(0, SPLITS_AT_ONCE)
    # Of a padding row none: its sums stay 0.
    used = (tl.load(positions + token) + SPLIT_TOKENS) // SPLIT_TOKENS
    row = (token.to(tl.int64) * HEADS + head) * num_splits
    measures = workspace + tl.num_programs(1).to(tl.int64) * HEADS * num_splits * FEATURES
    largest = tl.full([SPLITS_AT_ONCE], float("-inf"), tl.float32)
    total = tl.zeros([SPLITS_AT_ONCE], tl.float32)
    summed = tl.zeros([SPLITS_AT_ONCE, FEATURES], tl.float32)
    for first in range(0, used, SPLITS_AT_ONCE):
        split = first + lane
        inside = split < used
        part = row + split
        best = tl.load(measures + part * 2, mask=inside, other=float("-inf"))
        share = tl.load(measures + part * 2 + 1, mask=inside, other=0.0)
        held = workspace + part[:, None] * FEATURES + feature[None, :]
        values = tl.load(held, mask=inside[:, None], other=0.0)
        higher = tl.maximum(largest, best)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(largest - base)
        factor = tl.where(inside, tl.exp2(best - base), 0.0)
        total = total * shrink + share * factor
        summed = summed * shrink[:, None] + values * factor[:, None]
        largest = higher
    best = tl.max(largest, 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    factor = tl.exp2(largest - best)
    divisor = tl.sum(total * factor, 0)
    result = tl.sum(summed * factor[:, None], 0) / tl.where(used > 0, divisor, 1.0)
    target = out + token.to(tl.int64) * out_stride + head * HEAD_DIM + feature
    tl.store(target, result.to(out.dtype.element_ty), mask=feature < HEAD_DIM)


def compile_cases() -> tuple[CompileCase, ...]:
    """Decode of one token at a full context: GPT-J-6B's heads, and its width in smaller heads.

    Bytes are of a context of 2,048 tokens.
    """
    cases = []
    for head_dim in (64, 128, 256):
        for capability, last in ((70, 79), (80, 90)):
            tile = default_tile(head_dim, capability)
            cases += [
                replace(case, min_capability=capability, max_capability=last)
                for case in (
                    _split_case(head_dim, tile, is_int8=False),
                    _split_case(head_dim, tile, is_int8=True),
                    _combine_case(head_dim, tile),
                )
            ]
    return tuple(cases)


def _split_case(head_dim: int, tile: AttentionTile, *, is_int8: bool) -> CompileCase:
    heads, context = GPT_J_6B.hidden_size // head_dim, GPT_J_6B.max_context
    splits = -(-context // tile.split_tokens)
    pointers = {
        "queries": "*fp16",
        "cache": "*i8" if is_int8 else "*fp16",
        "scales": "*fp32" if is_int8 else "*fp16",
        **dict.fromkeys(("positions", "sequence_index", "block_tables"), "*i32"),
        "workspace": "*fp32",
    }
    numbers = dict.fromkeys(("table_stride", "num_blocks", "num_splits"), "i32")
    constexprs: dict[str, object] = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "FEATURES": head_dim,
        "TOKENS": tile.tokens,
        "SPLIT_TOKENS": tile.split_tokens,
        "SCORE_SCALE": _score_scale(head_dim),
        "IS_INT8": is_int8,
    }
    held = 2 * heads * context * (head_dim + 4 if is_int8 else 2 * head_dim)
    row = 2 * heads * head_dim
    name = "int8" if is_int8 else "fp16"
    return CompileCase(
        name=f"split, {name} KV, head_dim {head_dim}, {tile.split_tokens} tokens",
        kernel=_split_kernel,
        signature=pointers | numbers | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=tile.num_warps,
        programs=heads * splits,
        bytes_moved=held + row + heads * splits * 4 * (head_dim + 2),
        bytes_minimum=held + 2 * row,
        divisible_by_16=frozenset({"table_stride"}),
    )


def _combine_case(head_dim: int, tile: AttentionTile) -> CompileCase:
    heads, context = GPT_J_6B.hidden_size // head_dim, GPT_J_6B.max_context
    splits = -(-context // tile.split_tokens)
    pointers = {"workspace": "*fp32", "positions": "*i32", "out": "*fp16"}
    constexprs: dict[str, object] = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "FEATURES": head_dim,
        "SPLIT_TOKENS": tile.split_tokens,
        "SPLITS_AT_ONCE": _COMBINE_SPLITS,
    }
    moved = heads * splits * 4 * (head_dim + 2) + 2 * heads * head_dim
    return CompileCase(
        name=f"combine, head_dim {head_dim}, {tile.split_tokens} tokens",
        kernel=_combine_kernel,
        signature=pointers
        | dict.fromkeys(("out_stride", "num_splits"), "i32")
        | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=_COMBINE_WARPS,
        programs=heads,
        bytes_moved=moved,
        bytes_minimum=moved,
        divisible_by_16=frozenset({"out_stride"}),
    )
