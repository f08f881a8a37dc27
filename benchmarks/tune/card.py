"""Times launches on the present CUDA device, each checked against the reference first."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from gptjet.benchmarks.tune.search import RefusedTileError
from gptjet.kernels import reference
from gptjet.kernels.gpu.compile_case import GPT_J_6B
from gptjet.kernels.gpu.dot_linear import dot_linear
from gptjet.kernels.gpu.gelu_linear_residual import gelu_linear_residual
from gptjet.kernels.gpu.gemv_launch import Workspace, capability_of, workspace_needs
from gptjet.kernels.gpu.layer_norm_linear import layer_norm_linear
from gptjet.kernels.gpu.tuning import DOT_LINEAR, Launch, Tile
from gptjet.kernels.weights import DenseWeight, Int4Weight, Int8Weight, Weight

# More than the largest second-level cache (H100: 50 MB) by far, so that weights come from memory.
_WORKING_SET_BYTES = 512 << 20
_REPEATS = 7
_EPS = 1e-5
# Of the largest output: float16 outputs are rounded by 2^-11 and sums of 20,480 float32 products by
# less than a tenth of it; a wrong tile is wrong by far more.
_TOLERANCE = 1e-3


class LaunchTensors:
    """Weights, activations and the expected result of one launch, on any device.

    Weights are random levels rather than a rounded matrix: quantising would take longer than timing
    does. working_set_bytes asks for so many copies of the weight that they are not in a cache.
    """

    def __init__(self, launch: Launch, device: torch.device, working_set_bytes: int) -> None:
        rows, n, k = launch.rows, launch.n, launch.k
        torch.manual_seed(n + k)
        self._launch = launch
        self._device = device
        first = self._weight()
        count = max(1, -(-working_set_bytes // stored_bytes(first)))
        self.weights = [first, *(self._weight() for _ in range(count - 1))]
        self._is_first_pass = launch.kernel == "layer_norm_linear"
        self._is_dot = launch.kernel == DOT_LINEAR
        # As a model launches it: W_out alone has more features than outputs.
        self._is_added = launch.kernel == "gelu_linear_residual" or (self._is_dot and k > n)
        if self._is_dot:
            self._x = torch.randn(rows, k, device=device).half()
            wide = self._is_added or n == GPT_J_6B.vocab_size
            dtype = torch.float32 if wide else torch.float16
            self._out = torch.empty(rows, n, dtype=dtype, device=device)
            self._expected = reference.linear(self._x.float(), first)
        elif self._is_first_pass:
            self._x = torch.randn(rows, k, device=device)
            self._gain, self._offset = torch.randn(2, k, device=device)
            # Logits are float32; what a block projects is float16.
            dtype = torch.float32 if n == GPT_J_6B.vocab_size else torch.float16
            self._out = torch.empty(rows, n, dtype=dtype, device=device)
            self._expected = reference.layer_norm_linear(
                self._x, self._gain, self._offset, _EPS, first
            )
        else:
            # W_out takes as many attended features as it has outputs.
            self._attended = torch.randn(rows, n, device=device).half()
            self._inner = torch.randn(rows, k - n, device=device).half()
            self._out = torch.empty(rows, n, device=device)
            self._expected = torch.zeros(rows, n, device=device)
            reference.gelu_linear_residual(
                self._expected, self._attended.float(), self._inner.float(), first
            )

    def run(self, weight: Weight, tile: Tile, workspace: Workspace) -> None:
        """One launch."""
        if self._is_dot:
            dot_linear(
                self._x, weight, self._out, add=self._is_added, workspace=workspace, tile=tile
            )
        elif self._is_first_pass:
            layer_norm_linear(
                self._x,
                self._gain,
                self._offset,
                _EPS,
                weight,
                self._out,
                workspace=workspace,
                tile=tile,
            )
        else:
            gelu_linear_residual(
                self._out, self._attended, self._inner, weight, workspace=workspace, tile=tile
            )

    def check(self, tile: Tile, workspace: Workspace) -> None:
        """Raise RefusedTileError unless the result is the reference's."""
        difference, allowed = self.difference(tile, workspace)
        if not difference <= allowed:
            raise RefusedTileError(
                f"differs from the reference by {difference:.3g}, limit {allowed:.3g}"
            )

    def difference(self, tile: Tile, workspace: Workspace) -> tuple[float, float]:
        """(largest difference from the reference, limit), of the first weight."""
        self._out.fill_(0 if self._is_added else float("nan"))
        self.run(self.weights[0], tile, workspace)
        difference = float((self._out.float() - self._expected).abs().max())
        return difference, _TOLERANCE * float(self._expected.abs().max())

    def _weight(self) -> Weight:
        launch = self._launch
        return make_weight(launch.weight_type, launch.n, launch.k, self._device)


def make_weight(kind: str, n: int, k: int, device: torch.device) -> Weight:
    """A random weight: "fp16", "int8" or "int4", of random levels."""
    bias = torch.randn(n, device=device)
    if kind == "fp16":
        return DenseWeight((torch.randn(n, k, device=device) * k**-0.5).half(), bias)
    if kind == "int8":
        levels = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        return Int8Weight(levels, torch.rand(n, device=device) / (64 * k**0.5), bias)
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    scale = (torch.randn(n, -(-k // 128), device=device) / (4 * k**0.5)).half()
    return Int4Weight(packed, scale, k, bias=bias)


def stored_bytes(weight: Weight) -> int:
    """Of its values, scales and bias left out."""
    if isinstance(weight, DenseWeight):
        return weight.weight.nbytes
    return weight.quantized.nbytes if isinstance(weight, Int8Weight) else weight.packed.nbytes


class CudaCard:
    """A Card of search.py. Raises RuntimeError where there is no CUDA device."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device")
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._tensors: LaunchTensors | None = None

    @property
    def name(self) -> str:
        """As the driver calls it."""
        return torch.cuda.get_device_name(self._device)

    @property
    def capability(self) -> int:
        """80 for 8.0."""
        return capability_of(self._device)

    def prepare(self, launch: Launch) -> None:
        """Weights beyond the cache, activations, and what the first weight's result must be."""
        self._tensors = None
        self._tensors = LaunchTensors(launch, self._device, _WORKING_SET_BYTES)

    def seconds(self, launch: Launch, tile: Tile) -> float:
        """Median of some replays of a CUDA graph that launches over all weights in turn."""
        if self._tensors is None:
            raise RuntimeError("prepare comes first")
        tensors = self._tensors
        workspace = Workspace.allocate(self._device, *workspace_needs(launch.rows, launch.n, tile))
        try:
            tensors.check(tile, workspace)
        except (RefusedTileError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            # Whatever the compiler or the driver has against a tile, the next one may do.
            line = (str(error).splitlines() or [""])[0]
            raise RefusedTileError(f"{type(error).__name__}: {line}") from error

        def all_weights() -> None:
            for weight in tensors.weights:
                tensors.run(weight, tile, workspace)

        return replay_seconds(all_weights) / len(tensors.weights)


def replay_seconds(work: Callable[[], None]) -> float:
    """Median time of some replays of a CUDA graph of `work`, which has run before."""
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times: list[float] = []
    for _ in range(_REPEATS):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
