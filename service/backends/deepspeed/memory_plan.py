"""Will it fit: weights, KV workspace a row, and what DeepSpeed wants spare, against what is free.

The workspace's size is GenWorkSpace's own arithmetic (inference_context.h, DeepSpeed 0.19.8), which
allocates with cudaMalloc beside PyTorch's allocator and, left alone, shortens the context in
silence when memory is short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gptjet.service.backends.deepspeed.guards import USE_INSTEAD, InjectedGeometry, Platform
from gptjet.service.engine.errors import BackendLoadError, FieldViolation, InvalidRequestError
from gptjet.service.models.memory import format_bytes

# GenWorkSpace refuses to start with less than this beside its workspace; PyTorch's own buffers (the
# widest is the MLP's [L, 4 x hidden]: 64 MiB for GPT-J-6B and 2,048 tokens) live in it.
SPARE_BYTES = 500 * 1024**2
# While block i is replaced: its fused q, k, v (3/12 of a block), the new block, merge buffers
# (7/12) and a transposed copy (4/12) stand beside the old one.
_INJECTION_BLOCKS = 2.25


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes a model needs on its card, for one row of `context` tokens."""

    weight_bytes: int
    injection_bytes: int
    workspace_row_bytes: int
    free_bytes: int
    context: int
    context_that_fits: int

    @property
    def needed_bytes(self) -> int:
        """The larger of loading (weights and one block twice) and serving one row."""
        return self.weight_bytes + max(self.injection_bytes, self.workspace_row_bytes + SPARE_BYTES)

    @property
    def fits(self) -> bool:
        """Whether one row of the whole context does."""
        return self.needed_bytes <= self.free_bytes

    def __str__(self) -> str:
        return (
            f"weights {format_bytes(self.weight_bytes)}, KV workspace "
            f"{format_bytes(self.workspace_row_bytes)} a row of {self.context} tokens, spare "
            f"{format_bytes(SPARE_BYTES)}: {format_bytes(self.needed_bytes)} needed, "
            f"{format_bytes(self.free_bytes)} free"
        )


def workspace_bytes(
    geometry: InjectedGeometry,
    context: int,
    *,
    batch_size: int = 1,
    element_bytes: int = 2,
    tensor_parallel_size: int = 1,
) -> int:
    """What GenWorkSpace allocates for `batch_size` rows of `context` tokens.

    10 activations of the hidden size, one score row a head, and keys and values of every layer, for
    each token; a head below 128 is padded to 32, 64 or 128.
    """
    width = geometry.head_dim
    padded = next((size for size in (32, 64, 128) if width <= size), width)
    activations = 10 * geometry.heads * padded
    scores = geometry.heads // tensor_parallel_size * context
    cache = geometry.layers * 2 * (geometry.heads * padded // tensor_parallel_size)
    return (activations + scores + cache) * batch_size * context * element_bytes


def plan_memory(
    geometry: InjectedGeometry,
    platform: Platform,
    num_parameters: int,
    *,
    tensor_parallel_size: int = 1,
) -> MemoryPlan:
    """Lay the model out on the platform. `num_parameters` counts tied weights once.

    With tensor parallelism every card first holds all weights: DeepSpeed slices what it is given.
    """
    element_bytes = platform.dtype.itemsize
    weight_bytes = num_parameters * element_bytes
    block_bytes = 12 * geometry.hidden**2 * element_bytes
    free = platform.free_bytes()

    def row(context: int) -> int:
        return workspace_bytes(
            geometry,
            context,
            element_bytes=element_bytes,
            tensor_parallel_size=tensor_parallel_size,
        )

    room = free - weight_bytes - SPARE_BYTES
    fitting = _largest(geometry.context, lambda context: row(context) <= room)
    return MemoryPlan(
        weight_bytes=weight_bytes,
        injection_bytes=int(_INJECTION_BLOCKS * block_bytes),
        workspace_row_bytes=row(geometry.context),
        free_bytes=free,
        context=geometry.context,
        context_that_fits=fitting,
    )


def check_memory(plan: MemoryPlan, platform: Platform) -> None:
    """Raise BackendLoadError with the whole plan, and what would fit, where the model does not."""
    if plan.fits:
        return
    can_load = plan.weight_bytes + plan.injection_bytes <= plan.free_bytes
    if can_load and plan.context_that_fits:
        way_out = (
            f"a context of {plan.context_that_fits} tokens would fit: "
            f"--kv-cache-tokens {plan.context_that_fits}"
        )
    else:
        way_out = f"no context would fit; {USE_INSTEAD} on a CPU, or a larger card"
    raise BackendLoadError(f"does not fit {platform.name}: {plan}; {way_out}")


def check_batch_fits(
    geometry: InjectedGeometry,
    platform: Platform,
    batch_size: int,
    *,
    held_batch: int,
    tensor_parallel_size: int = 1,
) -> None:
    """Raise InvalidRequestError where a workspace for `batch_size` rows cannot be had.

    The workspace of `held_batch` rows is given back before a larger one is allocated.
    """
    row = workspace_bytes(
        geometry,
        geometry.context,
        element_bytes=platform.dtype.itemsize,
        tensor_parallel_size=tensor_parallel_size,
    )
    free = platform.free_bytes() + held_batch * row
    if batch_size > held_batch and batch_size * row + SPARE_BYTES > free:
        raise InvalidRequestError(
            FieldViolation(
                "batch",
                f"{batch_size} rows need a KV workspace of {format_bytes(batch_size * row)} and "
                f"{format_bytes(SPARE_BYTES)} spare; {format_bytes(free)} are free, enough for "
                f"{max(0, free - SPARE_BYTES) // row} rows",
            )
        )


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest multiple of 16 up to `limit` that fits, else 0."""
    low, high = 0, limit // 16
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * 16) else (low, middle - 1)
    return low * 16
