"""The one seam between the engine and a model: what a backend says of itself and computes."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from gptjet.service.engine.sequence import Sequence


class ParityStatus(enum.StrEnum):
    """State of the self-check at load against transformers on the same weights."""

    NOT_RUN = "not_run"
    PASSED = "passed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityVerdict:
    """What the self-check found. `detail` is one line: versions, and what failed."""

    status: ParityStatus = ParityStatus.NOT_RUN
    max_relative_error: float = 0.0
    tokens_compared: int = 0
    tokens_agreed: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """What a backend can do. The scheduler reads this and nothing else about it.

    max_context    most tokens of one sequence, prompt and output together
    max_sequences  sequences that may hold a KV cache at once
    max_batch_size sequences computed in one decode step
    max_prefill_batch_size  sequences computed in one prefill step
    num_kv_blocks  blocks of `block_size` tokens that all sequences together may hold
    """

    name: str
    model_name: str
    architecture: str
    num_parameters: int
    device: str
    dtype: str
    vocab_size: int
    max_context: int
    max_sequences: int
    max_batch_size: int
    num_kv_blocks: int
    max_prefill_batch_size: int = 1
    block_size: int = 16
    eos_token_ids: tuple[int, ...] = ()
    parity: ParityVerdict = field(default_factory=ParityVerdict)


class Phase(enum.StrEnum):
    """Which half of the work a step does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The sequences of one step. In a prefill step each is computed over its whole prompt (and any
    output it already has, after a preemption); in a decode step over its last token."""

    phase: Phase
    sequences: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """Logits after a prefill step of B sequences.

    logits         [B, V] float32, of each sequence's last position
    prompt_logits  one entry a sequence: [L - 1, V] float32, of every position but the last, where
                   `Sequence.needs_prompt_logits`; else None
    """

    logits: torch.Tensor
    prompt_logits: tuple[torch.Tensor | None, ...]


class Backend(Protocol):
    """A model behind two functions. Only the engine thread calls it, one call at a time.

    A backend keeps the KV cache of a sequence under `Sequence.sequence_id` from its prefill until
    `release`. An exception out of `prefill` or `decode` fails the sequences of that batch, which
    the engine then releases; the backend must stay usable for others.
    """

    @property
    def spec(self) -> BackendSpec:
        """What this backend can do; constant once the model is loaded."""
        ...

    def warm_up(self) -> None:
        """Run what the first request would otherwise pay for. Called once, before serving."""
        ...

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        """Compute the sequences' tokens from the start and keep their KV cache."""
        ...

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        """Compute each sequence's last token against its KV cache: [B, V] float32 logits."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Forget the sequence's KV cache. Unknown sequences are fine."""
        ...

    def close(self) -> None:
        """Give the device's memory back. Nothing is called after it."""
        ...
