"""Weight passes of many rows: dot_linear where the routes say so, cuBLAS through torch elsewhere.

cuBLAS gets quantised weights as float16, tile by tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptjet.kernels.gpu.gemv_launch import SMALLEST_DOT_GROUP, Workspace, capability_of
from gptjet.kernels.gpu.operations import Operations
from gptjet.kernels.gpu.routes import route_of
from gptjet.kernels.gpu.tuning import DOT_ROWS
from gptjet.kernels.weights import DenseWeight, Int4Weight, Weight

# Values of a tile: 32 MiB of float16, which the larger cards' second-level cache nearly holds.
_TILE_ELEMENTS = 1 << 24


class Matmul:
    """x @ weight.T with one buffer for the tiles, made at once so that a graph may read it."""

    def __init__(
        self,
        operations: Operations,
        weights: list[Weight],
        device: torch.device,
        *,
        capability: int | None = None,
        dot_rows: int | None = None,
    ) -> None:
        """`weights` are those it will be given: dense ones need no buffer.

        capability  whose routes are taken; the device's, if None
        dot_rows    most rows that go to dot_linear, whatever the routes say; theirs, if None
        """
        self._operations = operations
        self._capability = capability_of(device) if capability is None else capability
        self._dot_rows = dot_rows
        needed = max((_tile_size(weight) for weight in weights), default=0)
        self._tile = torch.empty(needed, dtype=torch.float16, device=device)
        self._most = max((self._most_dot_rows(weight) for weight in weights), default=0)
        by_dot = [(most, weight) for weight in weights if (most := self._most_dot_rows(weight))]
        self._workspace = Workspace.for_dot(device, by_dot, self._capability)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        workspace = self._workspace
        return self._tile.nbytes + workspace.partials.nbytes + workspace.arrivals.nbytes

    @property
    def kinds_of_rows(self) -> tuple[int, ...]:
        """Numbers of rows that launch every kernel there is, a tile of dot_linear each."""
        below = tuple(rows for rows in DOT_ROWS if rows < self._most)
        return (*below, self._most, self._most + 1) if self._most else (1,)

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """x [T, K] float16 times the weight [N, K] transposed, plus its bias: [T, N] float16."""
        if self._is_for_dot(x.shape[0], weight):
            out = x.new_empty(x.shape[0], weight.shape[0])
            self._dot(x, weight, out)
            return out
        if isinstance(weight, DenseWeight):
            bias = None if weight.bias is None else weight.bias.to(x.dtype)
            return F.linear(x, weight.weight, bias)
        outputs, inputs = weight.shape
        out = x.new_empty(x.shape[0], outputs)
        step = _rows_of_tile(weight)
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            tile = self._tile[: (stop - start) * inputs].view(stop - start, inputs)
            self._operations.dequantize_rows(weight, start, stop, tile)
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
        normed = F.layer_norm(x, (x.shape[1],), norm_weight, norm_bias, eps).half()
        if self._is_for_dot(x.shape[0], weight):
            self._dot(normed, weight, out)
        else:
            out.copy_(self.linear(normed, weight))

    def gelu_linear_residual(
        self, residual: torch.Tensor, attended: torch.Tensor, inner: torch.Tensor, weight: Weight
    ) -> None:
        """residual [T, H] float32 += linear([attended; gelu(inner)])."""
        inputs = torch.cat((attended, F.gelu(inner, approximate="tanh")), dim=1)
        if self._is_for_dot(inputs.shape[0], weight):
            self._dot(inputs, weight, residual, add=True)
        else:
            residual += self.linear(inputs, weight)

    def _is_for_dot(self, rows: int, weight: Weight) -> bool:
        # Fewer rows than dot_rows come here where a pass has no GEMV of them (a short prefill, a
        # model of several weight types): their bytes speak for dot_linear all the more.
        return 0 < rows <= self._most_dot_rows(weight)

    def _most_dot_rows(self, weight: Weight) -> int:
        if isinstance(weight, Int4Weight) and weight.group < SMALLEST_DOT_GROUP:
            return 0
        if self._dot_rows is not None:
            return self._dot_rows
        span = route_of(weight, self._capability).dot_rows
        return 0 if span is None else span[1]

    def _dot(
        self, x: torch.Tensor, weight: Weight, out: torch.Tensor, *, add: bool = False
    ) -> None:
        self._operations.dot_linear(x, weight, out, add=add, workspace=self._workspace)


def _rows_of_tile(weight: Weight) -> int:
    return max(1, _TILE_ELEMENTS // weight.shape[1])


def _tile_size(weight: Weight) -> int:
    if isinstance(weight, DenseWeight):
        return 0
    outputs, inputs = weight.shape
    return min(outputs, _rows_of_tile(weight)) * inputs
