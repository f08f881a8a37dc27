"""What is served of a checkpoint's configuration, in plain values.

transformers reads and checks the configuration; who has a Description needs transformers no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptjet.kernels.batch import BlockGeometry
from gptjet.service.models.checkpoint import Checkpoint
from gptjet.service.models.fused import families
from gptjet.service.models.geometry import eos_token_ids


@dataclass(frozen=True, slots=True)
class Description:
    """is_tied  embedding and lm_head may be one tensor (tie_word_embeddings)"""

    geometry: BlockGeometry
    is_tied: bool
    eos_token_ids: tuple[int, ...]


def describe(checkpoint: Checkpoint, config: Any) -> Description:
    """Of a checkpoint of the family, from transformers' configuration. Raises BackendLoadError."""
    families.check_family(checkpoint)
    geometry = families.block_geometry(checkpoint, config)
    return Description(
        geometry,
        bool(config.tie_word_embeddings),
        eos_token_ids(config, checkpoint.generation_config, geometry.vocab_size),
    )
