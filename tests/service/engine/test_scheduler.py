"""Who runs next, step by step. Sequences are named by id; a step is written P(ids) or D(ids)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import Phase, ScheduledBatch
from gptjet.service.engine.request import SamplingParams, new_request
from gptjet.service.engine.scheduler import Scheduler
from gptjet.service.engine.sequence import Sequence, SequenceStatus


def make_scheduler(**limits: Any) -> Scheduler:
    max_sequences = limits.pop("max_sequences", 8)
    return Scheduler(replace(MockBackend().spec, **limits), max_sequences)


def make_sequences(count: int, tokens: int = 16) -> list[Sequence]:
    nothing: Any = None
    return [
        Sequence(
            sequence_id=i,
            request=new_request((1,), SamplingParams(max_new_tokens=tokens - 1)),
            index=0,
            detokenizer=nothing,
            sampling_state=nothing,
        )
        for i in range(count)
    ]


def compute(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    """What the engine does between two steps: every sequence that is due gets a token."""
    if batch.phase is Phase.PREFILL:
        for _, sequence in scheduler.prefilled(batch):
            sequence.output_token_ids.append(1)
    else:
        for sequence in batch.sequences:
            sequence.output_token_ids.append(1)
            scheduler.decoded(sequence)


def steps(scheduler: Scheduler, count: int) -> list[str]:
    shown = []
    for _ in range(count):
        batch = scheduler.schedule()
        if batch is None:
            shown.append("-")
        else:
            ids = ",".join(str(s.sequence_id) for s in batch.sequences)
            shown.append(f"{'P' if batch.phase is Phase.PREFILL else 'D'}({ids})")
            compute(scheduler, batch)
        scheduler.block_manager.check_invariants()
    return shown


def test_a_decode_step_comes_between_two_prefills() -> None:
    scheduler = make_scheduler(max_batch_size=8)
    scheduler.add(make_sequences(3))
    assert steps(scheduler, 6) == ["P(0)", "D(0)", "P(1)", "D(0,1)", "P(2)", "D(0,1,2)"]


def test_sequences_take_turns_where_a_step_holds_fewer_than_run() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    scheduler.add(make_sequences(2))
    assert steps(scheduler, 7) == ["P(0)", "D(0)", "P(1)", "D(0)", "D(1)", "D(0)", "D(1)"]


def test_prefill_takes_several_where_the_backend_can() -> None:
    scheduler = make_scheduler(max_batch_size=8, max_prefill_batch_size=2)
    scheduler.add(make_sequences(3))
    assert steps(scheduler, 4) == ["P(0,1)", "D(0,1)", "P(2)", "D(0,1,2)"]


def test_one_sequence_at_a_time_waits_for_the_one_before() -> None:
    scheduler = make_scheduler(max_sequences=1, max_batch_size=1)
    first, second = make_sequences(2)
    scheduler.add([first, second])
    assert steps(scheduler, 3) == ["P(0)", "D(0)", "D(0)"]
    scheduler.finish(first)
    assert first.status is SequenceStatus.FINISHED
    assert steps(scheduler, 2) == ["P(1)", "D(1)"]


def test_admission_waits_for_the_blocks_of_the_longest_form() -> None:
    scheduler = make_scheduler(num_kv_blocks=3)
    sequences = make_sequences(2, tokens=32)  # two blocks each, of three
    scheduler.add(sequences)
    assert steps(scheduler, 3) == ["P(0)", "D(0)", "D(0)"]
    scheduler.finish(sequences[0])
    assert steps(scheduler, 1) == ["P(1)"]
    assert scheduler.block_manager.num_free_blocks == 1


def test_a_long_request_at_the_head_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_kv_blocks=3)
    running, long = make_sequences(2, tokens=32)
    short = make_sequences(3, tokens=16)[2]
    scheduler.add([running, long, short])
    assert steps(scheduler, 3) == ["P(0)", "D(0)", "D(0)"]


def test_a_waiting_sequence_can_leave_before_it_ran() -> None:
    scheduler = make_scheduler()
    first, second = make_sequences(2)
    scheduler.add([first, second])
    scheduler.finish(first)
    assert steps(scheduler, 1) == ["P(1)"]
    scheduler.finish(second)
    assert not scheduler.has_work
    assert steps(scheduler, 1) == ["-"]
    assert scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks
