"""Rotary embedding of queries and keys, and the write of keys and values into the paged KV cache.

One program a token and head: what the first weight pass of a block left behind goes to where
attention reads it. FP16 caches take the values as they are; INT8 caches take levels and one scale a
token and head (`reference.quantize_kv`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptjet.kernels.batch import BLOCK_SIZE, INT8_KV_ROWS
from gptjet.kernels.gpu.compile_case import GPT_J_6B, CompileCase

_NUM_WARPS = 1  # a head of 256 is 16 bytes a lane
_BLOCK_SIZE = tl.constexpr(BLOCK_SIZE)
_INT8_ROWS = tl.constexpr(INT8_KV_ROWS)
# Added and taken away again, 1.5 * 2^23 leaves a small float32 rounded to nearest, ties to even.
_ROUNDER = tl.constexpr(12582912.0)
_SMALLEST = tl.constexpr(2.0**-126)


def rotary_write_kv(
    projected: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    sequence_index: torch.Tensor,
    block_tables: torch.Tensor,
    layer_cache: torch.Tensor,
    queries: torch.Tensor,
) -> None:
    """Turn queries into `queries`, and write turned keys, and values, to their slots of a layer.

    projected     [T, >= 3 * heads * head_dim] float16: rows of q, k, v and whatever follows
    cos, sin      [max_context, rotary_dim / 2] float32; no columns: nothing is turned
    positions, sequence_index [T], block_tables [S, W]   int32, ForwardBatch's; a token of a
                  negative position is padding: nothing of it is written, its queries are zeros
    layer_cache   [2, num_blocks, heads, BLOCK_SIZE, head_dim] float16, or int8 with INT8_KV_ROWS
                  rows; contiguous
    queries       [T, heads, head_dim] float16, contiguous, overwritten

    All on one device. Nothing is allocated or waited for. Raises ValueError for sizes that do not
    belong together.
    """
    tokens, heads, head_dim = queries.shape
    half = check_rotary(cos, head_dim)
    scales = check_layer_cache(layer_cache, heads, head_dim)
    if projected.shape[0] != tokens or projected.shape[1] < 3 * heads * head_dim:
        raise ValueError(
            f"projected is {list(projected.shape)}; queries {list(queries.shape)} need "
            f"[{tokens}, {3 * heads * head_dim} or more]"
        )
    if not queries.is_contiguous() or projected.stride(1) != 1:
        raise ValueError("queries must be contiguous, and the rows of projected")
    if tokens == 0:
        return
    _rotary_write_kv_kernel[(tokens, heads)](
        projected,
        cos,
        sin,
        positions,
        sequence_index,
        block_tables,
        layer_cache,
        scales,
        queries,
        projected.stride(0),
        block_tables.stride(0),
        layer_cache.shape[1],
        HEADS=heads,
        HEAD_DIM=head_dim,
        HALF=half,
        FEATURES=triton.next_power_of_2(head_dim),
        IS_INT8=layer_cache.dtype == torch.int8,
        num_warps=_NUM_WARPS,
    )


def check_rotary(cos: torch.Tensor, head_dim: int) -> int:
    """Pairs of features that turn. Raises ValueError where a head has fewer features."""
    half = cos.shape[1]
    if 2 * half > head_dim:
        raise ValueError(f"rotary_dim is {2 * half} and head_dim {head_dim}")
    return half


def check_layer_cache(layer_cache: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """The cache as the kernels take its scales: float32 over the same bytes where it is int8.

    Raises ValueError for a cache that is not one layer's of float16 or int8.
    """
    rows = {torch.float16: BLOCK_SIZE, torch.int8: INT8_KV_ROWS}.get(layer_cache.dtype)
    shape = layer_cache.shape
    if (
        rows is None
        or len(shape) != 5
        or shape[0] != 2
        or tuple(shape[2:]) != (heads, rows, head_dim)
        or not layer_cache.is_contiguous()
    ):
        raise ValueError(
            f"layer_cache is {list(shape)} {layer_cache.dtype}; it must be contiguous "
            f"[2, blocks, {heads}, {BLOCK_SIZE}, {head_dim}] float16 or "
            f"[2, blocks, {heads}, {INT8_KV_ROWS}, {head_dim}] int8"
        )
    return layer_cache.view(torch.float32) if rows == INT8_KV_ROWS else layer_cache


# A cache of one block would otherwise be compiled for the constant 1, which has no dtype.
@triton.jit(do_not_specialize=["num_blocks"])
def _rotary_write_kv_kernel(
    projected,
    cos,
    sin,
    positions,
    sequence_index,
    block_tables,
    cache,
    scales,
    queries,
    projected_stride,
    table_stride,
    num_blocks,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    FEATURES: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Program (token, head). `scales` is the cache's own memory as float32 where it is int8."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    feature = tl.arange(0, FEATURES)
    held = feature < HEAD_DIM
    query_out = queries + (token * HEADS + head) * HEAD_DIM + feature
    position = tl.load(positions + token)
    if position < 0:
        tl.store(query_out, tl.zeros([FEATURES], queries.dtype.element_ty), mask=held)
    else:
        row = projected + token.to(tl.int64) * projected_stride + head * HEAD_DIM
        value = tl.load(row + 2 * HEADS * HEAD_DIM + feature, mask=held, other=0.0)
        query = tl.load(row + feature, mask=held, other=0.0)
        key = tl.load(row + HEADS * HEAD_DIM + feature, mask=held, other=0.0)
        if HALF > 0:
            # Each feature with the other one of its pair: (a, b) -> (a cos - b sin, b cos + a sin).
            turns = feature < 2 * HALF
            other = feature ^ 1
            angle = position.to(tl.int64) * HALF + feature // 2
            cosine = tl.load(cos + angle, mask=turns, other=1.0)
            sine = tl.load(sin + angle, mask=turns, other=0.0)
            sine = tl.where(feature % 2 == 0, -sine, sine)
            query_other = tl.load(row + other, mask=turns, other=0.0).to(tl.float32)
            key_other = tl.load(row + HEADS * HEAD_DIM + other, mask=turns, other=0.0)
            query = (query.to(tl.float32) * cosine + query_other * sine).to(query.dtype)
            key = (key.to(tl.float32) * cosine + key_other.to(tl.float32) * sine).to(key.dtype)
        tl.store(query_out, query, mask=held)

        table = block_tables + tl.load(sequence_index + token).to(tl.int64) * table_stride
        block = tl.load(table + position // _BLOCK_SIZE).to(tl.int64)
        slot = position % _BLOCK_SIZE
        values_from = num_blocks.to(tl.int64) * HEADS
        if IS_INT8:
            _write_int8(cache, scales, block * HEADS + head, slot, key, feature, HEAD_DIM, held)
            _write_int8(
                cache,
                scales,
                values_from + block * HEADS + head,
                slot,
                value,
                feature,
                HEAD_DIM,
                held,
            )
        else:
            at = (block * HEADS + head) * _BLOCK_SIZE + slot
            tl.store(cache + at * HEAD_DIM + feature, key, mask=held)
            at += values_from * _BLOCK_SIZE
            tl.store(cache + at * HEAD_DIM + feature, value, mask=held)


@triton.jit
def _write_int8(cache, scales, where, slot, x, feature, HEAD_DIM: tl.constexpr, held):
    """Quantise x [FEATURES] into row `slot` of the INT8_ROWS rows numbered `where`."""
    x = x.to(tl.float32)
    # A maximum drops NaN, which must not be lost: it counts as infinite.
    magnitude = tl.where(x == x, tl.abs(x), float("inf"))
    scale = tl.maximum(tl.div_rn(tl.max(magnitude, 0), 127.0), _SMALLEST)
    levels = tl.where(scale < float("inf"), tl.div_rn(x, scale), 0.0)
    levels = levels + _ROUNDER - _ROUNDER
    levels = tl.minimum(tl.maximum(levels, -127.0), 127.0)
    first = where * (_INT8_ROWS * HEAD_DIM)
    tl.store(cache + first + slot * HEAD_DIM + feature, levels.to(tl.int8), mask=held)
    tl.store(scales + (first + _BLOCK_SIZE * HEAD_DIM) // 4 + slot, scale)


def compile_cases() -> tuple[CompileCase, ...]:
    """GPT-J-6B's launches: one token, as the kernel is the same for any number."""
    return tuple(_compile_case(is_int8) for is_int8 in (False, True))


def _compile_case(is_int8: bool) -> CompileCase:
    heads, head_dim, rotary_dim = GPT_J_6B.num_heads, GPT_J_6B.head_dim, GPT_J_6B.rotary_dim
    signature = {
        "projected": "*fp16",
        "cos": "*fp32",
        "sin": "*fp32",
        "positions": "*i32",
        "sequence_index": "*i32",
        "block_tables": "*i32",
        "cache": "*i8" if is_int8 else "*fp16",
        "scales": "*fp32" if is_int8 else "*fp16",
        "queries": "*fp16",
        "projected_stride": "i32",
        "table_stride": "i32",
        "num_blocks": "i32",
    }
    constexprs: dict[str, object] = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "HALF": rotary_dim // 2,
        "FEATURES": head_dim,
        "IS_INT8": is_int8,
    }
    held = 2 * heads * (head_dim + 4) if is_int8 else 2 * heads * head_dim * 2
    moved = 3 * heads * head_dim * 2 + heads * head_dim * 2 + held + 4 * rotary_dim
    # What turns is read twice, by each feature of a pair.
    twice = 2 * heads * rotary_dim * 2
    return CompileCase(
        name=f"{'int8' if is_int8 else 'fp16'} KV",
        kernel=_rotary_write_kv_kernel,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=_NUM_WARPS,
        programs=heads,
        bytes_moved=moved + twice,
        bytes_minimum=moved,
        divisible_by_16=frozenset({"projected_stride", "table_stride"}),
    )
