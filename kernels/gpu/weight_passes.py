"""A weight pass by the way that its number of rows goes: GEMV kernels for few, Matmul for many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptjet.kernels.gpu.gemv_launch import MAX_ROWS, Workspace
from gptjet.kernels.gpu.matmul import Matmul

if TYPE_CHECKING:
    import torch

    from gptjet.kernels.gpu.operations import Operations
    from gptjet.kernels.weights import Weight


class WeightPasses:
    """The two weight passes of a layer, the first of which is the lm_head's too.

    Up to `max_gemv_rows` rows go through the GEMV kernels, which read the weights once for eight of
    them (see routes); more go through `matmul`.
    """

    def __init__(
        self, operations: Operations, matmul: Matmul, workspace: Workspace, max_gemv_rows: int
    ) -> None:
        """`workspace` is the GEMV kernels', of every weight that will be given."""
        self.matmul = matmul
        self._operations = operations
        self._workspace, self._max_gemv_rows = workspace, max_gemv_rows

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        workspace = self._workspace
        return self.matmul.nbytes + workspace.partials.nbytes + workspace.arrivals.nbytes

    def close(self) -> None:
        """Give the buffers back. Nothing is computed afterwards."""
        device = self._workspace.partials.device
        self.matmul = Matmul(self._operations, [], device)
        self._workspace = Workspace.allocate(device, 0, 0)

    def layer_norm_linear(
        self,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
        weight: Weight,
        out: torch.Tensor,
    ) -> None:
        """out [T, N] = linear(layer_norm(residual [T, H] float32)), T any number."""
        if residual.shape[0] > self._max_gemv_rows:
            self.matmul.layer_norm_linear(residual, norm_weight, norm_bias, eps, weight, out)
            return
        for part in _gemv_parts(residual.shape[0]):
            self._operations.layer_norm_linear(
                residual[part],
                norm_weight,
                norm_bias,
                eps,
                weight,
                out[part],
                workspace=self._workspace,
            )

    def gelu_linear_residual(
        self, residual: torch.Tensor, attended: torch.Tensor, inner: torch.Tensor, weight: Weight
    ) -> None:
        """residual [T, H] float32 += linear([attended; gelu(inner)]), T any number."""
        if residual.shape[0] > self._max_gemv_rows:
            self.matmul.gelu_linear_residual(residual, attended, inner, weight)
            return
        for part in _gemv_parts(residual.shape[0]):
            self._operations.gelu_linear_residual(
                residual[part], attended[part], inner[part], weight, workspace=self._workspace
            )


def _gemv_parts(rows: int) -> list[slice]:
    return [slice(first, min(first + MAX_ROWS, rows)) for first in range(0, rows, MAX_ROWS)]
