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
    return [make_sequence(i, 1, tokens - 1) for i in range(count)]


def make_sequence(sequence_id: int, prompt_tokens: int, max_new_tokens: int = 100) -> Sequence:
    """Its prompt shares nothing with another's."""
    nothing: Any = None
    prompt = tuple(range(1000 * sequence_id, 1000 * sequence_id + prompt_tokens))
    return Sequence(
        sequence_id=sequence_id,
        request=new_request(prompt, SamplingParams(max_new_tokens=max_new_tokens)),
        index=0,
        detokenizer=nothing,
        sampling_state=nothing,
    )


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
            chunks = batch.num_tokens if scheduler.max_prefill_tokens else ()
            lengths = [f"x{n}" for n in chunks] or [""] * len(batch.sequences)
            named = zip(batch.sequences, lengths, strict=True)
            ids = ",".join(f"{s.sequence_id}{length}" for s, length in named)
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


# --- chunked prefill: P(0x8) is 8 tokens of sequence 0 ---


def make_chunked(chunk: int = 16, **limits: Any) -> Scheduler:
    return make_scheduler(
        **{"paged": True, "max_prefill_tokens": chunk, "max_prefill_batch_size": 4, **limits}
    )


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = make_chunked()
    scheduler.add([make_sequence(0, 100)])
    assert steps(scheduler, 2) == ["P(0x16)", "P(0x16)"]
    scheduler.add([make_sequence(1, 8)])
    assert steps(scheduler, 3) == ["P(0x8,1x8)", "D(1)", "P(0x16)"]


def test_short_prompts_that_keep_arriving_do_not_starve_a_long_one() -> None:
    scheduler = make_chunked(max_sequences=64, max_batch_size=64)
    scheduler.add([make_sequence(0, 64)])
    prefills: list[str] = []
    for number in range(1, 30):
        scheduler.add([make_sequence(number, 16)])
        prefills += (step for step in steps(scheduler, 1) if step.startswith("P"))
    assert all(prefill.startswith("P(0x8,") for prefill in prefills[:8])
    assert not prefills[8].startswith("P(0")  # 64 tokens are eight times 8


def test_the_shortest_of_the_others_comes_first_and_what_is_left_goes_on() -> None:
    scheduler = make_chunked()
    scheduler.add([make_sequence(0, 40), make_sequence(1, 30), make_sequence(2, 5)])
    assert steps(scheduler, 2) == ["P(0x8,2x5,1x3)", "D(2)"]


def test_the_oldest_takes_what_the_others_leave() -> None:
    scheduler = make_chunked()
    scheduler.add([make_sequence(0, 40), make_sequence(1, 2)])
    assert steps(scheduler, 1) == ["P(0x14,1x2)"]


def test_a_prefill_step_holds_no_more_prompts_than_the_backend_takes() -> None:
    scheduler = make_chunked(max_prefill_batch_size=2)
    scheduler.add([make_sequence(i, 4) for i in range(3)])
    assert steps(scheduler, 3) == ["P(0x4,1x4)", "D(0,1)", "P(2x4)"]


def test_admission_on_a_paged_backend_leaves_a_block_for_each_that_can_grow() -> None:
    # Two blocks each for 16 tokens and one more, and one for each other that can still grow.
    scheduler = make_chunked(chunk=64, num_kv_blocks=6)
    scheduler.add([make_sequence(i, 16) for i in range(3)])
    assert steps(scheduler, 2) == ["P(0x16,1x16)", "D(0,1)"]
    assert len(scheduler.waiting) == 1
    scheduler = make_chunked(chunk=64, num_kv_blocks=6)
    scheduler.add([make_sequence(i, 16, max_new_tokens=16) for i in range(3)])
    assert steps(scheduler, 1) == ["P(0x16,1x16,2x16)"]  # none of them can grow
