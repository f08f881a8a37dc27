"""What the engine tells whoever counts: one report a step, and the end of each request.

The engine keeps no statistics of its own and knows nobody who does. Without an observer a step
costs two comparisons more than it would without this module.
"""

from __future__ import annotations

import enum
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from gptjet.service.engine.backend import Phase

if TYPE_CHECKING:
    from gptjet.service.engine.backend import ScheduledBatch
    from gptjet.service.engine.request import Request, RequestSummary
    from gptjet.service.engine.score import ScoreOutcome, ScoreRequest
    from gptjet.service.engine.sequence import Sequence

logger = logging.getLogger(__name__)


class StepKind(enum.StrEnum):
    """What a step did."""

    PREFILL = "prefill"
    DECODE = "decode"
    SCORE = "score"


# By value, so that a step costs a look-up and no construction of an enum member.
_KIND_OF = {Phase.PREFILL: StepKind.PREFILL, Phase.DECODE: StepKind.DECODE}


@dataclass(slots=True)
class StepReport:
    """One step, from its scheduling to its outputs. Times in ns.

    num_sequences  computed in it; 1 for a piece of a score request
    computed_prompt_tokens  of a prefill: those of a prompt that is computed again count again, and
                   those that the prefix cache had do not
    output_tokens  sampled in it, over all sequences
    prompt_tokens  of the requests whose first token came in it
    ttft_ns        from the arrival of those requests to their first token
    gaps_ns        for each sequence that had tokens before and has one more now: the time since its
                   last ones. With drafts a step may add several at once: one gap.
    """

    started_ns: int
    kind: StepKind | None = None
    num_sequences: int = 0
    computed_prompt_tokens: int = 0
    duration_ns: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    ttft_ns: list[int] = field(default_factory=list)
    gaps_ns: list[int] = field(default_factory=list)


class StepObserver(Protocol):
    """Told of every step, in the engine thread: what it costs, every stream waits for."""

    def step_ended(self, report: StepReport) -> None:
        """A step is over. The report is the observer's to keep."""
        ...


class RequestObserver(Protocol):
    """Told of every request's end, in the event loop, whether or not its caller still listens."""

    def request_ended(self, request: Request, summary: RequestSummary, /) -> None:
        """The last sequence of a request has ended."""
        ...

    def score_ended(self, request: ScoreRequest, outcome: ScoreOutcome, /) -> None:
        """A score request has ended."""
        ...


class RequestWatch:
    """For the AsyncEngine: tells several observers, none of which can keep an output back."""

    def __init__(self, observers: tuple[RequestObserver, ...]) -> None:
        self._observers = observers

    def request_ended(self, request: Request, summary: RequestSummary) -> None:
        """See RequestObserver; one that raises is logged."""
        for observer in self._observers:
            try:
                observer.request_ended(request, summary)
            except Exception:
                logger.exception("an observer of the requests failed")

    def score_ended(self, request: ScoreRequest, outcome: ScoreOutcome) -> None:
        """See RequestObserver; one that raises is logged."""
        for observer in self._observers:
            try:
                observer.score_ended(request, outcome)
            except Exception:
                logger.exception("an observer of the requests failed")


class StepWatch:
    """For the engine: gathers one StepReport at a time. An observer that raises is logged once."""

    def __init__(self, observer: StepObserver) -> None:
        self._observer = observer
        self._report = StepReport(0)
        self._has_failed = False

    def begin(self) -> None:
        """A step begins; what an unfinished one has gathered is dropped."""
        self._report = StepReport(time.monotonic_ns())

    def note_batch(self, batch: ScheduledBatch) -> None:
        """The step computes this batch."""
        report = self._report
        report.kind = _KIND_OF[batch.phase]
        report.num_sequences = len(batch.sequences)
        if batch.phase is Phase.PREFILL:
            report.computed_prompt_tokens = sum(batch.num_tokens) or sum(
                sequence.num_uncomputed_tokens for sequence in batch.sequences
            )

    def note_score(self) -> None:
        """The step was a piece of a score request."""
        self._report.kind = StepKind.SCORE
        self._report.num_sequences = 1

    def note_tokens(self, sequence: Sequence, num_tokens: int, now_ns: int) -> None:
        """A sequence has `num_tokens` more; to be called before its times say so."""
        report = self._report
        report.output_tokens += num_tokens
        if sequence.last_token_ns:
            report.gaps_ns.append(now_ns - sequence.last_token_ns)
        elif sequence.index == 0:
            # The n continuations of a request share one prompt and one wait for it.
            report.prompt_tokens += sequence.num_prompt_tokens
            report.ttft_ns.append(max(0, now_ns - sequence.request.arrival_ns))

    def end(self) -> None:
        """The step is over: report it, unless nothing could run."""
        report = self._report
        if report.kind is None:
            return
        report.duration_ns = time.monotonic_ns() - report.started_ns
        try:
            self._observer.step_ended(report)
        except Exception:
            if not self._has_failed:  # else the log would have it once a step
                logger.exception("the observer of the engine's steps failed; it is told of further")
            self._has_failed = True
