"""One sequence on its way through the engine: mutable, and touched by the engine thread alone."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptjet.service.engine.request import FinishReason, Request

if TYPE_CHECKING:
    from gptjet.service.engine.detokenizer import Detokenizer
    from gptjet.service.engine.prompt_lookup import PromptLookup
    from gptjet.service.engine.request import TokenLogprob
    from gptjet.service.engine.sampler import SamplingState


class SequenceStatus(enum.StrEnum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One of the n continuations of a request.

    sequence_id    unique in the engine's life
    block_table    ids of the KV blocks it holds, in token order
    num_computed_tokens  tokens from the first whose keys and values the backend holds
    draft_token_ids  guesses for the next tokens, which the next decode step verifies
    leader         the continuation of the same request that computes the prompt for this one too,
                   None once the two have parted or where there is none
    num_cached_prompt_tokens  tokens of its prompt that the prefix cache had
    prompt_logprobs  of the prompt's tokens so far, where they are to be echoed
    lookup         where its drafts come from, once there have been any
    num_drafted_tokens, num_accepted_tokens, num_decode_steps  what drafts brought
    times          `time.monotonic_ns()`, 0 until they happen
    """

    sequence_id: int
    request: Request
    index: int
    detokenizer: Detokenizer
    sampling_state: SamplingState
    status: SequenceStatus = SequenceStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    draft_token_ids: tuple[int, ...] = ()
    leader: Sequence | None = None
    num_cached_prompt_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    lookup: PromptLookup | None = None
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_decode_steps: int = 0
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None
    first_step_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output so far. A new list: for a prefill, not for every step."""
        return [*self.request.prompt_token_ids, *self.output_token_ids]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def last_token_id(self) -> int:
        """The newest token, the input of a decode step."""
        if self.output_token_ids:
            return self.output_token_ids[-1]
        return self.request.prompt_token_ids[-1]

    @property
    def needs_prompt_logits(self) -> bool:
        """The echoed prompt needs log-probabilities, so prefill must return all its logits."""
        params = self.request.sampling_params
        return params.echo and params.logprobs is not None and not self.output_token_ids
