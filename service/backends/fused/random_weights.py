"""Seeded random weights in the fused layout, drawn a layer at a time on the device that computes.

The same numbers every time, so a layer can be drawn again instead of kept: the reference and the
kernels get the same model, one after the other, and never is more than one copy of it in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptjet.kernels.batch import BlockGeometry
from gptjet.kernels.gpu.compile_case import GPT_J_6B
from gptjet.kernels.weights import (
    DenseWeight,
    HeadWeights,
    LayerWeights,
    Weight,
    quantize_int4,
    quantize_int8,
)
from gptjet.service.backends.fused.model import WEIGHT_TYPES
from gptjet.service.models.fused.description import Description
from gptjet.service.models.fused.weights import FusedWeights

GEOMETRIES: dict[str, BlockGeometry] = {
    "gpt-j-6b": GPT_J_6B,
    # What an interpreted kernel does in under a second.
    "tiny": BlockGeometry(
        num_layers=1,
        hidden_size=32,
        num_heads=1,
        head_dim=32,
        rotary_dim=8,
        inner_size=32,
        vocab_size=61,
        max_context=16,
    ),
}

_SEED = 6
# Wide enough that every position matters, narrow enough for FP16: as in `backends.measure`.
_GAIN = 0.8
_BIAS = 0.05


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """The weights of one seeded model. weight_type: "float16", or "int8" or "int4" made of that."""

    geometry: BlockGeometry
    weight_type: str
    device: torch.device

    def head(self) -> HeadWeights:
        """Embedding and lm_head, untied as GPT-J's are."""
        draw = _Draw(self.device, _SEED)
        sizes = self.geometry
        embedding = draw.matrix(sizes.vocab_size, sizes.hidden_size)
        norm_weight, norm_bias = draw.norm(sizes.hidden_size)
        lm_head = self._stored(draw, sizes.vocab_size, sizes.hidden_size, zeros=0)
        return HeadWeights(embedding, norm_weight, norm_bias, lm_head)

    def layer(self, number: int) -> LayerWeights:
        """Layer `number`, the same at every call."""
        draw = _Draw(self.device, _SEED + 1 + number)
        sizes = self.geometry
        hidden, width = sizes.hidden_size, sizes.num_heads * sizes.head_dim
        norm_weight, norm_bias = draw.norm(hidden)
        # q, k and v have no bias.
        w_in = self._stored(draw, 3 * width + sizes.inner_size, hidden, zeros=3 * width)
        w_out = self._stored(draw, hidden, width + sizes.inner_size, zeros=0)
        return LayerWeights(norm_weight, norm_bias, w_in, w_out)

    def weights(self) -> FusedWeights:
        """As the loader of a checkpoint gives them: the layers once, each drawn when asked for."""
        return FusedWeights(
            description=Description(self.geometry, is_tied=False, eos_token_ids=()),
            class_name="GPTJForCausalLM",
            head=self.head(),
            weight_type=WEIGHT_TYPES[self.weight_type],
            num_parameters=count_parameters(self.geometry),
            quantization=None,
            read_layer=self.layer,
            read_lm_head=lambda: self.head().lm_head,
            progress=False,
        )

    def _stored(self, draw: _Draw, outputs: int, inputs: int, *, zeros: int) -> Weight:
        values, bias = draw.matrix(outputs, inputs), draw.bias(outputs)
        bias[:zeros] = 0
        if self.weight_type == "int8":
            return quantize_int8(values, bias)
        if self.weight_type == "int4":
            return quantize_int4(values, bias)
        return DenseWeight(values, bias)


def count_parameters(geometry: BlockGeometry) -> int:
    """Of GPT-J with these sizes: 6,050,882,784 of GPT-J-6B."""
    hidden, inner = geometry.hidden_size, geometry.inner_size
    width = geometry.num_heads * geometry.head_dim
    block = 4 * hidden * width + 2 * hidden * inner + inner + hidden + 2 * hidden
    outside = 2 * geometry.vocab_size * hidden + geometry.vocab_size + 2 * hidden
    return geometry.num_layers * block + outside


class _Draw:
    def __init__(self, device: torch.device, seed: int) -> None:
        self._device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def matrix(self, outputs: int, inputs: int) -> torch.Tensor:
        values = torch.empty(outputs, inputs, dtype=torch.float16, device=self._device)
        return values.normal_(0.0, _GAIN * inputs**-0.5, generator=self._generator)

    def bias(self, size: int) -> torch.Tensor:
        values = torch.empty(size, device=self._device)
        return values.normal_(0.0, _BIAS, generator=self._generator)

    def norm(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return 1 + self.bias(size), self.bias(size)
