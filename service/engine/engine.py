"""One step at a time: schedule, compute, sample, detokenize, report. Synchronous and unlocked."""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

from gptjet.service.engine.backend import Backend, Phase, ScheduledBatch
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.detokenizer import Detokenizer
from gptjet.service.engine.endings import log_failure, rest_of, summarize
from gptjet.service.engine.errors import (
    EngineError,
    FieldViolation,
    InvalidRequestError,
    QueueFullError,
)
from gptjet.service.engine.faults import StepGuard
from gptjet.service.engine.observer import StepWatch
from gptjet.service.engine.request import (
    FinishReason,
    Request,
    RequestOutput,
    TokenLogprob,
    validate_request,
)
from gptjet.service.engine.sampler import NonFiniteLogitsError, Sampler
from gptjet.service.engine.scheduler import Scheduler
from gptjet.service.engine.score import ScoreOutcome
from gptjet.service.engine.scoring import Scorer
from gptjet.service.engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    import torch

    from gptjet.service.engine.observer import StepObserver
    from gptjet.service.engine.score import ScoreRequest
    from gptjet.service.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_Failure: TypeAlias = tuple[tuple[Sequence, ...], Exception]


@dataclass(slots=True)
class _RequestState:
    """A request in flight and its sequences. `unfinished` counts those still waiting or running."""

    key: int
    request: Request
    sequences: list[Sequence]
    unfinished: int = field(default=0)

    def __post_init__(self) -> None:
        self.unfinished = len(self.sequences)

    @property
    def started(self) -> bool:
        return any(sequence.first_step_ns for sequence in self.sequences)


@dataclass(slots=True)
class _Tokens:
    """What a decode step with drafts added to a sequence."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, token_id: int, text: str, logprob: TokenLogprob | None) -> None:
        self.token_ids.append(token_id)
        self.texts.append(text)
        self.logprobs += _entries(logprob)


class Engine:
    """Runs requests against one backend.

    `add` queues a request and returns its key; each `step` advances one batch and returns what
    became certain, as (key, RequestOutput) pairs; the last output of a request has its summary.
    `add_score` queues a score request, which ends with one call of its `on_end` inside a `step`.
    Not thread-safe: `AsyncEngine` owns one and calls it from its thread.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        observer: StepObserver | None = None,
    ) -> None:
        self.backend = backend
        self.spec = backend.spec
        self.tokenizer = tokenizer
        self.config = config or EngineConfig()
        self.scheduler = Scheduler(
            self.spec,
            self.config.max_sequences,
            prefix_cache=self.config.prefix_cache,
            max_prefill_tokens=self.config.max_prefill_tokens,
        )
        self._can_verify = self.spec.paged and self.spec.max_draft_tokens > 0
        self.sampler = Sampler(self.spec.vocab_size, self.spec.eos_token_ids)
        self.scorer = Scorer(backend, self.scheduler, log_failure)
        self.guard = StepGuard(backend, self.scheduler, self.fail)
        self._requests: dict[int, _RequestState] = {}
        self._request_of: dict[int, _RequestState] = {}  # by sequence_id
        self._deadlines: list[tuple[int, int]] = []  # heap of (deadline_ns, key)
        self._keys = itertools.count()
        self._sequence_ids = itertools.count()
        self._watch = None if observer is None else StepWatch(observer)

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._requests) or self.scorer.has_work

    @property
    def num_requests(self) -> int:
        """Requests waiting or running."""
        return len(self._requests) + self.scorer.num_requests

    @property
    def num_waiting_requests(self) -> int:
        """Requests of which no sequence has run yet."""
        waiting = sum(not state.started for state in self._requests.values())
        return waiting + self.scorer.num_waiting_requests

    def validate(self, request: Request) -> None:
        """Raise InvalidRequestError if the request can never be served. Reads constants only."""
        validate_request(
            request,
            vocab_size=self.spec.vocab_size,
            max_context=self.spec.max_context,
            max_n=self.config.max_n,
        )
        capacity = self.spec.num_kv_blocks * self.spec.block_size
        room = capacity - len(request.prompt_token_ids)
        hint = f": at most {room} here" if room > 0 else ""
        if self.scheduler.block_manager.blocks_for(request.max_tokens) > self.spec.num_kv_blocks:
            raise InvalidRequestError(
                FieldViolation(
                    "sampling_params.max_new_tokens",
                    f"prompt ({len(request.prompt_token_ids)}) + max_new_tokens "
                    f"({request.sampling_params.max_new_tokens}) can never fit the KV cache of "
                    f"{capacity} tokens{hint}",
                )
            )

    def add(self, request: Request) -> int:
        """Queue a request and return its key.

        Raises InvalidRequestError if it can never be served and QueueFullError at the bound.
        """
        self.validate(request)
        self._refuse_if_full()
        return self.add_unchecked(request)

    def add_unchecked(self, request: Request) -> int:
        """`add` for a caller that has validated the request and counts the queue itself."""
        key = next(self._keys)
        sequences = [
            Sequence(
                sequence_id=next(self._sequence_ids),
                request=request,
                index=index,
                detokenizer=Detokenizer(self.tokenizer, request.sampling_params.stop),
                sampling_state=self.sampler.new_state(request, index),
            )
            for index in range(request.sampling_params.n)
        ]
        if self.spec.paged:
            for follower in sequences[1:]:
                follower.leader = sequences[0]
        state = _RequestState(key, request, sequences)
        self._requests[key] = state
        for sequence in sequences:
            self._request_of[sequence.sequence_id] = state
        self._watch_deadline(key, request.deadline_ns)
        self.scheduler.add(sequences)
        return key

    def add_score(self, request: ScoreRequest, on_end: Callable[[ScoreOutcome], None]) -> int:
        """Queue a score request and return its key.

        Raises InvalidRequestError if it can never be served and QueueFullError at the bound.
        """
        self.scorer.validate(request)
        self._refuse_if_full()
        return self.add_score_unchecked(request, lambda: None, on_end)

    def add_score_unchecked(
        self,
        request: ScoreRequest,
        on_start: Callable[[], None],
        on_end: Callable[[ScoreOutcome], None],
    ) -> int:
        """`add_score` for a caller that has validated the request and counts the queue itself."""
        key = next(self._keys)
        job_ids = [next(self._sequence_ids) for _ in request.prompts]
        self.scorer.add(key, job_ids, request, on_start, on_end)
        self._watch_deadline(key, request.deadline_ns)
        return key

    def cancel(
        self,
        key: int,
        reason: FinishReason = FinishReason.CANCELLED,
        error: EngineError | None = None,
    ) -> list[tuple[int, RequestOutput]]:
        """Stop a request now and free what it holds. An unknown or finished key is fine.

        error  what its caller is told, with FinishReason.ERROR
        """
        self.scorer.cancel(key, reason, error)
        state = self._requests.get(key)
        return [] if state is None else self._abort(state.sequences, reason, error)

    def is_waiting(self, key: int) -> bool:
        """Whether a request is queued and nothing of it has run yet."""
        state = self._requests.get(key)
        return self.scorer.is_waiting(key) if state is None else not state.started

    def step(self) -> list[tuple[int, RequestOutput]]:
        """Advance one batch, or one piece of a score request.

        Never raises for what a request or a backend does wrong.
        """
        if self._watch is None:
            return self._advance()
        self._watch.begin()
        outputs = self._advance()
        self._watch.end()
        return outputs

    def _advance(self) -> list[tuple[int, RequestOutput]]:
        outputs = self._expire_deadlines()
        if self.scorer.is_due() and self._run_score_piece():
            self.scheduler.require_decode()
            return outputs
        batch = self.scheduler.schedule()
        if batch is None:
            self._run_score_piece()
            return outputs
        self.scorer.note_step(batch.phase)
        if self._watch is not None:
            self._watch.note_batch(batch)
        now_ns = time.monotonic_ns()
        for sequence in batch.sequences:
            sequence.first_step_ns = sequence.first_step_ns or now_ns
        self.guard.run(batch, self._compute, outputs)
        return outputs

    def fail(
        self, sequences: tuple[Sequence, ...] | None, error: Exception
    ) -> list[tuple[int, RequestOutput]]:
        """End `sequences` (None: every one) with ERROR; the log has the traceback and the id."""
        if sequences is None:
            self.scorer.fail_all(error)
            sequences = tuple(s for state in self._requests.values() for s in state.sequences)
        told = log_failure(error, [sequence.request.request_id for sequence in sequences])
        return self._abort(sequences, FinishReason.ERROR, told)

    def _run_score_piece(self) -> bool:
        ran = self.scorer.run_piece()
        if ran and self._watch is not None:
            self._watch.note_score()
        return ran

    def _compute(self, batch: ScheduledBatch, outputs: list[tuple[int, RequestOutput]]) -> None:
        """Run the batch; appends to `outputs` as it goes, so that an error loses none of them."""
        if batch.phase is Phase.PREFILL:
            self._prefill(batch, outputs)
        elif batch.num_tokens:
            self._verify(batch, outputs)
        else:
            logits = self.backend.decode(batch)
            sampled, failures = self._sample(logits, batch.sequences)
            for sequence, token_id, logprob in sampled:
                text = self._append(sequence, token_id)
                self.scheduler.decoded(sequence)
                outputs.append(self._report(sequence, text, (token_id,), _entries(logprob)))
            for failed, error in failures:
                outputs += self.fail(failed, error)

    def _prefill(self, batch: ScheduledBatch, outputs: list[tuple[int, RequestOutput]]) -> None:
        result = self.backend.prefill(batch)
        for row, prompt_logits in enumerate(result.prompt_logits):
            if prompt_logits is not None:
                sequence = batch.sequences[row]
                count = batch.num_tokens[row] if batch.num_tokens else sequence.num_prompt_tokens
                outputs += self._add_prompt_logprobs(sequence, prompt_logits, count)
        decided = self.scheduler.prefilled(batch)
        if not decided:
            return
        rows, sequences = [row for row, _ in decided], [sequence for _, sequence in decided]
        logits = result.logits
        if rows != list(range(len(logits))):
            logits = logits[rows]
        try:
            self._start(sequences, logits, outputs)
        except Exception as error:  # noqa: BLE001 - as in `step`, for sequences that are not in the
            # batch too: those that have just been forked off one of it.
            outputs += self.fail(tuple(sequences), error)

    def _start(
        self,
        sequences: list[Sequence],
        logits: torch.Tensor,
        outputs: list[tuple[int, RequestOutput]],
    ) -> None:
        """Sample what follows the prompts, which are computed."""
        sampled, failures = self._sample(logits, sequences)
        for sequence, token_id, logprob in sampled:
            if sequence.request.sampling_params.echo and not sequence.output_token_ids:
                outputs.append(self._echo(sequence))
            text = self._append(sequence, token_id)
            outputs.append(self._report(sequence, text, (token_id,), _entries(logprob)))
        for failed, error in failures:
            outputs += self.fail(failed, error)

    def _verify(self, batch: ScheduledBatch, outputs: list[tuple[int, RequestOutput]]) -> None:
        """A decode step with drafts: sample token by token, as without them, while they agree.

        Every token is drawn with the state that those before it leave, so it is the very token
        that a step of its own would have drawn; the first that differs from its draft stands too.
        """
        logits = self.backend.decode(batch)
        first_row = dict(
            zip(batch.sequences, accumulate(batch.num_tokens, initial=0), strict=False)
        )
        added = {sequence: _Tokens() for sequence in batch.sequences}
        failures: list[_Failure] = []
        agreed = list(batch.sequences)
        position = 0
        while agreed:
            rows = [first_row[sequence] + position for sequence in agreed]
            sampled, failed_now = self._sample(logits[rows], agreed)
            failures += failed_now
            agreed = []
            for sequence, token_id, logprob in sampled:
                added[sequence].add(token_id, self._append(sequence, token_id), logprob)
                drafted = sequence.draft_token_ids[position : position + 1]
                if sequence.finish_reason is None and drafted == (token_id,):
                    agreed.append(sequence)
            position += 1
        for sequence, tokens in added.items():
            sequence.num_drafted_tokens += len(sequence.draft_token_ids)
            sequence.num_accepted_tokens += max(0, len(tokens.token_ids) - 1)
            self.scheduler.decoded(sequence)
            if tokens.token_ids:
                outputs.append(
                    self._report(
                        sequence,
                        "".join(tokens.texts),
                        tuple(tokens.token_ids),
                        tuple(tokens.logprobs),
                    )
                )
        for failed, error in failures:
            outputs += self.fail(failed, error)

    def _sample(
        self, logits: torch.Tensor, sequences: Seq[Sequence]
    ) -> tuple[list[tuple[Sequence, int, TokenLogprob | None]], list[_Failure]]:
        """A token for each row of logits, and the sequences whose rows are not finite."""
        failures: list[_Failure] = []
        try:
            sampled = self.sampler.sample(logits, [s.sampling_state for s in sequences])
        except NonFiniteLogitsError as error:
            # NaN or infinity in one row says nothing about the others.
            failures = [(tuple(sequences[row] for row in error.rows), error)]
            good = [row for row in range(len(sequences)) if row not in error.rows]
            sequences = [sequences[row] for row in good]
            sampled = self.sampler.sample(logits[good], [s.sampling_state for s in sequences])
        return list(zip(sequences, sampled.token_ids, sampled.logprobs, strict=True)), failures

    def _add_prompt_logprobs(
        self, sequence: Sequence, prompt_logits: torch.Tensor, num_tokens: int
    ) -> list[tuple[int, RequestOutput]]:
        """Take those of one chunk; returns the end of a sequence whose logits are not finite."""
        start = sequence.num_computed_tokens
        try:
            sequence.prompt_logprobs += self.sampler.prompt_logprobs(
                prompt_logits, sequence.sampling_state, start, start + num_tokens
            )
        except NonFiniteLogitsError as error:
            return self.fail((sequence,), error)
        return []

    def _echo(self, sequence: Sequence) -> tuple[int, RequestOutput]:
        request = sequence.request
        output = RequestOutput(
            request_id=request.request_id,
            index=sequence.index,
            text=self.tokenizer.decode(request.prompt_token_ids),
            token_ids=request.prompt_token_ids,
            logprobs=tuple(sequence.prompt_logprobs),
            is_prompt=True,
        )
        return self._request_of[sequence.sequence_id].key, output

    def _append(self, sequence: Sequence, token_id: int) -> str:
        """Append a sampled token; returns the text that is now certain, and sets finish_reason."""
        params = sequence.request.sampling_params
        sequence.output_token_ids.append(token_id)
        if sequence.lookup is not None:
            sequence.lookup.add(token_id)
        text = ""
        is_eos = token_id in self.spec.eos_token_ids and not params.ignore_eos
        if is_eos or token_id in params.stop_token_ids:
            sequence.finish_reason = FinishReason.STOP_TOKEN
            sequence.stop_match = token_id
        else:
            text = sequence.detokenizer.push(token_id)
            if sequence.detokenizer.stop_match is not None:
                sequence.finish_reason = FinishReason.STOP_STRING
                sequence.stop_match = sequence.detokenizer.stop_match
            elif len(sequence.output_token_ids) >= params.max_new_tokens:
                sequence.finish_reason = FinishReason.LENGTH
        if sequence.finish_reason in (FinishReason.LENGTH, FinishReason.STOP_TOKEN):
            # What was held back can no longer grow. The U+FFFD of an unfinished character may
            # still complete a stop string that holds one.
            text += sequence.detokenizer.flush()
            if sequence.detokenizer.stop_match is not None:
                sequence.finish_reason = FinishReason.STOP_STRING
                sequence.stop_match = sequence.detokenizer.stop_match
        return text

    def _report(
        self,
        sequence: Sequence,
        text: str,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: Exception | None = None,
    ) -> tuple[int, RequestOutput]:
        """Make the output of a sequence, and close the sequence if it has a finish reason."""
        state = self._request_of[sequence.sequence_id]
        if token_ids:
            now_ns = time.monotonic_ns()
            if self._watch is not None:
                self._watch.note_tokens(sequence, len(token_ids), now_ns)
            sequence.last_token_ns = now_ns
            sequence.first_token_ns = sequence.first_token_ns or now_ns
        summary = None
        if sequence.finish_reason is not None:
            self._close(state, sequence)
            if state.unfinished == 0:
                summary = summarize(state.request, state.sequences, can_verify=self._can_verify)
        return state.key, RequestOutput(
            request_id=state.request.request_id,
            index=sequence.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=sequence.finish_reason,
            summary=summary,
            error=error,
        )

    def _close(self, state: _RequestState, sequence: Sequence) -> None:
        failed = sequence.finish_reason is FinishReason.ERROR
        self.scheduler.finish(sequence, forget=failed)
        del self._request_of[sequence.sequence_id]
        state.unfinished -= 1
        if state.unfinished == 0:
            del self._requests[state.key]
        try:
            self.backend.release(sequence)
        except Exception:
            # The caller's output is already made and must reach it.
            logger.exception("backend failed to release sequence %d", sequence.sequence_id)

    def _abort(
        self,
        sequences: list[Sequence] | tuple[Sequence, ...],
        reason: FinishReason,
        error: Exception | None = None,
    ) -> list[tuple[int, RequestOutput]]:
        outputs = []
        for sequence in sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                sequence.finish_reason = reason
                outputs.append(self._report(sequence, rest_of(sequence), error=error))
        return outputs

    def _expire_deadlines(self) -> list[tuple[int, RequestOutput]]:
        outputs: list[tuple[int, RequestOutput]] = []
        now_ns = time.monotonic_ns()
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            _, key = heapq.heappop(self._deadlines)
            outputs += self.cancel(key, FinishReason.DEADLINE)
        return outputs

    def _watch_deadline(self, key: int, deadline_ns: int | None) -> None:
        if deadline_ns is not None:
            self._drop_stale_deadlines()
            heapq.heappush(self._deadlines, (deadline_ns, key))

    def _refuse_if_full(self) -> None:
        if self.num_waiting_requests >= self.config.max_queue_size:
            raise QueueFullError(self.config.max_queue_size, retry_after_s=1.0)

    def _drop_stale_deadlines(self) -> None:
        # Requests that finished in time leave their entries behind, perhaps hours from expiring.
        if len(self._deadlines) > 64 + 2 * self.num_requests:
            self._deadlines = [
                entry
                for entry in self._deadlines
                if entry[1] in self._requests or entry[1] in self.scorer
            ]
            heapq.heapify(self._deadlines)


def _entries(logprob: TokenLogprob | None) -> tuple[TokenLogprob, ...]:
    return () if logprob is None else (logprob,)
