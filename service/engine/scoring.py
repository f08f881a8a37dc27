"""Score requests on their way through the engine: room, one piece a step, the answer."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptjet.service.engine.backend import Phase, ScoreJob
from gptjet.service.engine.errors import EngineError, FieldViolation, InvalidRequestError
from gptjet.service.engine.request import FinishReason, Timings, TokenLogprob
from gptjet.service.engine.score import (
    CandidateScore,
    ScoreOutcome,
    ScoreRequest,
    ScoreResult,
    validate_score_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import torch

    from gptjet.service.engine.backend import Backend, BackendSpec
    from gptjet.service.engine.block_manager import Allocation
    from gptjet.service.engine.errors import EngineStepError
    from gptjet.service.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

_NS_PER_MS = 1e6


class NonFiniteScoreError(EngineError):
    """The model gave no probability for some candidates; `candidates` are their indices."""

    def __init__(self, candidates: tuple[int, ...]) -> None:
        listed = ", ".join(map(str, candidates))
        super().__init__(f"the model returned scores that are not finite for candidate {listed}")
        self.candidates = candidates


@dataclass(slots=True, eq=False)
class _Job:
    """One prompt with the candidates.

    job_id  from the same counter as the sequences': jobs and sequences have one order
    room    None until it is admitted
    """

    job_id: int
    prompt_token_ids: tuple[int, ...]
    room: Allocation | None = None
    pieces: Generator[None, None, tuple[torch.Tensor, ...]] | None = None


@dataclass(slots=True, eq=False)
class _ScoreState:
    """A score request in flight. `jobs` are those still to be done."""

    key: int
    request: ScoreRequest
    on_start: Callable[[], None]
    on_end: Callable[[ScoreOutcome], None]
    jobs: deque[_Job]
    logprobs: list[tuple[tuple[float, ...], ...]] = field(default_factory=list)  # one a job
    first_piece_ns: int = 0
    prompt_done_ns: int = 0


class Scorer:
    """Runs score requests in their order, one piece of one at a time.

    A job takes room like a sequence: the KV blocks of its tokens and, where the backend keeps its
    caches itself, one of the sequences it may hold. Between two pieces the engine runs two steps,
    one of them a decode step while anything decodes: so a stream waits for at most one piece a
    token, and a flood of short requests does not keep the scores from being made.

    Each request ends with exactly one call of its `on_end`.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        fail: Callable[[Exception, Sequence[str]], EngineStepError],
    ) -> None:
        """`fail` logs what went wrong for requests of these ids, and makes what they are told."""
        self._backend = backend
        self._spec: BackendSpec = backend.spec
        self._scheduler = scheduler
        self._fail = fail
        self._states: dict[int, _ScoreState] = {}  # by key; the first one runs
        self._steps_since_piece = 2
        self._prefills_in_a_row = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._states)

    @property
    def num_requests(self) -> int:
        """Requests waiting or running."""
        return len(self._states)

    @property
    def num_waiting_requests(self) -> int:
        """Requests of which nothing has run yet."""
        return sum(not state.first_piece_ns for state in self._states.values())

    def __contains__(self, key: int) -> bool:
        return key in self._states

    def validate(self, request: ScoreRequest) -> None:
        """Raise InvalidRequestError if the request can never be served. Reads constants only."""
        spec = self._spec
        validate_score_request(request, vocab_size=spec.vocab_size, max_context=spec.max_context)
        needed = max(self._blocks_for(prompt, request.candidates) for prompt in request.prompts)
        if needed > spec.num_kv_blocks:
            raise InvalidRequestError(
                FieldViolation(
                    "candidates",
                    f"prompt and candidates need {needed * spec.block_size} tokens of KV cache at "
                    f"once and can never fit its {spec.num_kv_blocks * spec.block_size}",
                )
            )

    def add(
        self,
        key: int,
        job_ids: Sequence[int],
        request: ScoreRequest,
        on_start: Callable[[], None],
        on_end: Callable[[ScoreOutcome], None],
    ) -> None:
        """Queue a validated request; `job_ids` has an id for each of its prompts."""
        jobs = deque(
            _Job(job_id, prompt) for job_id, prompt in zip(job_ids, request.prompts, strict=True)
        )
        self._states[key] = _ScoreState(key, request, on_start, on_end, jobs)

    def cancel(self, key: int, reason: FinishReason, error: EngineError | None = None) -> None:
        """End a request now and free what it holds. An unknown or finished key is fine."""
        state = self._states.get(key)
        if state is not None:
            self._end(state, ScoreOutcome(finish_reason=reason, error=error))

    def is_waiting(self, key: int) -> bool:
        """Whether a request is queued and nothing of it has run yet."""
        state = self._states.get(key)
        return state is not None and not state.first_piece_ns

    def fail_all(self, error: Exception) -> None:
        """End every request with ERROR."""
        if self._states:
            told = self._fail(error, [s.request.request_id for s in self._states.values()])
            for state in list(self._states.values()):
                self._end(state, ScoreOutcome(finish_reason=FinishReason.ERROR, error=told))

    def note_step(self, phase: Phase) -> None:
        """A step of the sequences has run."""
        self._steps_since_piece += 1
        self._prefills_in_a_row = self._prefills_in_a_row + 1 if phase is Phase.PREFILL else 0

    def is_due(self) -> bool:
        """Whether the next step is to be a piece; takes the room for it where that is free."""
        # After one prefill a decode is due; two in a row say that nothing decodes.
        in_turn = self._steps_since_piece >= 2 and self._prefills_in_a_row != 1
        return self._admit() is not None and in_turn

    def run_piece(self) -> bool:
        """Run one piece; False if there is none that can run. Never raises for a backend."""
        state = self._admit()
        if state is None:
            return False
        self._steps_since_piece = 0
        if not state.first_piece_ns:
            state.first_piece_ns = time.monotonic_ns()
            state.on_start()
        try:
            self._advance(state)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises concerns this
            # request and nobody else; `fail` logs it with its traceback.
            told = self._fail(error, (state.request.request_id,))
            self._end(state, ScoreOutcome(finish_reason=FinishReason.ERROR, error=told))
        return True

    def _advance(self, state: _ScoreState) -> None:
        job, candidates = state.jobs[0], state.request.candidates
        if job.pieces is None:
            job.pieces = self._backend.score(self._score_job(job, candidates))
        result: tuple[torch.Tensor, ...] | None = None
        try:
            next(job.pieces)
        except StopIteration as stop:
            result = stop.value
        state.prompt_done_ns = state.prompt_done_ns or time.monotonic_ns()
        if result is None:
            return
        state.logprobs.append(_checked(result, candidates))
        self._leave_job(state, computed=True)
        if not state.jobs:
            self._end(state, ScoreOutcome(result=_result(state)))

    def _admit(self) -> _ScoreState | None:
        """The request whose turn it is, if its job has the room it needs."""
        state = next(iter(self._states.values()), None)
        if state is None:
            return None
        job = state.jobs[0]
        if job.room is None:
            prompt = job.prompt_token_ids
            needed = self._blocks_for(prompt, state.request.candidates)
            job.room = self._scheduler.admit_job(job.job_id, needed, prompt)
        return None if job.room is None else state

    def _score_job(self, job: _Job, candidates: tuple[tuple[int, ...], ...]) -> ScoreJob:
        assert job.room is not None, "_admit gives it room first"
        return ScoreJob(
            job_id=job.job_id,
            prompt_token_ids=job.prompt_token_ids,
            candidates=candidates,
            block_table=tuple(job.room.block_table) if self._spec.paged else (),
            num_cached_tokens=job.room.num_cached_tokens,
        )

    def _blocks_for(self, prompt: tuple[int, ...], candidates: tuple[tuple[int, ...], ...]) -> int:
        """KV blocks of a job. See ScoreJob.block_table for a paged backend's."""
        size = self._spec.block_size
        if not self._spec.paged:
            # One candidate at a time goes on from the prompt.
            longest = max(len(candidate) for candidate in candidates)
            return -(-(len(prompt) + longest) // size)
        shared = len(prompt) % size
        own = sum(-(-(shared + len(candidate)) // size) for candidate in candidates)
        return -(-len(prompt) // size) + own

    def _leave_job(
        self, state: _ScoreState, *, computed: bool = False, failed: bool = False
    ) -> None:
        """Close the current job's generator and give its room back."""
        job = state.jobs.popleft()
        try:
            if job.pieces is not None:
                job.pieces.close()
        except Exception:
            # The caller's outcome is already made and must reach it.
            logger.exception("backend failed to close score job %d", job.job_id)
        self._scheduler.finish_job(
            job.job_id, job.prompt_token_ids if computed else (), forget=failed
        )

    def _end(self, state: _ScoreState, outcome: ScoreOutcome) -> None:
        del self._states[state.key]
        if state.jobs:
            self._leave_job(state, failed=outcome.error is not None)
        state.on_end(outcome)


def _checked(
    result: tuple[torch.Tensor, ...], candidates: tuple[tuple[int, ...], ...]
) -> tuple[tuple[float, ...], ...]:
    """A backend's answer as numbers. Raises where it is not one finite number a token."""
    shapes = [tuple(tensor.shape) for tensor in result]
    wanted = [(len(candidate),) for candidate in candidates]
    if shapes != wanted:
        raise RuntimeError(f"the backend returned scores of {shapes} for candidates of {wanted}")
    rows = tuple(tuple(tensor.tolist()) for tensor in result)
    bad = tuple(i for i, row in enumerate(rows) if not all(map(math.isfinite, row)))
    if bad:
        raise NonFiniteScoreError(bad)
    return rows


def _result(state: _ScoreState) -> ScoreResult:
    request = state.request
    totals = [math.fsum(row) for row in state.logprobs[0]]
    prior: list[float] | None = None
    if len(state.logprobs) > 1:
        prior = [math.fsum(row) for row in state.logprobs[1]]
    shares = probabilities(totals, prior)
    scores = tuple(
        CandidateScore(
            index=index,
            logprob=totals[index],
            tokens=tuple(map(TokenLogprob, candidate, state.logprobs[0][index])),
            probability=shares[index],
            calibration_logprob=None if prior is None else prior[index],
        )
        for index, candidate in enumerate(request.candidates)
    )
    end_ns = time.monotonic_ns()
    return ScoreResult(
        request_id=request.request_id,
        scores=scores,
        prompt_tokens=len(request.prompt_token_ids),
        candidate_tokens=request.candidate_tokens,
        timings=Timings(
            queue_ms=max(0, state.first_piece_ns - request.arrival_ns) / _NS_PER_MS,
            prefill_ms=(state.prompt_done_ns - state.first_piece_ns) / _NS_PER_MS,
            decode_ms=(end_ns - state.prompt_done_ns) / _NS_PER_MS,
            e2e_ms=max(0, end_ns - request.arrival_ns) / _NS_PER_MS,
        ),
    )


def probabilities(logprobs: Sequence[float], prior: Sequence[float] | None = None) -> list[float]:
    """Each candidate's share of all: the softmax of their log-probabilities.

    With a `prior`, the log-probabilities after a prompt without content, those are subtracted
    first: contextual calibration with W = diag(p_cf)^-1 and b = 0 (Zhao et al., "Calibrate Before
    Use", ICML 2021, section 5).
    """
    values = list(logprobs)
    if prior is not None:
        values = [value - other for value, other in zip(values, prior, strict=True)]
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
