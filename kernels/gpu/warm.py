"""Every kernel that a model launches on a card, compiled before there is a card."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry, ForwardBatch
from gptjet.kernels.gpu.availability import launch_smallest
from gptjet.kernels.gpu.gemv_launch import MAX_ROWS
from gptjet.kernels.gpu.model import GpuModel
from gptjet.kernels.gpu.operations import triton_operations
from gptjet.kernels.gpu.routes import load_routes
from gptjet.kernels.weights import (
    INT4_GROUP,
    DenseWeight,
    HeadWeights,
    Int4Weight,
    Int8Weight,
    LayerWeights,
    Weight,
)

if TYPE_CHECKING:
    from gptjet.kernels.gpu.offline import Launch

WEIGHT_TYPES = ("float16", "int8", "int4")
KV_DTYPES = {"float16": torch.float16, "int8": torch.int8}

_META = torch.device("meta")
# Any number: kernels are not compiled for it.
_NUM_BLOCKS = 64
# Layers differ in their addresses alone, all of which are multiples of 16.
_NUM_LAYERS = 2
COMPILE_TIMEOUT_S = 300.0


class WarmError(Exception):
    """Some kernel could not be compiled; the message says which and why, in one line each."""


def launches_of(
    geometry: BlockGeometry,
    capability: int,
    *,
    weight_types: Sequence[str] = WEIGHT_TYPES,
    kv_dtypes: Sequence[str] = tuple(KV_DTYPES),
    max_rows: int,
) -> list[Launch]:
    """All specialisations that a server of such a model launches on a card, without one.

    capability  75 for sm_75
    max_rows    sequences that decode together; see GpuModel

    A KV cache dtype that the geometry cannot have is left out. Raises ValueError for sizes that the
    kernels do not take.
    """
    from gptjet.kernels.gpu.offline import record_launches

    few = replace(geometry, num_layers=min(geometry.num_layers, _NUM_LAYERS))

    def run() -> None:
        launch_smallest(_META)
        for weight_type in weight_types:
            head, layers = _weights(few, weight_type)
            model = GpuModel(few, head, layers, triton_operations(), max_rows=max_rows)
            for kv_cache in _kv_caches(few, kv_dtypes):
                model.launch_each(kv_cache)
                model.copy_blocks([(0, 1)], kv_cache)
                for batch in _prefills(few, model.max_rows):
                    model.forward(batch, kv_cache)

    return record_launches(capability, run)


def compile_all(
    launches: Sequence[Launch],
    *,
    num_processes: int,
    on_done: Callable[[Launch], None] | None = None,
    timeout_s: float = COMPILE_TIMEOUT_S,
) -> None:
    """Compile into Triton's cache (TRITON_CACHE_DIR), in processes of their own.

    Raises WarmError with every kernel that failed, for a process that died, and where none of them
    has finished a kernel for `timeout_s`.
    """
    context = multiprocessing.get_context("spawn")
    failures: list[str] = []
    with concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        waiting: dict[concurrent.futures.Future[str | None], Launch | None]
        # At the side of the kernels, and by one process alone.
        waiting = {pool.submit(_build_utilities): None}
        waiting |= {pool.submit(_compile, launch): launch for launch in launches}
        while waiting:
            done, _ = concurrent.futures.wait(
                waiting, timeout_s, concurrent.futures.FIRST_COMPLETED
            )
            if not done:
                for process in multiprocessing.active_children():
                    process.kill()
                raise WarmError(f"no kernel was compiled in {timeout_s:g} s")
            for future in done:
                try:
                    problem = future.result()
                except concurrent.futures.process.BrokenProcessPool as error:
                    left = ", ".join(sorted({_name(each) for each in waiting.values()}))
                    raise WarmError(f"a compiling process died; not compiled: {left}") from error
                launch = waiting.pop(future)
                if problem is not None:
                    failures.append(f"{_name(launch)}: {problem}")
                elif launch is not None and on_done is not None:
                    on_done(launch)
    if failures:
        raise WarmError("\n".join(failures))


def _name(launch: Launch | None) -> str:
    if launch is None:
        return "what Triton's driver is made of"
    return f"{launch.kernel} for sm_{launch.capability}"


def _compile(launch: Launch) -> str | None:
    """What went wrong. Not raised: a compiler's exceptions do not always travel."""
    from gptjet.kernels.gpu.offline import compile_launch

    return _problem_of(lambda: compile_launch(launch))


def _build_utilities() -> str | None:
    from gptjet.kernels.gpu.offline import build_utilities

    return _problem_of(build_utilities)


def _problem_of(work: Callable[[], object]) -> str | None:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises is named
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def default_processes() -> int:
    """As many as there are processors."""
    return len(os.sched_getaffinity(0))


def _weights(geometry: BlockGeometry, kind: str) -> tuple[HeadWeights, Iterator[LayerWeights]]:
    """As the loader takes them to a card, without memory."""

    def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=_META)

    def weight(outputs: int, inputs: int) -> Weight:
        bias = floats(outputs)
        if kind == "int8":
            quantized = floats(outputs, inputs, dtype=torch.int8)
            return Int8Weight(quantized, floats(outputs), bias)
        if kind == "int4":
            packed = floats(outputs, -(-inputs // 2), dtype=torch.uint8)
            scale = floats(outputs, -(-inputs // INT4_GROUP), dtype=torch.float16)
            return Int4Weight(packed, scale, inputs, bias=bias)
        return DenseWeight(floats(outputs, inputs, dtype=torch.float16), bias)

    hidden, width = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    head = HeadWeights(
        floats(geometry.vocab_size, hidden, dtype=torch.float16),
        floats(hidden),
        floats(hidden),
        weight(geometry.vocab_size, hidden),
    )
    layers = (
        LayerWeights(
            floats(hidden),
            floats(hidden),
            weight(3 * width + geometry.inner_size, hidden),
            weight(hidden, width + geometry.inner_size),
        )
        for _ in range(geometry.num_layers)
    )
    return head, layers


def _kv_caches(geometry: BlockGeometry, kv_dtypes: Sequence[str]) -> Iterator[torch.Tensor]:
    for name in kv_dtypes:
        dtype = KV_DTYPES[name]
        try:
            shape = geometry.kv_cache_shape(_NUM_BLOCKS, dtype)
        except ValueError:
            continue  # heads too small for INT8
        yield torch.empty(shape, dtype=dtype, device=_META)


def _prefills(geometry: BlockGeometry, max_rows: int) -> Iterator[ForwardBatch]:
    """Passes that are no row pass, of every number of rows that some kernel takes.

    First of the tokens, by one prompt; then of the rows that go through the lm_head, by prompts
    that end together.
    """
    most = max([MAX_ROWS, *(route.dot_rows[1] for route in load_routes() if route.dot_rows)]) + 1
    for length in range(MAX_ROWS + 1, min(most, geometry.max_context) + 1):
        yield _prompts(geometry, 1, length)
    for prompts in range(1, min(most, max_rows) + 1):
        # Longer than any row pass of so many sequences.
        yield _prompts(geometry, prompts, min(geometry.max_context, MAX_ROWS // prompts + 2))


def _prompts(geometry: BlockGeometry, prompts: int, length: int) -> ForwardBatch:
    tokens = prompts * length
    width = -(-geometry.max_context // BLOCK_SIZE)
    return ForwardBatch(
        token_ids=torch.zeros(tokens, dtype=torch.int32),
        positions=torch.arange(length, dtype=torch.int32).repeat(prompts),
        sequence_index=torch.arange(prompts, dtype=torch.int32).repeat_interleave(length),
        block_tables=torch.zeros(prompts, width, dtype=torch.int32),
        logits_rows=torch.arange(length - 1, tokens, length, dtype=torch.int32),
    )
