"""The launches of every kernel at a geometry's sizes: tensors, the reference's result, and bytes.

A case is made on the device that runs it, and holds several copies of what it reads, so that a
timing can take the next one each time and none of it is in a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from gptjet.benchmarks.gpu_evidence.launches import (
    Attention,
    CopyBlocks,
    Dequantize,
    Embed,
    RotaryWrite,
    Sampling,
    WeightPass,
)
from gptjet.kernels.batch import BlockGeometry
from gptjet.kernels.gpu.compile_case import GPT_J_6B
from gptjet.kernels.gpu.gemv_launch import capability_of
from gptjet.kernels.gpu.tuning import DOT_LINEAR, Launch

TINY = BlockGeometry(
    num_layers=1,
    hidden_size=64,
    num_heads=1,
    head_dim=64,
    rotary_dim=16,
    inner_size=64,
    vocab_size=61,
    max_context=64,
)
"""What an interpreted kernel does in under a second."""

GEOMETRIES = {"gpt-j-6b": GPT_J_6B, "tiny": TINY}

# Of a batch that fills one instruction, and of the largest that goes to dot_linear by the model.
_TIMED_DOT_ROWS = (16, 64)

DTYPES = {"fp16": "float16", "int8": "int8", "int4": "int4"}
"""The tuning table's name of a weight type -> the one that people say."""


class Launchable(Protocol):
    """One launch, made on its device.

    num_bytes  that no launch could do without: weights once, inputs once, outputs once
    copies     of what it reads
    """

    num_bytes: int
    copies: int

    def launch(self, copy: int) -> None:
        """Launch it over one of the copies."""
        ...

    def error(self) -> tuple[float, float]:
        """(largest difference from the reference, limit), of the first copy."""
        ...


@dataclass(frozen=True, slots=True)
class KernelCase:
    """subject: what is proven by it, "kernels/int8". make(device, working_set_bytes): launches that
    read little have one copy whatever they are asked for."""

    subject: str
    kernel: str
    name: str
    make: Callable[[torch.device, int], Launchable]
    rows: int = 1
    is_timed: bool = False

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.kernel}, {self.name}"


def kernel_cases(
    geometry: BlockGeometry, rows: tuple[int, ...], dot_rows: tuple[int, ...] = ()
) -> Iterator[KernelCase]:
    """Every kernel: the weight passes by weight type first, then what all of them share.

    dot_rows  of dot_linear: none where the card is below sm_80
    """
    hidden, width = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    shapes = (
        ("layer_norm_linear", "w_in", 3 * width + geometry.inner_size, hidden),
        ("gelu_linear_residual", "w_out", hidden, hidden + geometry.inner_size),
        ("layer_norm_linear", "lm_head", geometry.vocab_size, hidden),
    )
    for kind, dtype in DTYPES.items():
        for kernel, weight, n, k in shapes:
            for count in rows:
                yield KernelCase(
                    f"kernels/{dtype}",
                    kernel,
                    f"{weight} {dtype}, rows {count}",
                    _weight_pass(kernel, n, k, kind, count),
                    rows=count,
                    is_timed=count == 1 or count == rows[-1],
                )
        for _, weight, n, k in shapes:
            for count in dot_rows:
                yield KernelCase(
                    f"kernels/{dtype}",
                    DOT_LINEAR,
                    f"{weight} {dtype}, rows {count}",
                    _weight_pass(DOT_LINEAR, n, k, kind, count),
                    rows=count,
                    # Dense weights are cuBLAS's, unless a card was measured to do better.
                    is_timed=kind != "fp16" and count in _TIMED_DOT_ROWS,
                )
    yield from _shared_cases(geometry)


def _shared_cases(geometry: BlockGeometry) -> Iterator[KernelCase]:
    shared = "kernels/shared"
    most = geometry.max_context
    contexts = sorted({min(c, most) for c in (1, 15, 16, 17, most // 2, most - 1, most)})
    for kv in (torch.float16, torch.int8):
        name = str(kv).removeprefix("torch.")
        yield KernelCase(
            shared,
            "paged_attention",
            f"{name} KV, contexts {', '.join(map(str, contexts))}",
            functools.partial(Attention, geometry, contexts, kv),
            rows=len(contexts),
        )
        yield KernelCase(
            shared,
            "paged_attention",
            f"{name} KV, context {most}",
            functools.partial(Attention, geometry, [most], kv),
            is_timed=True,
        )
        yield KernelCase(
            shared,
            "rotary_write_kv",
            f"{name} KV",
            functools.partial(RotaryWrite, geometry, kv),
            rows=RotaryWrite.ROWS,
        )
        yield KernelCase(
            shared, "copy_blocks", f"{name} KV", functools.partial(CopyBlocks, geometry, kv)
        )
    yield KernelCase(shared, "embed", "rows 3", functools.partial(Embed, geometry))
    for kind in ("int8", "int4"):
        yield KernelCase(
            shared,
            "dequantize_rows",
            kind,
            functools.partial(Dequantize, geometry, kind),
        )
    for draws, filters in ((False, False), (True, False), (True, True)):
        name = "greedy" if not draws else ("top-k and top-p" if filters else "temperature")
        yield KernelCase(
            shared,
            "sample",
            name,
            functools.partial(Sampling, geometry, (draws, filters)),
            is_timed=True,
        )


def _weight_pass(
    kernel: str, n: int, k: int, kind: str, rows: int
) -> Callable[[torch.device, int], Launchable]:
    def make(device: torch.device, working_set_bytes: int) -> Launchable:
        launch = Launch(kernel, capability_of(device), rows, n, k, kind)
        return WeightPass(launch, device, working_set_bytes)

    return make
