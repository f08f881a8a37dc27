"""Each weight pass at GPT-J-6B's sizes, as a share of the measured copy bandwidth of the card.

Where parity is red, nothing is timed; where there is no card, each says so and is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gptjet.benchmarks.bandwidth import measure_in_subprocess
from gptjet.kernels.gpu.compile_case import GPT_J_6B
from gptjet.kernels.gpu.gemv_launch import Workspace, capability_of, workspace_needs
from gptjet.kernels.gpu.tuning import (
    DOT_LINEAR,
    FIRST_WITH_DOT,
    WEIGHT_TYPES,
    Launch,
    choose_tile,
)

_HIDDEN, _INNER = GPT_J_6B.hidden_size, GPT_J_6B.inner_size
_PASSES = {
    "w_in": ("layer_norm_linear", 3 * _HIDDEN + _INNER, _HIDDEN),
    "w_out": ("gelu_linear_residual", _HIDDEN, _HIDDEN + _INNER),
    "lm_head": ("layer_norm_linear", GPT_J_6B.vocab_size, _HIDDEN),
}
# More than any second-level cache, so that every launch reads its weights from memory.
_WORKING_SET_BYTES = 512 << 20


@pytest.fixture(scope="module")
def card_copy_gb_s() -> float:
    """Of the card. A machine without one skips here, and what follows needs one."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device: the GPU kernels are timed on a card only")
    return float(measure_in_subprocess("cuda")["copy_gb_s"])


@pytest.fixture
def release() -> Iterator[None]:
    """Half a gigabyte of weights, back before the next one."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
@pytest.mark.parametrize("name", _PASSES)
def bench_weight_pass(
    bench: Any, card_copy_gb_s: float, name: str, weight_type: str, rows: int
) -> None:
    """All copies of the weights in turn, in one CUDA graph: what a decode step launches."""
    kernel, n, k = _PASSES[name]
    _bench_launch(bench, card_copy_gb_s, kernel, (n, k), weight_type, rows)


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("weight_type", ["int8", "int4"])
@pytest.mark.parametrize("name", _PASSES)
def bench_dot_linear(
    bench: Any, card_copy_gb_s: float, name: str, weight_type: str, rows: int
) -> None:
    """The same on the matrix units, for a batch; dense weights go to cuBLAS."""
    if capability_of(torch.device("cuda")) < FIRST_WITH_DOT:
        pytest.skip(f"dot_linear needs sm_{FIRST_WITH_DOT} or newer")
    _, n, k = _PASSES[name]
    _bench_launch(bench, card_copy_gb_s, DOT_LINEAR, (n, k), weight_type, rows)


def _bench_launch(
    bench: Any,
    card_copy_gb_s: float,
    kernel: str,
    shape: tuple[int, int],
    weight_type: str,
    rows: int,
) -> None:
    from gptjet.benchmarks.tune.card import LaunchTensors

    n, k = shape
    device = torch.device("cuda")
    tile = choose_tile(kernel, capability_of(device), rows, n, k, weight_type)
    launch = Launch(kernel, capability_of(device), rows, n, k, weight_type)
    tensors = LaunchTensors(launch, device, _WORKING_SET_BYTES)
    workspace = Workspace.allocate(device, *workspace_needs(rows, n, tile))
    graph: Any = torch.cuda.CUDAGraph()

    def check() -> None:
        """Beside the reference; what it compiles must not be compiled during the capture."""
        tensors.check(tile, workspace)
        with torch.cuda.graph(graph):
            for weight in tensors.weights:
                tensors.run(weight, tile, workspace)

    def work() -> None:
        graph.replay()
        torch.cuda.synchronize()

    bench(
        work,
        check,
        bytes_moved=len(tensors.weights) * _weight_bytes(n, k, weight_type),
        copy_gb_s=card_copy_gb_s,
    )


def _weight_bytes(n: int, k: int, weight_type: str) -> float:
    """Weights and their scales: what a launch cannot do without, activations left out."""
    scales = {"fp16": 0, "int8": 4 * n, "int4": 2 * n * (k // 128)}[weight_type]
    return WEIGHT_TYPES[weight_type] * n * k + scales
