"""Times a block's two weight passes on the present CUDA device, by each way, checked first."""

from __future__ import annotations

import torch

from gptjet.benchmarks.tune.card import make_weight, replay_seconds, stored_bytes
from gptjet.benchmarks.tune.route_search import LADDER
from gptjet.benchmarks.tune.search import RefusedTileError
from gptjet.kernels import reference
from gptjet.kernels.batch import BlockGeometry
from gptjet.kernels.gpu.compile_case import GPT_J_6B
from gptjet.kernels.gpu.gemv_launch import MAX_ROWS, Workspace, capability_of
from gptjet.kernels.gpu.matmul import Matmul
from gptjet.kernels.gpu.operations import triton_operations
from gptjet.kernels.gpu.routes import Way
from gptjet.kernels.gpu.tuning import FIRST_WITH_DOT
from gptjet.kernels.gpu.weight_passes import WeightPasses
from gptjet.kernels.weights import Weight

_WORKING_SET_BYTES = 512 << 20
_EPS = 1e-5
# Of the largest output: the normed row, gelu(inner), INT4 weights and the output of cuBLAS are
# float16, each rounded by 2^-11.
_TOLERANCE = 4e-3
_KINDS = {"float16": "fp16", "int8": "int8", "int4": "int4"}


class PassTensors:
    """Some blocks' weights, the activations of up to `most_rows` rows and what must come of them.

    working_set_bytes asks for so many blocks that their weights are not in a cache.
    """

    def __init__(
        self,
        weight_type: str,
        device: torch.device,
        *,
        working_set_bytes: int,
        geometry: BlockGeometry = GPT_J_6B,
        most_rows: int = LADDER[-1],
    ) -> None:
        hidden, inner = geometry.hidden_size, geometry.inner_size
        self._width = geometry.num_heads * geometry.head_dim
        kind = _KINDS[weight_type]
        torch.manual_seed(hidden + inner)

        def block() -> tuple[Weight, Weight]:
            first = make_weight(kind, 3 * self._width + inner, hidden, device)
            return first, make_weight(kind, hidden, self._width + inner, device)

        one = block()
        count = max(1, -(-working_set_bytes // sum(map(stored_bytes, one))))
        self.blocks = [one, *(block() for _ in range(count - 1))]
        self._x = torch.randn(most_rows, hidden, device=device)
        self._gain, self._offset = torch.randn(2, hidden, device=device)
        self._projected = torch.empty(most_rows, one[0].shape[0], device=device).half()
        self._activations = torch.randn(most_rows, one[1].shape[1], device=device).half()
        self._residual = torch.empty(most_rows, hidden, device=device)
        self._expected = reference.layer_norm_linear(
            self._x, self._gain, self._offset, _EPS, one[0]
        )
        self._added = torch.zeros_like(self._residual)
        attended, gated = self._split(most_rows)
        reference.gelu_linear_residual(self._added, attended.float(), gated.float(), one[1])
        self._ways = self._make_ways(device, most_rows)

    def _make_ways(self, device: torch.device, most_rows: int) -> dict[Way, WeightPasses]:
        run = triton_operations()
        weights = [weight for block in self.blocks[:1] for weight in block]
        kernels = ("layer_norm_linear", "gelu_linear_residual")
        of_gemv = Workspace.for_weights(device, zip(kernels, weights, strict=True), MAX_ROWS)
        none = Workspace.allocate(device, 0, 0)
        by_cublas = Matmul(run, weights, device, dot_rows=0)
        ways: dict[Way, WeightPasses] = {
            "gemv": WeightPasses(run, by_cublas, of_gemv, most_rows),
            "cublas": WeightPasses(run, by_cublas, none, 0),
        }
        if device.type != "cuda" or capability_of(device) >= FIRST_WITH_DOT:
            ways["dot"] = WeightPasses(
                run, Matmul(run, weights, device, dot_rows=most_rows), none, 0
            )
        return ways

    def run(self, way: Way, rows: int, index: int) -> None:
        """Both passes of one block."""
        first, second = self.blocks[index]
        by = self._ways[way]
        out = self._projected[:rows]
        by.layer_norm_linear(self._x[:rows], self._gain, self._offset, _EPS, first, out)
        by.gelu_linear_residual(self._residual[:rows], *self._split(rows), second)

    def check(self, way: Way, rows: int) -> None:
        """Raise RefusedTileError unless the results of the first block are the reference's."""
        self._projected.fill_(torch.nan)
        self._residual.zero_()
        self.run(way, rows, 0)
        for name, got, expected in (
            ("the first pass", self._projected, self._expected),
            ("the second pass", self._residual, self._added),
        ):
            difference = float((got[:rows].float() - expected[:rows]).abs().max())
            allowed = _TOLERANCE * float(expected[:rows].abs().max())
            if not difference <= allowed:
                raise RefusedTileError(
                    f"{name} differs from the reference by {difference:.3g}, limit {allowed:.3g}"
                )

    def _split(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(attended, inner)."""
        rows_of = self._activations[:rows]
        return rows_of[:, : self._width], rows_of[:, self._width :]


class CudaRouteCard:
    """A RouteCard of route_search.py. Raises RuntimeError where there is no CUDA device."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device")
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._tensors: PassTensors | None = None

    @property
    def name(self) -> str:
        """As the driver calls it."""
        return torch.cuda.get_device_name(self._device)

    @property
    def capability(self) -> int:
        """80 for 8.0."""
        return capability_of(self._device)

    def prepare_passes(self, weight_type: str) -> None:
        """Weights beyond the cache, activations, and what the first block's results must be."""
        self._tensors = None
        self._tensors = PassTensors(weight_type, self._device, working_set_bytes=_WORKING_SET_BYTES)

    @torch.no_grad()
    def pass_seconds(self, way: Way, rows: int) -> float:
        """Median of some replays of a CUDA graph of all blocks in turn, for one block."""
        if self._tensors is None:
            raise RuntimeError("prepare_passes comes first")
        tensors = self._tensors
        try:
            tensors.check(way, rows)
        except (RefusedTileError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise RefusedTileError(f"{type(error).__name__}: {line}") from error

        def all_blocks() -> None:
            for index in range(len(tensors.blocks)):
                tensors.run(way, rows, index)

        return replay_seconds(all_blocks) / len(tensors.blocks)
