"""A decode step of the CPU kernels a weight type, as a share of the measured read bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry, ForwardBatch
from gptjet.kernels.cpu import CpuModel, NativeUnavailableError, native_library
from gptjet.kernels.weights import (
    DenseWeight,
    HeadWeights,
    LayerWeights,
    Weight,
    dequantize,
    quantize_int4,
    quantize_int8,
)

# 109 million weights: 57 MB in INT4, beyond any last-level cache.
_SIZES = BlockGeometry(2, 2048, 8, 256, 64, 8192, 4096, 512)
_ROWS = 16

# Largest difference of a logit over the largest logit. Quantised weights are multiplied with
# rounded activations; the reference multiplies the same weights with the activations as they are.
_TOLERANCE = {"fp32": 1e-5, "int8": 2e-2, "int4": 2e-2}
_FORMATS: dict[str, Callable[[torch.Tensor], Weight]] = {
    "fp32": DenseWeight,
    "int8": quantize_int8,
    "int4": quantize_int4,
}


def weight_bytes(weight: Weight) -> int:
    """What a step reads of it."""
    if isinstance(weight, DenseWeight):
        return 4 * weight.weight.numel()
    values = weight.packed if hasattr(weight, "packed") else weight.quantized
    return values.nbytes + weight.scale.nbytes


def random_model(kind: str) -> tuple[HeadWeights, list[LayerWeights]]:
    generator = torch.Generator().manual_seed(5)

    def weight(outputs: int, inputs: int) -> Weight:
        return _FORMATS[kind](torch.randn(outputs, inputs, generator=generator) * inputs**-0.5)

    hidden, inner, vocab = _SIZES.hidden_size, _SIZES.inner_size, _SIZES.vocab_size
    ones, zeros = torch.ones(hidden), torch.zeros(hidden)
    layers = [
        LayerWeights(
            ones, zeros, weight(3 * hidden + inner, hidden), weight(hidden, hidden + inner)
        )
        for _ in range(_SIZES.num_layers)
    ]
    # Beside quantised weights the kernels hold the embedding in float16.
    embedding = torch.randn(vocab, hidden, generator=generator).half().float()
    return HeadWeights(embedding, ones, zeros, weight(vocab, hidden)), layers


def first_logits(head: HeadWeights, layers: list[LayerWeights], token_ids: torch.Tensor) -> Any:
    """Logits of prompts of one token each: attention over one position is its value."""
    hidden, sizes = _SIZES.hidden_size, (_SIZES.hidden_size,)
    x = head.embedding[token_ids.long()].double()
    for layer in layers:
        y = F.layer_norm(x, sizes) @ dequantize(layer.w_in).double().T
        value, mlp = y[:, 2 * hidden : 3 * hidden], y[:, 3 * hidden :]
        both = torch.cat((value, F.gelu(mlp, approximate="tanh")), dim=1)
        x = x + both @ dequantize(layer.w_out).double().T
    return F.layer_norm(x, sizes) @ dequantize(head.lm_head).double().T


def batch_at(token_ids: torch.Tensor, position: int) -> ForwardBatch:
    """One token of each sequence, all at the same position, each in blocks of its own."""
    count = token_ids.shape[0]
    width = -(-_SIZES.max_context // BLOCK_SIZE)
    index = torch.arange(count, dtype=torch.int32)
    tables = torch.arange(count * width, dtype=torch.int32).view(count, width)
    positions = torch.full((count,), position, dtype=torch.int32)
    return ForwardBatch(token_ids, positions, index, tables, index)


@pytest.mark.parametrize("rows", [1, _ROWS])
@pytest.mark.parametrize("kind", _FORMATS)
def bench_decode_step(bench: Any, read_gb_s: float, kind: str, rows: int) -> None:
    """`rows` streams at a context of 64 tokens, with as many threads as torch has."""
    try:
        native_library()
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    head, layers = random_model(kind)
    model = CpuModel.pack(_SIZES, head, layers, num_threads=torch.get_num_threads())
    token_ids = torch.arange(7, 7 + rows, dtype=torch.int32)
    blocks = rows * -(-_SIZES.max_context // BLOCK_SIZE)
    shape = (*_SIZES.kv_block_shape[:2], blocks, *_SIZES.kv_block_shape[2:])
    cache = torch.zeros(shape)

    def check() -> None:
        """Logits of a first token beside plain float64."""
        expected = first_logits(head, layers, token_ids)
        difference = (model.forward(batch_at(token_ids, 0), cache) - expected).abs().max()
        assert difference <= _TOLERANCE[kind] * expected.abs().max()

    context = 64
    for position in range(context):
        model.forward(batch_at(token_ids, position), cache)
    batch = batch_at(token_ids, context)
    weights = [head.lm_head, *(w for layer in layers for w in (layer.w_in, layer.w_out))]
    kv_bytes = 4 * 2 * _SIZES.num_layers * _SIZES.num_heads * _SIZES.head_dim * context * rows
    bench(
        lambda: model.forward(batch, cache),
        check,
        bytes_moved=sum(map(weight_bytes, weights)) + kv_bytes,
        read_gb_s=read_gb_s,
    )
    model.close()
