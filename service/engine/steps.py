"""What a step computes: prompts, next tokens and drafts, sampled and put on their sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, TypeAlias

from gptjet.service.engine.backend import Phase, ScheduledBatch
from gptjet.service.engine.continuation import append_token
from gptjet.service.engine.lookahead import Lookahead
from gptjet.service.engine.request import RequestOutput, TokenLogprob
from gptjet.service.engine.sampler import NonFiniteLogitsError
from gptjet.service.engine.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    import torch

    from gptjet.service.engine.backend import Backend
    from gptjet.service.engine.sampler import Sampler
    from gptjet.service.engine.scheduler import Scheduler

Outputs: TypeAlias = list[tuple[int, RequestOutput]]
_Failure: TypeAlias = tuple[tuple[Sequence, ...], Exception]


class Report(Protocol):
    """Makes the output of a sequence, and closes the sequence if it has a finish reason."""

    def __call__(
        self,
        sequence: Sequence,
        text: str,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> tuple[int, RequestOutput]:
        """See the class."""
        ...


class Attempt(Protocol):
    """Calls `compute` with a batch, whose sequences end where that raises."""

    def __call__(
        self,
        batch: ScheduledBatch,
        compute: Callable[[ScheduledBatch, Outputs], None],
        outputs: Outputs,
    ) -> None:
        """See the class."""
        ...


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


class Steps:
    """Runs scheduled batches on the backend. Each appends what became certain to `outputs`."""

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        sampler: Sampler,
        *,
        is_urgent: Callable[[], bool],
        attempt: Attempt,
        report: Report,
        echo: Callable[[Sequence], tuple[int, RequestOutput]],
        fail: Callable[[tuple[Sequence, ...], Exception], Outputs],
    ) -> None:
        """is_urgent  something waits for its turn between two steps, so that none is launched early
        echo       the output of a prompt that is to be echoed
        fail       ends sequences with an error; their last outputs
        """
        self._backend = backend
        self._scheduler = scheduler
        self._sampler = sampler
        self._eos_token_ids = backend.spec.eos_token_ids
        self._lookahead = Lookahead(backend, scheduler)
        self._is_urgent = is_urgent
        self._attempt = attempt
        self._report = report
        self._echo = echo
        self._fail = fail

    def compute(self, batch: ScheduledBatch, outputs: Outputs) -> None:
        """Run the batch; appends to `outputs` as it goes, so that an error loses none of them."""
        if batch.phase is Phase.PREFILL:
            self._prefill(batch, outputs)
        elif batch.num_tokens:
            self._verify(batch, outputs)
        elif self._lookahead.takes(batch):
            self._lookahead.launch(batch)
            self.go_on(batch, outputs)
        else:
            logits = self._backend.decode(batch)
            sampled, failures = self._sample(logits, batch.sequences)
            for sequence, token_id, logprob in sampled:
                text = append_token(sequence, token_id, self._eos_token_ids)
                self._scheduler.decoded(sequence)
                outputs.append(self._report(sequence, text, (token_id,), _entries(logprob)))
            for failed, error in failures:
                outputs += self._fail(failed, error)

    @property
    def in_flight(self) -> ScheduledBatch | None:
        """A decode step that is launched and not yet read: `go_on` with it."""
        return self._lookahead.in_flight

    def go_on(self, batch: ScheduledBatch, outputs: Outputs) -> None:
        """Read the step in flight, having launched the one after it where nothing else is due."""
        del batch  # the one in flight
        following = None if self._is_urgent() else self._lookahead.plan_next()
        if following is not None:
            self._attempt(following, self._launch, outputs)
        unusable: list[tuple[int, Sequence]] = []
        for row, sequence, token_id in self._lookahead.collect():
            if token_id < 0:
                unusable.append((row, sequence))
                continue
            sequence.sampling_state.observe(token_id)
            text = append_token(sequence, token_id, self._eos_token_ids)
            self._scheduler.decoded(sequence)
            outputs.append(self._report(sequence, text, (token_id,)))
        if unusable:
            rows, sequences = zip(*unusable, strict=True)
            outputs += self._fail(sequences, NonFiniteLogitsError(rows))

    def _launch(self, batch: ScheduledBatch, outputs: Outputs) -> None:
        del outputs  # what it chooses is read in its own turn
        self._lookahead.launch(batch)

    def _prefill(self, batch: ScheduledBatch, outputs: Outputs) -> None:
        result = self._backend.prefill(batch)
        for row, prompt_logits in enumerate(result.prompt_logits):
            if prompt_logits is not None:
                sequence = batch.sequences[row]
                count = batch.num_tokens[row] if batch.num_tokens else sequence.num_prompt_tokens
                outputs += self._add_prompt_logprobs(sequence, prompt_logits, count)
        decided = self._scheduler.prefilled(batch)
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
            outputs += self._fail(tuple(sequences), error)

    def _start(
        self,
        sequences: list[Sequence],
        logits: torch.Tensor,
        outputs: Outputs,
    ) -> None:
        """Sample what follows the prompts, which are computed."""
        sampled, failures = self._sample(logits, sequences)
        for sequence, token_id, logprob in sampled:
            if sequence.request.sampling_params.echo and not sequence.output_token_ids:
                outputs.append(self._echo(sequence))
            text = append_token(sequence, token_id, self._eos_token_ids)
            outputs.append(self._report(sequence, text, (token_id,), _entries(logprob)))
        for failed, error in failures:
            outputs += self._fail(failed, error)

    def _verify(self, batch: ScheduledBatch, outputs: Outputs) -> None:
        """A decode step with drafts: sample token by token, as without them, while they agree.

        Every token is drawn with the state that those before it leave, so it is the very token
        that a step of its own would have drawn; the first that differs from its draft stands too.
        """
        logits = self._backend.decode(batch)
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
                added[sequence].add(
                    token_id, append_token(sequence, token_id, self._eos_token_ids), logprob
                )
                if sequence.draft_token_ids[position : position + 1] == (token_id,):
                    sequence.num_accepted_tokens += 1
                    if sequence.finish_reason is None:
                        agreed.append(sequence)
            position += 1
        for sequence, tokens in added.items():
            sequence.num_drafted_tokens += len(sequence.draft_token_ids)
            self._scheduler.decoded(sequence)
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
            outputs += self._fail(failed, error)

    def _sample(
        self, logits: torch.Tensor, sequences: Seq[Sequence]
    ) -> tuple[list[tuple[Sequence, int, TokenLogprob | None]], list[_Failure]]:
        """A token for each row of logits, and the sequences whose rows are not finite."""
        failures: list[_Failure] = []
        try:
            sampled = self._sampler.sample(logits, [s.sampling_state for s in sequences])
        except NonFiniteLogitsError as error:
            # NaN or infinity in one row says nothing about the others.
            failures = [(tuple(sequences[row] for row in error.rows), error)]
            good = [row for row in range(len(sequences)) if row not in error.rows]
            sequences = [sequences[row] for row in good]
            sampled = self._sampler.sample(logits[good], [s.sampling_state for s in sequences])
        return list(zip(sequences, sampled.token_ids, sampled.logprobs, strict=True)), failures

    def _add_prompt_logprobs(
        self, sequence: Sequence, prompt_logits: torch.Tensor, num_tokens: int
    ) -> Outputs:
        """Take those of one chunk; returns the end of a sequence whose logits are not finite."""
        start = sequence.num_computed_tokens
        try:
            sequence.prompt_logprobs += self._sampler.prompt_logprobs(
                prompt_logits, sequence.sampling_state, start, start + num_tokens
            )
        except NonFiniteLogitsError as error:
            return self._fail((sequence,), error)
        return []


def _entries(logprob: TokenLogprob | None) -> tuple[TokenLogprob, ...]:
    return () if logprob is None else (logprob,)
