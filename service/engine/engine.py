"""One step at a time: schedule, compute, sample, detokenize, report. Synchronous and unlocked."""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptjet.service.engine.backend import Backend
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
from gptjet.service.engine.sampler import Sampler
from gptjet.service.engine.scheduler import Scheduler
from gptjet.service.engine.score import ScoreOutcome
from gptjet.service.engine.scoring import Scorer
from gptjet.service.engine.sequence import Sequence, SequenceStatus
from gptjet.service.engine.steps import Outputs, Steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptjet.service.engine.observer import StepObserver
    from gptjet.service.engine.score import ScoreRequest
    from gptjet.service.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


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
        self._steps = Steps(
            backend,
            self.scheduler,
            self.sampler,
            is_urgent=lambda: self.scorer.has_work,
            attempt=self.guard.run,
            report=self._report,
            echo=self._echo,
            fail=self.fail,
        )
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
    ) -> Outputs:
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

    def step(self) -> Outputs:
        """Advance one batch, or one piece of a score request.

        Never raises for what a request or a backend does wrong.
        """
        if self._watch is None:
            return self._advance()
        self._watch.begin()
        outputs = self._advance()
        self._watch.end()
        return outputs

    def _advance(self) -> Outputs:
        outputs = self._expire_deadlines()
        launched = self._steps.in_flight
        if launched is not None:
            self.scorer.note_step(launched.phase)
            if self._watch is not None:
                self._watch.note_batch(launched)
            self.guard.run(launched, self._steps.go_on, outputs)
            return outputs
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
        self.guard.run(batch, self._steps.compute, outputs)
        return outputs

    def fail(self, sequences: tuple[Sequence, ...] | None, error: Exception) -> Outputs:
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
    ) -> Outputs:
        outputs = []
        for sequence in sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                sequence.finish_reason = reason
                outputs.append(self._report(sequence, rest_of(sequence), error=error))
        return outputs

    def _expire_deadlines(self) -> Outputs:
        outputs: Outputs = []
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
