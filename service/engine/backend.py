"""The one seam between the engine and a model: what a backend says of itself and computes."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator

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
    paged          its KV cache is addressed by `Sequence.block_table` and by nothing else, and what
                   it computes for a token does not depend on how the tokens are divided into steps:
                   so blocks can be shared (prefix cache, n > 1) and prompts computed in chunks
    max_prefill_tokens  tokens of one prefill step over its sequences; None: whole prompts only.
                   For paged backends.
    max_draft_tokens  guesses a sequence may have verified in one decode step. For paged backends.
    samples_on_device  it is a SamplingBackend. For paged backends.
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
    paged: bool = False
    max_prefill_tokens: int | None = None
    max_draft_tokens: int = 0
    samples_on_device: bool = False
    eos_token_ids: tuple[int, ...] = ()
    parity: ParityVerdict = field(default_factory=ParityVerdict)


class Phase(enum.StrEnum):
    """Which half of the work a step does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The sequences of one step, and how many tokens of each are computed.

    A prefill step computes tokens [num_computed_tokens, num_computed_tokens + num_tokens[i]) of
    sequence i: its whole prompt (and any output it already has, after a preemption), what the
    prefix cache did not hold of it, or a chunk. A decode step computes the last token of each and
    the drafts that follow it: num_tokens[i] = 1 + len(draft_token_ids).

    num_tokens    one entry a sequence; empty means all of it: whole prompts, single tokens
    block_copies  (source, destination) KV blocks, copied before anything is computed: in order, or
                  all sources read first, since a source may be the destination of a later pair
    """

    phase: Phase
    sequences: tuple[Sequence, ...]
    num_tokens: tuple[int, ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """A decode step of B sequences whose next tokens the backend chooses.

    One entry a sequence in each of these:

    positions      of the token that is computed
    token_ids      that token; moot where `sources` names a row
    sources        row of the step launched before this one, whose choice is that token; -1: none
    draw_positions  tokens that the sequence has generated before the one that is chosen now: its
                   place in the random stream (see philox)

    How the token is chosen stands in each sequence's `sampling_state`.
    """

    sequences: tuple[Sequence, ...]
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    sources: tuple[int, ...]
    draw_positions: tuple[int, ...]
    block_copies: tuple[tuple[int, int], ...] = ()


class SampledTokenIds(Protocol):
    """What a launched step will have chosen."""

    def wait(self) -> list[int]:
        """The ids [B], once there; -1 for a row whose logits are not usable (see Sampler).

        Raises what went wrong in the step.
        """
        ...


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """Logits after a prefill step of B sequences.

    logits         [B, V] float32, of the last position computed of each sequence. The row of one
                   whose prompt goes on in a later chunk is not read, and may hold anything.
    prompt_logits  one entry a sequence, where `Sequence.needs_prompt_logits`; else None: [N, V]
                   float32, of every position computed in this step, without the sequence's very
                   last one. N is num_tokens, less one in the chunk that ends the sequence.
    """

    logits: torch.Tensor
    prompt_logits: tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Candidates to be scored after one prompt, and the KV blocks to do it in.

    job_id             unique in the engine's life, and distinct from every sequence_id
    block_table        for paged backends: blocks of the prompt first, of which the leading
                       `num_cached_tokens` tokens are computed already and are shared, so read-only;
                       then, for each candidate in turn, blocks_for(P % block_size + len(candidate))
                       blocks of its own, P being the prompt's length
    """

    job_id: int
    prompt_token_ids: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    block_table: tuple[int, ...] = ()
    num_cached_tokens: int = 0


class Backend(Protocol):
    """A model behind three functions. Only the engine thread calls it, one call at a time.

    A backend keeps the KV cache of a sequence under `Sequence.sequence_id` (a paged one: in the
    blocks of its block_table) from its prefill until `release`. An exception out of `prefill` or
    `decode` fails the sequences of that batch, which the engine then releases; the backend must
    stay usable for others.
    """

    @property
    def spec(self) -> BackendSpec:
        """What this backend can do; constant once the model is loaded."""
        ...

    def warm_up(self) -> None:
        """Run what the first request would otherwise pay for. Called once, before serving."""
        ...

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        """Compute the sequences' tokens and keep their KV cache."""
        ...

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        """Compute each sequence's last token, and its drafts after it, against its KV cache.

        [sum of num_tokens, V] float32 logits, the rows of a sequence together and in token order:
        row i of a sequence follows its last token and its first i drafts.
        """
        ...

    def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        """Log-probabilities of each candidate's tokens after the prompt: [C] float32 each.

        A generator, so that running streams need not wait for all of it: it yields between pieces
        of work no longer than a prefill step, and other calls may come between. Closing it early
        frees what it holds.
        """
        ...

    def release(self, sequence: Sequence) -> None:
        """Forget the sequence's KV cache. Unknown sequences are fine."""
        ...

    def close(self) -> None:
        """Give the device's memory back. Nothing is called after it."""
        ...


class SamplingBackend(Backend, Protocol):
    """A backend that can choose tokens itself, and compute on while nobody has looked at them."""

    def decode_and_sample(self, batch: SampledBatch) -> SampledTokenIds:
        """Launch a step and return without waiting for it.

        Greedy, temperature, top_k, top_p and min_p, by the same numbers as the Sampler. One more
        step may be launched before these ids are read, and work of any other kind: it computes
        after it. Ids are read in the order of the steps, or not at all.
        """
        ...
