"""A backend whose output can be calculated by hand, for tests of everything above a model.

Ids are bytes. After a lower-case letter comes the next one, `z` is followed by `a`; after an
upper-case letter comes the next one, `Z` is followed by end-of-text; after anything else comes `a`.
So "abc" goes on "defgh…" for ever and "The X" goes on "YZ" and ends.
"""

from __future__ import annotations

import time
from collections.abc import Generator

import torch

from gptjet.service.backends.logprobs import token_logprobs
from gptjet.service.engine.backend import BackendSpec, PrefillResult, ScheduledBatch, ScoreJob
from gptjet.service.engine.sequence import Sequence
from gptjet.service.engine.tokenizer import ByteTokenizer

_VOCAB = ByteTokenizer.vocab_size
_EOS = ByteTokenizer.eos_token_id


def successor(token_id: int) -> int:
    """The id the mock finds likeliest after `token_id`."""
    if ord("a") <= token_id <= ord("z"):
        return token_id + 1 if token_id < ord("z") else ord("a")
    if ord("A") <= token_id <= ord("Z"):
        return token_id + 1 if token_id < ord("Z") else _EOS
    return ord("a")


def logits_after(token_id: int) -> torch.Tensor:
    """[V] float32: 0 for the successor, -1 for the id after it, -2 for the next, and so on round.

    So the probability of the successor is 1 - 1/e to within e**-257, and falls by 1/e an id.
    """
    return -((torch.arange(_VOCAB) - successor(token_id)) % _VOCAB).float()


class MockBackend:
    """Computes `logits_after` of each sequence's last token, and checks how it is called.

    It keeps each sequence's tokens as a model would keep its KV cache, and raises RuntimeError
    where a real one would silently read the wrong cache: a decode before a prefill, or out of step.
    """

    def __init__(
        self,
        *,
        max_context: int = 512,
        max_sequences: int = 64,
        max_batch_size: int = 64,
        num_kv_blocks: int | None = None,
        prefill_ms: float = 0.0,
        decode_ms: float = 0.0,
    ) -> None:
        """`prefill_ms` and `decode_ms` are slept in each step, so that latencies are known."""
        self._spec = BackendSpec(
            name="mock",
            model_name="mock",
            architecture="mock",
            num_parameters=0,
            device="cpu",
            dtype="float32",
            vocab_size=_VOCAB,
            max_context=max_context,
            max_sequences=max_sequences,
            max_batch_size=max_batch_size,
            num_kv_blocks=num_kv_blocks or max_sequences * -(-max_context // 16),
            eos_token_ids=(_EOS,),
        )
        self._prefill_s = prefill_ms / 1000
        self._decode_s = decode_ms / 1000
        self.cached: dict[int, list[int]] = {}

    @property
    def spec(self) -> BackendSpec:
        """Any concurrency, a byte vocabulary."""
        return self._spec

    def warm_up(self) -> None:
        """Nothing to warm."""

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        """See the class; prompt logits follow the same rule position by position."""
        time.sleep(self._prefill_s)
        for sequence in batch.sequences:
            self.cached[sequence.sequence_id] = sequence.token_ids
        prompt_logits = tuple(
            torch.stack([logits_after(t) for t in sequence.token_ids[:-1]])
            if sequence.needs_prompt_logits and sequence.num_tokens > 1
            else torch.empty(0, _VOCAB)
            if sequence.needs_prompt_logits
            else None
            for sequence in batch.sequences
        )
        return PrefillResult(self._last_logits(batch), prompt_logits)

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        """See the class."""
        time.sleep(self._decode_s)
        for sequence in batch.sequences:
            cached = self.cached.get(sequence.sequence_id)
            if cached is None or len(cached) != sequence.num_tokens - 1:
                raise RuntimeError(
                    f"sequence {sequence.sequence_id} has {sequence.num_tokens} tokens, "
                    f"its cache {'is missing' if cached is None else f'holds {len(cached)}'}"
                )
            cached.append(sequence.last_token_id)
        return self._last_logits(batch)

    def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        """By the class's rule; one piece for the prompt, one for each candidate.

        Meanwhile the job's prompt is in `cached` under its id, as a model's KV cache would be.
        """
        self.cached[job.job_id] = list(job.prompt_token_ids)
        try:
            time.sleep(self._prefill_s)
            scores = []
            for candidate in job.candidates:
                yield
                time.sleep(self._decode_s)
                before = (*self.cached[job.job_id], *candidate)[-len(candidate) - 1 : -1]
                rows = torch.stack([logits_after(token_id) for token_id in before])
                scores.append(token_logprobs(rows, candidate))
            return tuple(scores)
        finally:
            del self.cached[job.job_id]

    def release(self, sequence: Sequence) -> None:
        """Forget the sequence's tokens."""
        self.cached.pop(sequence.sequence_id, None)

    def close(self) -> None:
        """Nothing to close."""

    def _last_logits(self, batch: ScheduledBatch) -> torch.Tensor:
        return torch.stack([logits_after(s.last_token_id) for s in batch.sequences])
