"""Weight passes of many rows: cuBLAS through torch, quantised weights as float16 tile by tile."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptjet.kernels.gpu.operations import DequantizeRows
from gptjet.kernels.weights import DenseWeight, Weight

# Values of a tile: 32 MiB of float16, which the larger cards' second-level cache nearly holds.
_TILE_ELEMENTS = 1 << 24


class Matmul:
    """x @ weight.T with one buffer for the tiles, made at once so that a graph may read it."""

    def __init__(
        self, dequantize_rows: DequantizeRows, weights: list[Weight], device: torch.device
    ) -> None:
        """`weights` are those it will be given: dense ones need no buffer."""
        self._dequantize_rows = dequantize_rows
        needed = max((_tile_size(weight) for weight in weights), default=0)
        self._tile = torch.empty(needed, dtype=torch.float16, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self._tile.nbytes

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """x [T, K] float16 times the weight [N, K] transposed, plus its bias: [T, N] float16."""
        if isinstance(weight, DenseWeight):
            bias = None if weight.bias is None else weight.bias.to(x.dtype)
            return F.linear(x, weight.weight, bias)
        outputs, inputs = weight.shape
        out = x.new_empty(x.shape[0], outputs)
        step = _rows_of_tile(weight)
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            tile = self._tile[: (stop - start) * inputs].view(stop - start, inputs)
            self._dequantize_rows(weight, start, stop, tile)
            torch.mm(x, tile.T, out=out[:, start:stop])
        if weight.bias is not None:
            out += weight.bias
        return out

    def layer_norm_linear(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
        weight: Weight,
        out: torch.Tensor,
    ) -> None:
        """out [T, N] = linear(layer_norm(x [T, H] float32)), the LayerNorm in float32."""
        normed = F.layer_norm(x, (x.shape[1],), norm_weight, norm_bias, eps)
        out.copy_(self.linear(normed.half(), weight))

    def gelu_linear_residual(
        self, residual: torch.Tensor, attended: torch.Tensor, inner: torch.Tensor, weight: Weight
    ) -> None:
        """residual [T, H] float32 += linear([attended; gelu(inner)])."""
        inputs = torch.cat((attended, F.gelu(inner, approximate="tanh")), dim=1)
        residual += self.linear(inputs, weight)


def _rows_of_tile(weight: Weight) -> int:
    return max(1, _TILE_ELEMENTS // weight.shape[1])


def _tile_size(weight: Weight) -> int:
    if isinstance(weight, DenseWeight):
        return 0
    outputs, inputs = weight.shape
    return min(outputs, _rows_of_tile(weight)) * inputs
