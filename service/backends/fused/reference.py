"""What transformers says of a checkpoint: its configuration, its tokenizer, its logits for probes.

Importing this imports transformers' models, 170 MiB of them: see `reference_process`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptjet.service.backends import layerwise, parity
from gptjet.service.backends.device import give_back
from gptjet.service.backends.fused.groundwork import Groundwork
from gptjet.service.models.architecture import build_config, verify_architecture
from gptjet.service.models.checkpoint import Checkpoint
from gptjet.service.models.fused.description import Description, describe
from gptjet.service.models.fused.layout import DENSE_DTYPES, WeightType
from gptjet.service.models.fused.weights import FusedWeights, load_fused_weights
from gptjet.service.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch


class Reference:
    """Of one checkpoint. `describe` comes first."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._config: Any = None
        self._description: Description | None = None

    def describe(self) -> Groundwork:
        """Compare the checkpoint with transformers' own model. Raises BackendLoadError."""
        checkpoint = self._checkpoint
        if checkpoint.is_quantized:
            self._config = build_config(checkpoint, allow_quantized=True)
        else:
            self._config = verify_architecture(checkpoint).config
        self._description = describe(checkpoint, self._config)
        # Always local: resolve_checkpoint has downloaded what there is.
        tokenizer = load_tokenizer(checkpoint.path, local_files_only=True)
        return Groundwork(self._description, tokenizer.parts())

    def record(
        self, weight_type: WeightType, prompts: Sequence[Sequence[int]]
    ) -> dict[str, list[parity.Trace]]:
        """The references to hold the fused path to, before it is loaded.

        "weights": of the very values that will be served. "floats": of the weights as they were
        before they were quantised here. Raises BackendLoadError.
        """
        references = {}
        is_quantized = weight_type not in DENSE_DTYPES
        if not self._checkpoint.is_quantized:
            if self._checkpoint.is_pickle:
                self._load(weight_type)  # its tensors are not known, and checked, before
            source = layerwise.StoredWeights(self._checkpoint, self._config)
            references["floats" if is_quantized else "weights"] = self._trace(source, prompts)
        if is_quantized:
            values = layerwise.FusedValues(self._load(weight_type))
            references["weights"] = self._trace(values, prompts)
        give_back(self._device)
        return references

    def close(self) -> None:
        """Nothing: what is held goes with this object."""

    def _load(self, weight_type: WeightType) -> FusedWeights:
        return load_fused_weights(
            self._checkpoint, weight_type, progress=False, description=self._description
        )

    def _trace(
        self, source: layerwise.WeightSource, prompts: Sequence[Sequence[int]]
    ) -> list[parity.Trace]:
        assert self._description is not None
        geometry = self._description.geometry

        def last_logits(sequences: list[tuple[int, ...]], wanted: list[int]) -> list[torch.Tensor]:
            return layerwise.last_logits(source, sequences, wanted, self._device)

        return parity.record_forced(last_logits, prompts, geometry.vocab_size, geometry.max_context)
