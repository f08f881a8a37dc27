"""KV blocks copied within their cache, where a sequence is to write to one that others read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptjet.kernels.batch import BLOCK_SIZE, INT8_KV_ROWS
from gptjet.kernels.gpu.compile_case import GPT_J_6B, CompileCase

_CHUNK = 4096
_NUM_WARPS = 4
_WORD_BYTES = 4


def copy_blocks(kv_cache: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copy block pairs[i, 0] over block pairs[i, 1], in all layers, keys and values.

    kv_cache  [layers, 2, num_blocks, heads, rows, head_dim] float16 or int8, contiguous
    pairs     [P, 2] int32, contiguous, on the same device; no destination is in another pair

    Nothing is allocated or waited for. Raises ValueError for a cache that is not contiguous, or
    whose blocks are not whole words of 4 bytes.
    """
    if pairs.shape[0] == 0:
        return
    planes, num_blocks = kv_cache.shape[0] * kv_cache.shape[1], kv_cache.shape[2]
    block_bytes = kv_cache[0, 0, 0].numel() * kv_cache.element_size()
    if not kv_cache.is_contiguous() or block_bytes % _WORD_BYTES:
        raise ValueError(
            f"kv_cache is {list(kv_cache.shape)} {kv_cache.dtype}; it must be contiguous, its "
            f"blocks a multiple of {_WORD_BYTES} bytes"
        )
    words = block_bytes // _WORD_BYTES
    _copy_blocks_kernel[(triton.cdiv(words, _CHUNK), planes, pairs.shape[0])](
        kv_cache.view(torch.int32),
        pairs,
        num_blocks,
        WORDS=words,
        CHUNK=_CHUNK,
        num_warps=_NUM_WARPS,
    )


# One block, or sixteen, is no reason to compile again: the number follows the card's memory.
@triton.jit(do_not_specialize=["num_blocks"])
def _copy_blocks_kernel(cache, pairs, num_blocks, WORDS: tl.constexpr, CHUNK: tl.constexpr):
    """Program (chunk, plane, pair)."""
    word = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    plane = tl.program_id(1).to(tl.int64) * num_blocks
    pair = pairs + tl.program_id(2) * 2
    source = (plane + tl.load(pair)) * WORDS
    target = (plane + tl.load(pair + 1)) * WORDS
    held = word < WORDS
    tl.store(cache + target + word, tl.load(cache + source + word, mask=held), mask=held)


def compile_cases() -> tuple[CompileCase, ...]:
    """One block of GPT-J-6B."""
    cases = []
    for name, rows, width in (("fp16", BLOCK_SIZE, 2), ("int8", INT8_KV_ROWS, 1)):
        words = GPT_J_6B.num_heads * rows * GPT_J_6B.head_dim * width // _WORD_BYTES
        planes = 2 * GPT_J_6B.num_layers
        moved = 2 * planes * words * _WORD_BYTES
        constexprs: dict[str, object] = {"WORDS": words, "CHUNK": _CHUNK}
        cases.append(
            CompileCase(
                name=f"{name} KV",
                kernel=_copy_blocks_kernel,
                signature={"cache": "*i32", "pairs": "*i32", "num_blocks": "i32"}
                | dict.fromkeys(constexprs, "constexpr"),
                constexprs=constexprs,
                num_warps=_NUM_WARPS,
                programs=triton.cdiv(words, _CHUNK) * planes,
                bytes_moved=moved,
                bytes_minimum=moved,
            )
        )
    return tuple(cases)
