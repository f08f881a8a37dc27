"""A checkpoint folder as the engine would run it, and as transformers does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.kernels.batch import BLOCK_SIZE, ForwardBatch
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused.forward import TorchModel
from gptjet.service.models.fused.layout import WeightType
from gptjet.service.models.fused.weights import load_fused_weights


class Runner:
    """A TorchModel with a KV cache of its own; `free` blocks are poisoned with NaN."""

    def __init__(self, model: TorchModel) -> None:
        self.model = model
        geometry = model.geometry
        layers, *rest = geometry.kv_block_shape
        self.blocks = -(-geometry.max_context // BLOCK_SIZE)
        self.cache = torch.full((layers, rest[0], 4 * self.blocks, *rest[1:]), math.nan)

    def table(self, row: int) -> list[int]:
        """Block ids of sequence `row`, out of order, so that nothing can rely on it."""
        return [4 * block + row for block in reversed(range(self.blocks))]

    def step(self, *parts: tuple[int, Sequence[int], int]) -> torch.Tensor:
        """Logits of every token of parts (row, token_ids, first position), in one pass."""
        rows = [row for row, ids, _ in parts for _ in ids]
        batch = ForwardBatch(
            token_ids=torch.tensor([i for _, ids, _ in parts for i in ids], dtype=torch.int32),
            positions=torch.tensor(
                [first + i for _, ids, first in parts for i in range(len(ids))], dtype=torch.int32
            ),
            sequence_index=torch.tensor(rows, dtype=torch.int32),
            block_tables=torch.tensor([self.table(row) for row in range(4)], dtype=torch.int32),
            logits_rows=torch.arange(len(rows), dtype=torch.int32),
        )
        return self.model.forward(batch, self.cache)

    def greedy(self, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens and the logits [steps, V] that chose them, with the KV cache."""
        rows = [self.step((0, prompt, 0))[-1]]
        tokens = [int(rows[0].argmax())]
        while len(tokens) < steps:
            rows.append(self.step((0, tokens[-1:], len(prompt) + len(tokens) - 1))[-1])
            tokens.append(int(rows[-1].argmax()))
        return tokens, torch.stack(rows)


@pytest.fixture(scope="session")
def run_fused() -> Callable[..., Runner]:
    """`run_fused(folder, "fp32")`"""

    def make(folder: Path, weight_type: WeightType = "fp32") -> Runner:
        weights = load_fused_weights(
            resolve_checkpoint(str(folder), allow_pickle=True), weight_type
        )
        return Runner(TorchModel(weights.geometry, weights.head, weights.layers()))

    return make


@pytest.fixture(scope="session")
def run_transformers() -> Callable[..., tuple[list[int], torch.Tensor]]:
    """`run_transformers(folder, prompt, steps)`: greedy tokens and logits, in FP32."""

    @torch.inference_mode()
    def run(folder: Path, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        out = model(torch.tensor([prompt]), use_cache=True)
        rows, tokens = [out.logits[0, -1]], [int(out.logits[0, -1].argmax())]
        while len(tokens) < steps:
            out = model(
                torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True
            )
            rows.append(out.logits[0, -1])
            tokens.append(int(rows[-1].argmax()))
        return tokens, torch.stack(rows)

    return run
