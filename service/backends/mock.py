"""A backend whose output can be calculated by hand, for tests of everything above a model.

Plain, or paged: then it keeps what it computes in the KV blocks of each `block_table` and nowhere
else, and refuses to go on from a block that does not hold what a model would have put there.

Ids are bytes. After a lower-case letter comes the next one, `z` is followed by `a`; after an
upper-case letter comes the next one, `Z` is followed by end-of-text; after anything else comes `a`.
So "abc" goes on "defgh…" for ever and "The X" goes on "YZ" and ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator

import torch

from gptjet.service.backends.logprobs import token_logprobs
from gptjet.service.engine.backend import (
    BackendSpec,
    PrefillResult,
    SampledBatch,
    ScheduledBatch,
    ScoreJob,
)
from gptjet.service.engine.sampler import Sampler
from gptjet.service.engine.sequence import Sequence
from gptjet.service.engine.tokenizer import ByteTokenizer

_VOCAB = ByteTokenizer.vocab_size
_EOS = ByteTokenizer.eos_token_id
_EMPTY = 0  # a slot that holds nothing yet


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

    `cached` is that of the plain mode. Paged, every slot holds a number that stands for all tokens
    up to its own, as keys and values do: a block that was copied wrongly, shared with another
    beginning, given away too early or never written is seen in the next step that reads it.
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
        paged: bool = False,
        block_size: int = 16,
        max_prefill_batch_size: int = 1,
        max_prefill_tokens: int | None = None,
        max_draft_tokens: int = 0,
        samples_on_device: bool = False,
    ) -> None:
        """`prefill_ms` and `decode_ms` are slept in each step, so that latencies are known.

        The last three are for the paged mode.
        """
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
            num_kv_blocks=num_kv_blocks or max_sequences * -(-max_context // block_size),
            max_prefill_batch_size=max_prefill_batch_size,
            block_size=block_size,
            paged=paged,
            max_prefill_tokens=max_prefill_tokens,
            max_draft_tokens=max_draft_tokens,
            samples_on_device=samples_on_device,
            eos_token_ids=(_EOS,),
        )
        self._prefill_s = prefill_ms / 1000
        self._decode_s = decode_ms / 1000
        self.cached: dict[int, list[int]] = {}
        self._slots = [_EMPTY] * (self._spec.num_kv_blocks * block_size if paged else 0)
        self._sampler = Sampler(_VOCAB, (_EOS,))
        self._chosen: list[int] = []  # by the step launched last
        self._unread: deque[MockTokenIds] = deque()
        self.num_launched_ahead = 0

    @property
    def spec(self) -> BackendSpec:
        """Any concurrency, a byte vocabulary."""
        return self._spec

    def warm_up(self) -> None:
        """Nothing to warm."""

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        """See the class; prompt logits follow the same rule position by position."""
        time.sleep(self._prefill_s)
        rows, prompt_logits = [], []
        self._copy_blocks(batch)
        for row, sequence in enumerate(batch.sequences):
            count = batch.num_tokens[row] if batch.num_tokens else sequence.num_tokens
            tokens = sequence.token_ids
            if self._spec.paged:
                start = sequence.num_computed_tokens
                self._write(sequence, tokens, start, start + count)
            else:
                start = 0
                self.cached[sequence.sequence_id] = tokens
            end = start + count
            # What nobody may read is poisoned.
            whole = end == len(tokens)
            rows.append(logits_after(tokens[-1]) if whole else torch.full((_VOCAB,), torch.nan))
            prompt_logits.append(
                _logits_of(tokens[start : end - whole]) if sequence.needs_prompt_logits else None
            )
        return PrefillResult(torch.stack(rows), tuple(prompt_logits))

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        """See the class."""
        time.sleep(self._decode_s)
        self._copy_blocks(batch)
        inputs: list[int] = []
        for row, sequence in enumerate(batch.sequences):
            drafts = sequence.draft_token_ids if batch.num_tokens else ()
            if batch.num_tokens and batch.num_tokens[row] != 1 + len(drafts):
                raise RuntimeError(f"{batch.num_tokens[row]} tokens for {len(drafts)} drafts")
            if self._spec.paged:
                tokens = [*sequence.token_ids, *drafts]
                self._write(sequence, tokens, sequence.num_tokens - 1, len(tokens))
            else:
                self._append(sequence)
            inputs += (sequence.last_token_id, *drafts)
        return _logits_of(inputs)

    def decode_and_sample(self, batch: SampledBatch) -> MockTokenIds:
        """See the class; everything is computed at once, and told when it is waited for.

        `num_launched_ahead` counts the steps that came before the last one was read.
        """
        while self._unread and self._unread[0].is_read:
            self._unread.popleft()
        self.num_launched_ahead += bool(self._unread)
        self._copy_blocks(batch)
        inputs = []
        for row, sequence in enumerate(batch.sequences):
            source, end = batch.sources[row], batch.positions[row] + 1
            known = sequence.token_ids
            tokens = known if source < 0 else [*known, max(self._chosen[source], 0)]
            where = f"sequence {sequence.sequence_id}"
            if len(tokens) != end or end > len(sequence.block_table) * self._spec.block_size:
                raise RuntimeError(
                    f"{where}: token {end - 1} of {len(tokens)} with blocks for "
                    f"{len(sequence.block_table) * self._spec.block_size}"
                )
            if source < 0 and tokens[-1] != batch.token_ids[row]:
                raise RuntimeError(f"{where}: token {batch.token_ids[row]} is not its last one")
            self._write_slots(where, sequence.block_table, tokens, end - 1, end)
            inputs.append(tokens[-1])
        states = [sequence.sampling_state for sequence in batch.sequences]
        self._chosen = self._sampler.choose(_logits_of(inputs), states, batch.draw_positions)
        self._unread.append(MockTokenIds(self._chosen, self._decode_s))
        return self._unread[-1]

    def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        """By the class's rule; one piece for the prompt, one for each candidate.

        Meanwhile the job's prompt is in `cached` under its id, as a model's KV cache would be;
        paged, it is in the job's blocks.
        """
        prompt = list(job.prompt_token_ids)
        if not self._spec.paged:
            self.cached[job.job_id] = prompt
        try:
            time.sleep(self._prefill_s)
            own = self._write_prompt(job) if self._spec.paged else []
            scores = []
            for index, candidate in enumerate(job.candidates):
                yield
                time.sleep(self._decode_s)
                if self._spec.paged:
                    self._write_candidate(job, index, own[index])
                before = [*prompt, *candidate][-len(candidate) - 1 : -1]
                scores.append(token_logprobs(_logits_of(before), candidate))
            return tuple(scores)
        finally:
            self.cached.pop(job.job_id, None)

    def release(self, sequence: Sequence) -> None:
        """Forget the sequence's tokens; the blocks of the paged mode keep theirs."""
        self.cached.pop(sequence.sequence_id, None)

    def close(self) -> None:
        """Nothing to close."""

    def _append(self, sequence: Sequence) -> None:
        cached = self.cached.get(sequence.sequence_id)
        if cached is None or len(cached) != sequence.num_tokens - 1:
            raise RuntimeError(
                f"sequence {sequence.sequence_id} has {sequence.num_tokens} tokens, "
                f"its cache {'is missing' if cached is None else f'holds {len(cached)}'}"
            )
        cached.append(sequence.last_token_id)

    # --- paged ---

    def _copy_blocks(self, batch: ScheduledBatch | SampledBatch) -> None:
        """All at once, as a tensor copy would."""
        size = self._spec.block_size
        if len({destination for _, destination in batch.block_copies}) < len(batch.block_copies):
            raise RuntimeError(f"a block is copied to twice: {batch.block_copies}")
        contents = [self._slots[source * size :][:size] for source, _ in batch.block_copies]
        for (_, destination), content in zip(batch.block_copies, contents, strict=True):
            self._slots[destination * size : (destination + 1) * size] = content

    def _write(self, sequence: Sequence, tokens: list[int], start: int, end: int) -> None:
        """Compute tokens [start, end) of a sequence, having read those before them."""
        size, table = self._spec.block_size, sequence.block_table
        where = f"sequence {sequence.sequence_id}"
        if start != sequence.num_computed_tokens or not start < end <= len(table) * size:
            raise RuntimeError(
                f"{where}: tokens [{start}, {end}) with {sequence.num_computed_tokens} computed "
                f"and blocks for {len(table) * size}"
            )
        self._write_slots(where, table, tokens, start, end)

    def _write_prompt(self, job: ScoreJob) -> list[list[int]]:
        """Compute a job's prompt after its cached tokens; returns the candidates' own blocks."""
        size, prompt = self._spec.block_size, job.prompt_token_ids
        position = -(-len(prompt) // size)
        own = []
        for candidate in job.candidates:
            count = -(-(len(prompt) % size + len(candidate)) // size)
            own.append(list(job.block_table[position : position + count]))
            position += count
        if position != len(job.block_table):
            raise RuntimeError(f"job {job.job_id}: {len(job.block_table)} blocks, not {position}")
        if not 0 <= job.num_cached_tokens < len(prompt):
            raise RuntimeError(f"job {job.job_id}: {job.num_cached_tokens} of its prompt cached")
        start, end = job.num_cached_tokens, len(prompt)
        self._write_slots(f"job {job.job_id}", list(job.block_table), list(prompt), start, end)
        return own

    def _write_candidate(self, job: ScoreJob, index: int, own: list[int]) -> None:
        """Compute a candidate in blocks of its own, the prompt's last part copied into them."""
        size, prompt = self._spec.block_size, list(job.prompt_token_ids)
        full = len(prompt) // size
        for slot in range(len(prompt) % size):
            self._slots[own[0] * size + slot] = self._slots[job.block_table[full] * size + slot]
        table, tokens = [*job.block_table[:full], *own], [*prompt, *job.candidates[index]]
        self._write_slots(f"job {job.job_id}", table, tokens, len(prompt), len(tokens))

    def _write_slots(
        self, where: str, table: list[int], tokens: list[int], start: int, end: int
    ) -> None:
        """Put what stands for tokens [start, end) in their slots; those before are checked."""
        size, state = self._spec.block_size, _EMPTY
        for position in range(end):
            state = hash((state, position, tokens[position]))
            slot = table[position // size] * size + position % size
            if position >= start:
                self._slots[slot] = state
            elif self._slots[slot] != state:
                raise RuntimeError(f"{where}: slot {slot} does not hold token {position}")


class MockTokenIds:
    """Ids that are there once they are waited for, as a device's are."""

    def __init__(self, token_ids: list[int], seconds: float) -> None:
        self._token_ids = token_ids
        self._seconds = seconds
        self.is_read = False

    def wait(self) -> list[int]:
        """See SampledTokenIds."""
        time.sleep(self._seconds)
        self.is_read = True
        return self._token_ids


def _logits_of(token_ids: list[int]) -> torch.Tensor:
    """[N, V] for N tokens."""
    if not token_ids:
        return torch.empty(0, _VOCAB)
    return torch.stack([logits_after(token_id) for token_id in token_ids])
