"""Random traffic over the paged mock, against what each request gives alone on the plain one.

Arrivals, cancellations, deadlines, other holders of blocks, little memory, small chunks, shared
prompts, n > 1 and drafts, as Hypothesis finds them. After every step the blocks are counted and the
scheduler is held to its rules; at the end every request has said what it says alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as Phases
from hypothesis import strategies as st

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine import engine as engine_module
from gptjet.service.engine.backend import Phase, PrefillResult, SampledBatch, ScheduledBatch
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.request import FinishReason, RequestOutput, SamplingParams, new_request
from gptjet.service.engine.sequence import Sequence, SequenceStatus
from gptjet.service.engine.tokenizer import ByteTokenizer

_CONTEXT = 48
_ALONE_ID = 10**9


class Clock:
    """Time in steps, so that a deadline passes at the same place in every run."""

    def __init__(self) -> None:
        self.now_ns = 1

    def monotonic_ns(self) -> int:
        return self.now_ns


@dataclass(frozen=True)
class Job:
    """What is asked for: a prompt and parameters that can be hashed."""

    prompt: str
    params: tuple[tuple[str, Any], ...]
    patience: int | None  # steps until its deadline

    @property
    def sampling_params(self) -> SamplingParams:
        return SamplingParams(**dict(self.params))


@dataclass
class Said:
    """What a request has said, by sequence."""

    ids: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    echoes: dict[int, Any] = field(default_factory=dict)
    endings: dict[int, FinishReason] = field(default_factory=dict)
    num_summaries: int = 0

    def hear(self, output: RequestOutput) -> None:
        assert output.error is None
        assert output.index not in self.endings, "nothing comes after the end of a sequence"
        if output.is_prompt:
            assert output.index not in self.ids, "the echo comes first, and once"
            self.echoes[output.index] = (output.text, output.token_ids, output.logprobs)
        else:
            self.ids.setdefault(output.index, []).extend(output.token_ids)
            self.logprobs.setdefault(output.index, []).extend(output.logprobs)
            self.texts[output.index] = self.texts.get(output.index, "") + output.text
        if output.finish_reason is not None:
            self.endings[output.index] = output.finish_reason
        self.num_summaries += output.summary is not None


@cache
def said_alone(prompt: str, params: tuple[tuple[str, Any], ...]) -> Said:
    engine = Engine(MockBackend(max_context=_CONTEXT), ByteTokenizer())
    engine.add(new_request(tuple(prompt.encode()), SamplingParams(**dict(params))))
    said = Said()
    while engine.has_work:
        for _, output in engine.step():
            said.hear(output)
    return said


class Rules(MockBackend):
    """The paged mock, which also holds every step to the scheduler's rules."""

    scheduler: Any
    last_phase: Phase | None = None

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        spec = self.spec
        assert self.last_phase is not Phase.PREFILL or not self.scheduler.running
        assert len(batch.sequences) <= spec.max_prefill_batch_size
        assert all(count > 0 for count in batch.num_tokens)
        prompts = self.scheduler.prefilling
        if spec.max_prefill_tokens is None:
            assert list(batch.num_tokens) == [s.num_uncomputed_tokens for s in batch.sequences]
        else:
            assert sum(batch.num_tokens) <= spec.max_prefill_tokens
            left = {s: s.num_uncomputed_tokens for s in prompts}
            done = dict(zip(batch.sequences, batch.num_tokens, strict=True))
            half = spec.max_prefill_tokens - spec.max_prefill_tokens // 2
            assert done[prompts[0]] >= min(left[prompts[0]], half)
            shortest = sorted(prompts[1:], key=left.__getitem__)[: spec.max_prefill_batch_size - 1]
            assert set(batch.sequences) <= {prompts[0], *shortest}
        self.last_phase = Phase.PREFILL
        return super().prefill(batch)

    def decode(self, batch: ScheduledBatch) -> Any:
        assert len(batch.sequences) <= self.spec.max_batch_size
        for sequence in batch.sequences:
            params, drafts = sequence.request.sampling_params, len(sequence.draft_token_ids)
            assert drafts <= min(self.spec.max_draft_tokens, params.prompt_lookup_tokens)
            assert sequence.num_tokens + drafts < sequence.request.max_tokens
        self.last_phase = Phase.DECODE
        return super().decode(batch)

    def decode_and_sample(self, batch: SampledBatch) -> Any:
        assert 0 < len(batch.sequences) <= self.spec.max_batch_size
        for row, sequence in enumerate(batch.sequences):
            assert sequence.draft_token_ids == ()
            assert not sequence.sampling_state.needs_host
            assert batch.positions[row] + 1 < sequence.request.max_tokens
        self.last_phase = Phase.DECODE
        return super().decode_and_sample(batch)


def check(engine: Engine) -> None:
    """Count the blocks from the sequences' side."""
    scheduler, manager = engine.scheduler, engine.scheduler.block_manager
    manager.check_invariants()
    admitted: list[Sequence] = [*scheduler.prefilling, *scheduler.running]
    assert len(admitted) == len(set(admitted)) <= engine.spec.max_sequences
    for sequence in scheduler.waiting:
        assert sequence.status is SequenceStatus.WAITING
        assert (sequence.block_table, sequence.num_computed_tokens) == ([], 0)
    for sequence in admitted:
        assert sequence.status is SequenceStatus.RUNNING
        held = len(sequence.block_table)
        assert held >= manager.blocks_for(sequence.num_computed_tokens)
        assert held <= manager.blocks_for(sequence.request.max_tokens)
        assert sequence.draft_token_ids == ()
    for sequence in scheduler.running:
        assert sequence.num_computed_tokens == sequence.num_tokens - 1


PROMPTS = st.builds(
    lambda head, length, tail: (head * 8)[:length] + tail,
    st.sampled_from(["abcdefgh", "abcz", "Zq"]),
    st.integers(0, 20),
    st.sampled_from(["a", "k", "W", "!", "ab"]),
)
PARAMS = st.fixed_dictionaries(
    {"max_new_tokens": st.sampled_from([24, 20, 12, 5, 1]), "seed": st.integers(0, 3)},
    optional={
        "temperature": st.just(1.2),
        "n": st.integers(2, 3),
        "prompt_lookup_tokens": st.integers(1, 6),
        "logprobs": st.integers(0, 1),
        "echo": st.just(True),
        "stop": st.sampled_from([("ef",), ("zab", "q")]),
        "ignore_eos": st.just(True),
        "frequency_penalty": st.just(0.4),
    },
)
JOBS = st.builds(
    Job,
    PROMPTS,
    PARAMS.map(lambda params: tuple(params.items())),
    st.sampled_from([None, None, None, 0, 3, 10, 30]),
)
EVENTS = st.lists(
    st.one_of(
        JOBS,
        JOBS,
        JOBS,
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("hold"), st.integers(1, 4)),
        st.tuples(st.just("let go"), st.integers(0, 3)),
    ),
    min_size=10,
    max_size=30,
)
LIMITS = st.fixed_dictionaries(
    {
        "num_kv_blocks": st.integers(12, 24),
        "max_sequences": st.sampled_from([6, 4, 2, 1]),
        "max_batch_size": st.integers(1, 6),
        "max_prefill_batch_size": st.integers(1, 3),
        "max_prefill_tokens": st.none() | st.integers(1, 16),
        "max_draft_tokens": st.integers(0, 5),
        "samples_on_device": st.booleans(),
    }
)


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[Clock]:
    patch, clock = pytest.MonkeyPatch(), Clock()
    patch.setattr(engine_module, "time", clock)
    yield clock
    patch.undo()


# Without the explaining phase: it takes minutes where a step takes milliseconds.
@settings(
    max_examples=150,
    deadline=None,
    phases=(Phases.explicit, Phases.reuse, Phases.generate, Phases.shrink),
    suppress_health_check=(HealthCheck.too_slow,),
)
@given(limits=LIMITS, prefix_cache=st.booleans(), events=EVENTS)
def test_every_request_says_what_it_says_alone(
    clock: Clock, limits: dict[str, Any], prefix_cache: bool, events: list[Any]
) -> None:
    backend = Rules(paged=True, block_size=4, max_context=_CONTEXT, **limits)
    engine = Engine(backend, ByteTokenizer(), EngineConfig(prefix_cache=prefix_cache))
    backend.scheduler = engine.scheduler
    manager = engine.scheduler.block_manager
    asked: dict[int, Job] = {}
    heard: dict[int, Said] = {}
    holders: list[int] = []

    def hear(outputs: list[tuple[int, RequestOutput]]) -> None:
        for key, output in outputs:
            heard[key].hear(output)
        check(engine)

    def step() -> None:
        clock.now_ns += 1
        hear(engine.step())

    for event in events:
        match event:
            case Job():
                deadline = None if event.patience is None else clock.now_ns + event.patience
                request = new_request(
                    tuple(event.prompt.encode()), event.sampling_params, deadline_ns=deadline
                )
                key = engine.add(request)
                asked[key], heard[key] = event, Said()
            case ("step", count):
                for _ in range(count):
                    step()
            case ("cancel", index) if asked:
                hear(engine.cancel(list(asked)[index % len(asked)]))
            case ("hold", count):
                holder = _ALONE_ID + len(holders)
                if manager.allocate(holder, count) is not None:
                    holders.append(holder)
            case ("let go", index) if holders:
                manager.free(holders[index % len(holders)])
    for holder in holders:
        manager.free(holder)
    # Every token costs at most a step of its own and a preempted prompt's chunks; far below this.
    for _ in range(20_000):
        if not engine.has_work:
            break
        step()
    assert not engine.has_work, "the engine makes no progress"
    assert not engine.scheduler.has_work
    assert manager.num_free_blocks == manager.num_blocks
    for key, job in asked.items():
        compare(heard[key], said_alone(job.prompt, job.params), job)


def compare(heard: Said, alone: Said, job: Job) -> None:
    assert heard.num_summaries == 1
    for index in range(job.sampling_params.n):
        ids = heard.ids.get(index, [])
        assert ids == alone.ids[index][: len(ids)]
        assert heard.logprobs.get(index, []) == alone.logprobs[index][: len(ids)]
        if ids and job.sampling_params.echo:
            assert heard.echoes[index] == alone.echoes[index]
        ending = heard.endings[index]
        if ending not in (FinishReason.CANCELLED, FinishReason.DEADLINE):
            assert ids == alone.ids[index]
            assert heard.texts[index] == alone.texts[index]
            assert ending == alone.endings[index]
