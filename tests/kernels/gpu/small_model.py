"""A random GPT-J for the GPU model on a CPU, batches, and a recorder that replays by calling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry, ForwardBatch
from gptjet.kernels.weights import (
    DenseWeight,
    HeadWeights,
    LayerWeights,
    Weight,
    quantize_int4,
    quantize_int8,
)

GEOMETRY = BlockGeometry(
    num_layers=2,
    hidden_size=64,
    num_heads=1,
    head_dim=64,
    rotary_dim=16,
    inner_size=96,
    vocab_size=101,
    max_context=80,
)


def random_weights(kind: str, seed: int = 0) -> tuple[HeadWeights, list[LayerWeights]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def weight(outputs: int, inputs: int) -> Weight:
        values, bias = normal(outputs, inputs, scale=inputs**-0.5), normal(outputs, scale=0.1)
        if kind == "int8":
            return quantize_int8(values, bias)
        if kind == "int4":
            return quantize_int4(values, bias, 32)
        return DenseWeight(values.half(), bias)

    sizes = GEOMETRY
    hidden, width = sizes.hidden_size, sizes.num_heads * sizes.head_dim
    layers = [
        LayerWeights(
            1 + normal(hidden, scale=0.2),
            normal(hidden, scale=0.2),
            weight(3 * width + sizes.inner_size, hidden),
            weight(hidden, width + sizes.inner_size),
        )
        for _ in range(sizes.num_layers)
    ]
    head = HeadWeights(
        normal(sizes.vocab_size, hidden).half(),
        1 + normal(hidden, scale=0.2),
        normal(hidden, scale=0.2),
        weight(sizes.vocab_size, hidden),
    )
    return head, layers


def kv_cache(num_blocks: int = 24, *, is_int8: bool = False) -> torch.Tensor:
    """Poisoned: what is read before it is written shows. (Bytes of -1 are scales of NaN.)"""
    layers, two, *block = GEOMETRY.int8_kv_block_shape if is_int8 else GEOMETRY.kv_block_shape
    if is_int8:
        return torch.full((layers, two, num_blocks, *block), -1, dtype=torch.int8)
    return torch.full((layers, two, num_blocks, *block), torch.nan, dtype=torch.float16)


def batch_of(
    segments: Sequence[tuple[Sequence[int], int, Sequence[int]]], *, every_row: bool = False
) -> ForwardBatch:
    """(token ids, start, block table) of each sequence; logits of the last token, or of all."""
    tokens = [token for ids, _, _ in segments for token in ids]
    positions = [start + i for ids, start, _ in segments for i in range(len(ids))]
    index = [s for s, (ids, _, _) in enumerate(segments) for _ in ids]
    lasts = torch.tensor([len(ids) for ids, _, _ in segments]).cumsum(0) - 1
    width = -(-GEOMETRY.max_context // BLOCK_SIZE)
    tables = torch.zeros(len(segments), width, dtype=torch.int32)
    for row, (_, _, table) in enumerate(segments):
        tables[row, : len(table)] = torch.tensor(table)
    wanted = torch.arange(len(tokens)) if every_row else lasts
    return ForwardBatch(
        *(torch.tensor(part, dtype=torch.int32) for part in (tokens, positions, index)),
        block_tables=tables,
        logits_rows=wanted.int(),
    )


class CallingRecorder:
    """Replays by calling what was recorded again; counts, and can be told to fail."""

    def __init__(self) -> None:
        self.num_launches = 0
        self.num_replays = 0
        self.fails_at: int | None = None
        self.spoil: Callable[[], None] = lambda: None

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        from gptjet.kernels.gpu.graphs import CaptureError

        self.num_launches += 1
        if self.num_launches == self.fails_at:
            raise CaptureError("switched off by a test")
        launch()

        def replay() -> None:
            self.num_replays += 1
            launch()
            self.spoil()

        return replay
