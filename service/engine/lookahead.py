"""Decode steps whose tokens the backend chooses, each launched before the last one is looked at.

While the device computes step n + 1, the host reads what step n chose: so the device never waits
for text, stop strings and callers. Step n + 1 is planned as if every sequence went on. One that
turns out to have ended has a token computed that nobody reads, into a block that was its own when
the step was launched; whatever is given that block next is launched later, and so computes later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from gptjet.service.engine.backend import SampledBatch, SamplingBackend, ScheduledBatch
from gptjet.service.engine.sequence import SequenceStatus

if TYPE_CHECKING:
    from gptjet.service.engine.backend import Backend, SampledTokenIds
    from gptjet.service.engine.scheduler import Scheduler
    from gptjet.service.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step on its way.

    block_tables  what each sequence held at the launch: a list of its own, so that another one (or
                  none) says that the sequence was preempted meanwhile, or has ended
    """

    batch: ScheduledBatch
    block_tables: tuple[list[int], ...]
    token_ids: SampledTokenIds

    def alive(self) -> Iterator[tuple[int, Sequence]]:
        """(row, sequence) of those that are still where the launch left them."""
        for row, sequence in enumerate(self.batch.sequences):
            if (
                sequence.block_table is self.block_tables[row]
                and sequence.status is SequenceStatus.RUNNING
            ):
                yield row, sequence


class Lookahead:
    """At most two steps on their way: one to be read, and the one after it."""

    def __init__(self, backend: Backend, scheduler: Scheduler) -> None:
        spec = backend.spec
        self._backend = cast(SamplingBackend, backend)
        self._scheduler = scheduler
        self._is_possible = spec.paged and spec.samples_on_device
        self._can_verify = spec.max_draft_tokens > 0
        self._steps: deque[_Launched] = deque()

    @property
    def in_flight(self) -> ScheduledBatch | None:
        """The step to be read next; None where there is none, or nobody waits for one."""
        while self._steps and next(self._steps[0].alive(), None) is None:
            self._steps.popleft()
        return self._steps[0].batch if self._steps else None

    def takes(self, batch: ScheduledBatch) -> bool:
        """Whether the backend can choose the tokens of a decode step."""
        return (
            self._is_possible
            and not batch.num_tokens
            and not any(map(self._needs_host, batch.sequences))
        )

    def plan_next(self) -> ScheduledBatch | None:
        """The step after the only one on its way, where that need not be read first."""
        if len(self._steps) != 1 or any(map(self._needs_host, self._scheduler.running)):
            return None
        return self._scheduler.schedule_ahead({s for _, s in self._steps[0].alive()})

    def launch(self, batch: ScheduledBatch) -> None:
        """Launch a decode step, the first or the one that `plan_next` gave. Raises what the
        backend raises, and then nothing more is on its way than before."""
        rows: dict[Sequence, int] = {}
        if self._steps:
            rows = {sequence: row for row, sequence in self._steps[-1].alive()}
        sources = tuple(rows.get(sequence, -1) for sequence in batch.sequences)
        ahead = [int(source >= 0) for source in sources]
        sampled = SampledBatch(
            sequences=batch.sequences,
            positions=tuple(
                sequence.num_tokens - 1 + more
                for sequence, more in zip(batch.sequences, ahead, strict=True)
            ),
            token_ids=tuple(sequence.last_token_id for sequence in batch.sequences),
            sources=sources,
            draw_positions=tuple(
                sequence.sampling_state.num_output_tokens + more
                for sequence, more in zip(batch.sequences, ahead, strict=True)
            ),
            block_copies=batch.block_copies,
        )
        token_ids = self._backend.decode_and_sample(sampled)
        tables = tuple(sequence.block_table for sequence in batch.sequences)
        self._steps.append(_Launched(batch, tables, token_ids))

    def collect(self) -> list[tuple[int, Sequence, int]]:
        """Wait for the oldest step: (row, sequence, id) of those that are still waiting for it.

        An id is -1 where the logits are not usable. Raises what went wrong in the step, which is
        then over.
        """
        step = self._steps.popleft()
        token_ids = step.token_ids.wait()
        return [(row, sequence, token_ids[row]) for row, sequence in step.alive()]

    def _needs_host(self, sequence: Sequence) -> bool:
        drafts = self._can_verify and sequence.request.sampling_params.prompt_lookup_tokens > 0
        return drafts or sequence.sampling_state.needs_host
