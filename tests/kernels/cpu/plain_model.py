"""GPT-J in plain PyTorch, unfused and without a cache, and random weights and batches for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry, ForwardBatch
from gptjet.kernels.weights import (
    DenseWeight,
    HeadWeights,
    LayerWeights,
    Weight,
    dequantize,
    quantize_int4,
    quantize_int8,
)


def geometry(
    hidden: int, heads: int, head_dim: int, rotary: int, inner: int, vocab: int, context: int
) -> BlockGeometry:
    return BlockGeometry(2, hidden, heads, head_dim, rotary, inner, vocab, context)


# heads * head_dim need not be hidden, inner need not be 4 * hidden, and nothing need be a multiple
# of the kernels' 64 columns, 16 lanes, 128 features of a group or 16 tokens of a block.
GEOMETRIES = {
    "embedded": geometry(256, 4, 64, 64, 1024, 512, 96),
    "head32": geometry(128, 4, 32, 16, 512, 257, 64),
    "head32-full-rotary": geometry(64, 2, 32, 32, 256, 300, 80),
    "head48": geometry(96, 2, 48, 24, 384, 257, 50),
    "head80": geometry(160, 2, 80, 32, 640, 256, 70),
    "head96-no-rotary": geometry(96, 1, 96, 0, 384, 257, 64),
    "head128": geometry(256, 2, 128, 64, 1024, 320, 64),
    "head160": geometry(320, 2, 160, 64, 700, 129, 40),
    "head256": geometry(512, 2, 256, 64, 2048, 512, 48),
    "head256-one": geometry(256, 1, 256, 256, 512, 130, 48),
    "narrow-inner": geometry(128, 2, 64, 32, 96, 257, 64),
    "odd-inputs": geometry(101, 3, 34, 10, 203, 127, 45),
    "head38": geometry(76, 2, 38, 38, 130, 65, 33),
    "tiny-vocabulary": geometry(64, 1, 64, 32, 256, 7, 20),
    "long": geometry(64, 2, 32, 16, 128, 100, 700),
}


@dataclass(frozen=True)
class PlainModel:
    geometry: BlockGeometry
    head: HeadWeights
    layers: list[LayerWeights]


def random_model(geometry: BlockGeometry, kind: str, seed: int = 0, group: int = 128) -> PlainModel:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def weight(outputs: int, inputs: int) -> Weight:
        values, bias = normal(outputs, inputs, scale=inputs**-0.5), normal(outputs, scale=0.1)
        if kind == "int8":
            return quantize_int8(values, bias)
        if kind == "int4":
            return quantize_int4(values, bias, group)
        return DenseWeight(values, bias)

    hidden = geometry.hidden_size
    attention = geometry.num_heads * geometry.head_dim
    layers = [
        LayerWeights(
            1 + normal(hidden, scale=0.2),
            normal(hidden, scale=0.2),
            weight(3 * attention + geometry.inner_size, hidden),
            weight(hidden, attention + geometry.inner_size),
        )
        for _ in range(geometry.num_layers)
    ]
    embedding = normal(geometry.vocab_size, hidden)
    head = HeadWeights(
        embedding if kind == "fp32" else embedding.half(),
        1 + normal(hidden, scale=0.2),
        normal(hidden, scale=0.2),
        weight(geometry.vocab_size, hidden),
    )
    return PlainModel(geometry, head, layers)


def _rotate(x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """x: [T, heads, head_dim]; pairs of neighbours turn by position / 10000^(pair / pairs)."""
    turned = x.clone()
    for d in range(0, rotary_dim, 2):
        angle = torch.arange(x.shape[0]).float() / 10000 ** (d / rotary_dim)
        sine, cosine = torch.sin(angle)[:, None], torch.cos(angle)[:, None]
        turned[..., d] = x[..., d] * cosine - x[..., d + 1] * sine
        turned[..., d + 1] = x[..., d + 1] * cosine + x[..., d] * sine
    return turned


def plain_logits(model: PlainModel, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocab] of every token of one sequence, in float64: the truth to compare with."""
    g = model.geometry
    attention = g.num_heads * g.head_dim

    def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
        bias = None if weight.bias is None else weight.bias.double()
        return F.linear(x, dequantize(weight).double(), bias)

    def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (g.hidden_size,), weight.double(), bias.double(), g.layer_norm_eps)

    x = model.head.embedding[token_ids.long()].double()
    tokens = x.shape[0]
    for layer in model.layers:
        y = linear(norm(x, layer.norm_weight, layer.norm_bias), layer.w_in)
        q, k, v, mlp = y.split([attention, attention, attention, g.inner_size], dim=1)
        q, k, v = (part.view(tokens, g.num_heads, g.head_dim) for part in (q, k, v))
        q, k = _rotate(q, g.rotary_dim), _rotate(k, g.rotary_dim)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(g.head_dim)
        ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, -math.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
        inner = torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=1)
        x = x + linear(inner, layer.w_out)
    return linear(norm(x, model.head.norm_weight, model.head.norm_bias), model.head.lm_head)


def empty_cache(geometry: BlockGeometry, num_blocks: int) -> torch.Tensor:
    """A KV cache in which every value that is read before it is written shows."""
    layers, two, heads, tokens, head_dim = geometry.kv_block_shape
    return torch.full((layers, two, num_blocks, heads, tokens, head_dim), math.nan)


class Sequences:
    """Sequences in one cache, whose blocks are out of order; makes batches of their tokens."""

    def __init__(self, geometry: BlockGeometry, prompts: list[torch.Tensor], seed: int = 1) -> None:
        self.prompts = prompts
        self.written = [0] * len(prompts)
        self.width = -(-geometry.max_context // BLOCK_SIZE)
        blocks = len(prompts) * self.width + 3
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
        self.tables = order[: len(prompts) * self.width].view(-1, self.width).int()
        self.kv_cache = empty_cache(geometry, blocks)

    def batch(self, counts: dict[int, int], all_logits: bool = True) -> ForwardBatch:
        """The next `counts[s]` tokens of each sequence s, in the order of `counts`."""
        ids, positions, index, last = [], [], [], []
        for s, count in counts.items():
            begin = self.written[s]
            ids.append(self.prompts[s][begin : begin + count])
            positions.append(torch.arange(begin, begin + count))
            index.append(torch.full((count,), s))
            last.append(sum(map(len, ids)) - 1)
            self.written[s] += count
            assert self.written[s] <= len(self.prompts[s])
        tokens = torch.cat(ids)
        rows = torch.arange(len(tokens)) if all_logits else torch.tensor(last)
        return ForwardBatch(
            tokens.int(),
            torch.cat(positions).int(),
            torch.cat(index).int(),
            self.tables,
            rows.int(),
        )


def random_ids(geometry: BlockGeometry, count: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, geometry.vocab_size, (count,), generator=generator)


def relative_error(logits: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth, worst row."""
    difference = (logits.double() - truth.double()).norm(dim=1)
    return float((difference / truth.double().norm(dim=1)).max())
