"""Small checkpoints, loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused.forward import TorchModel
from gptjet.service.models.fused.weights import FusedWeights, load_fused_weights


@pytest.fixture
def load_weights() -> Callable[..., FusedWeights]:
    """`load_weights(folder, "fp32")`"""

    def load(folder: Path | str, weight_type: str = "fp32") -> FusedWeights:
        return load_fused_weights(
            resolve_checkpoint(str(folder)),
            weight_type,  # type: ignore[arg-type]
            progress=False,
        )

    return load


@pytest.fixture
def load_model(load_weights: Callable[..., FusedWeights]) -> Callable[..., TorchModel]:
    """`load_model(folder, "fp32")`"""

    def load(folder: Path | str, weight_type: str = "fp32") -> TorchModel:
        weights = load_weights(folder, weight_type)
        return TorchModel(weights.geometry, weights.head, weights.layers())

    return load
