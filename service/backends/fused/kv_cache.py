"""How many KV blocks there can be, and the memory they are in."""

from __future__ import annotations

from math import prod

import torch

from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.memory import format_bytes


def bytes_per_block(geometry: BlockGeometry, dtype: torch.dtype) -> int:
    """Memory of one KV block over all layers."""
    return prod(geometry.kv_cache_shape(1, dtype)) * dtype.itemsize


def num_kv_blocks(
    geometry: BlockGeometry,
    dtype: torch.dtype,
    *,
    max_sequences: int,
    kv_cache_tokens: int | None,
    budget_bytes: int,
) -> int:
    """Blocks to allocate: what was asked for, else what fits, never more than can be used.

    kv_cache_tokens  tokens that all sequences together shall hold; None for as many as fit, at most
                     `max_sequences` full contexts
    budget_bytes     memory the cache may take

    Raises BackendLoadError with the numbers where it does not fit.
    """
    size = bytes_per_block(geometry, dtype)
    budget_bytes = max(0, budget_bytes)
    fitting = budget_bytes // size
    useful = max_sequences * -(-geometry.max_context // BLOCK_SIZE)
    wanted = 1 if kv_cache_tokens is None else min(useful, -(-kv_cache_tokens // BLOCK_SIZE))
    if wanted > fitting:
        raise BackendLoadError(
            f"the KV cache does not fit: {wanted * BLOCK_SIZE} tokens take "
            f"{format_bytes(wanted * size)}, and its share of the memory that is free after the "
            f"weights is {format_bytes(budget_bytes)}; lower kv_cache_tokens or free memory"
        )
    return min(useful, fitting) if kv_cache_tokens is None else wanted


def allocate_kv_cache(
    geometry: BlockGeometry, num_blocks: int, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[layers, 2, num_blocks, heads, BLOCK_SIZE, head_dim], uninitialised; INT8: INT8_KV_ROWS rows.

    On a CPU the system gives pages when they are first written, so blocks that no sequence has used
    take no memory. Raises BackendLoadError where the system refuses the address space.
    """
    shape = geometry.kv_cache_shape(num_blocks, dtype)
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:  # OutOfMemoryError is a RuntimeError
        raise BackendLoadError(
            f"the KV cache of {num_blocks * BLOCK_SIZE} tokens "
            f"({format_bytes(prod(shape) * dtype.itemsize)}) could not be allocated on {device}: "
            f"lower kv_cache_tokens"
        ) from error
