"""Steps that fail, and steps without memory: who ends, who goes on, and with which tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from gptjet.service.backends.mock_faults import FaultyMockBackend
from gptjet.service.backends.mock_settings import MockSettings
from gptjet.service.engine.backend import Phase, ScheduledBatch
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.errors import EngineStepError, OutOfMemoryError
from gptjet.service.engine.faults import is_out_of_memory
from gptjet.service.engine.request import (
    FinishReason,
    RequestOutput,
    SamplingParams,
    new_request,
)
from gptjet.service.engine.score import ScoreOutcome, new_score_request
from gptjet.service.engine.tokenizer import ByteTokenizer

PAGED: dict[str, Any] = {"paged": True, "block_size": 4}
CHUNKED = PAGED | {"max_prefill_batch_size": 4, "max_prefill_tokens": 32}
KINDS = pytest.mark.parametrize("kind", [{}, PAGED, CHUNKED], ids=["plain", "paged", "chunked"])


def make_engine(faults: MockSettings | None = None, **options: Any) -> Engine:
    backend = FaultyMockBackend(faults or MockSettings(), **options)
    return Engine(backend, ByteTokenizer(), EngineConfig())


def add(engine: Engine, prompt: str, **params: Any) -> int:
    return engine.add(new_request(tuple(prompt.encode()), SamplingParams(**params)))


def run(engine: Engine, num_steps: int = 10_000) -> dict[int, list[RequestOutput]]:
    outputs: dict[int, list[RequestOutput]] = {}
    for _ in range(num_steps):
        if not engine.has_work:
            break
        for key, output in engine.step():
            outputs.setdefault(key, []).append(output)
        engine.scheduler.block_manager.check_invariants()
    assert not engine.has_work, "it goes on for ever"
    assert not engine.scheduler.has_work
    manager = engine.scheduler.block_manager
    assert manager.num_free_blocks == manager.num_blocks
    assert isinstance(engine.backend, FaultyMockBackend)
    assert engine.backend.cached == {}
    return outputs


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def errors_of(outputs: list[RequestOutput]) -> list[Exception]:
    return [output.error for output in outputs if output.error is not None]


# --- out of memory in a prefill ---


@KINDS
def test_only_the_prompt_that_cannot_fit_fails(kind: dict[str, Any]) -> None:
    # The chunks of the last kind halve until they fit, so there nothing fails.
    engine = make_engine(MockSettings(oom_above_tokens=20), **kind)
    short = [add(engine, "a" * 9, max_new_tokens=3) for _ in range(3)]
    long = add(engine, "a" * 50, max_new_tokens=3)
    outputs = run(engine)
    assert [text_of(outputs[key]) for key in short] == ["bcd"] * 3
    if kind is CHUNKED:
        assert text_of(outputs[long]) == "bcd"
        return
    (error,) = errors_of(outputs[long])
    assert isinstance(error, OutOfMemoryError)
    assert error.error_id in str(error)
    assert outputs[long][-1].summary is not None
    # And the engine goes on.
    key = add(engine, "a", max_new_tokens=2)
    assert text_of(run(engine)[key]) == "bc"


def test_prompts_that_only_fit_one_by_one_are_computed_one_by_one() -> None:
    # Four prompts of 10 in a step of 32 tokens: two do not fit together, one does.
    engine = make_engine(MockSettings(oom_above_tokens=12), **CHUNKED | {"max_prefill_tokens": 64})
    keys = [add(engine, letter * 10, max_new_tokens=2) for letter in "acem"]
    outputs = run(engine)
    assert [text_of(outputs[key]) for key in keys] == ["bc", "de", "fg", "no"]
    assert engine.scheduler.max_prefill_tokens == 64  # it was the company, not the chunk


def test_a_chunk_that_did_not_fit_is_not_tried_again_with_the_next_prompt() -> None:
    backend_options = CHUNKED | {"max_prefill_tokens": 64}
    engine = make_engine(MockSettings(oom_above_tokens=20), **backend_options)
    key = add(engine, "a" * 60, max_new_tokens=1)
    assert text_of(run(engine)[key]) == "b"
    assert engine.scheduler.max_prefill_tokens == 15  # of 60, by way of 30
    assert isinstance(engine.backend, FaultyMockBackend)
    before = engine.backend.num_steps
    key = add(engine, "c" * 32, max_new_tokens=1)
    assert text_of(run(engine)[key]) == "d"
    assert engine.backend.num_steps - before == 3  # three chunks, none in vain


def test_a_chunk_of_one_block_that_does_not_fit_fails_its_request() -> None:
    engine = make_engine(MockSettings(oom_above_tokens=2), **CHUNKED)
    key, small = add(engine, "a" * 60, max_new_tokens=1), add(engine, "aa", max_new_tokens=1)
    outputs = run(engine)
    (error,) = errors_of(outputs[key])
    assert isinstance(error, OutOfMemoryError)
    assert text_of(outputs[small]) == "b"


def test_a_score_without_memory_fails_alone() -> None:
    engine = make_engine(MockSettings(oom_above_tokens=20))
    outcomes: list[ScoreOutcome] = []
    for length in (30, 10):
        request = new_score_request((ord("a"),) * length, ((ord("b"),),))
        engine.add_score(request, outcomes.append)
    key = add(engine, "a", max_new_tokens=2)
    assert text_of(run(engine)[key]) == "bc"
    assert isinstance(outcomes[0].error, OutOfMemoryError)
    assert outcomes[1].result is not None


# --- out of memory in a decode ---


@KINDS
@pytest.mark.parametrize("limit", [1, 3, 7])
def test_decode_steps_without_memory_are_computed_again_with_fewer_and_lose_no_token(
    kind: dict[str, Any], limit: int
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "ignore_eos": True}
    prompts = ["abc", "Xyz", "hello", "k", "mnop", "Q", "zz", "the end"]
    alone = [text_of(run_alone(prompt, seed, options, kind)) for seed, prompt in enumerate(prompts)]
    engine = make_engine(MockSettings(oom_above_sequences=limit), **kind)
    keys = [add(engine, prompt, seed=seed, **options) for seed, prompt in enumerate(prompts)]
    outputs = run(engine)
    assert [text_of(outputs[key]) for key in keys] == alone
    for key in keys:
        indices = [output.finish_reason for output in outputs[key]]
        assert indices.count(FinishReason.LENGTH) == 1
    # Every sequence that ends lets one more in again.
    assert engine.scheduler._max_sequences < engine.scheduler._most_sequences
    for _ in range(engine.scheduler._most_sequences):
        add(engine, "a", max_new_tokens=1)
    run(engine)
    assert engine.scheduler._max_sequences == engine.scheduler._most_sequences


def run_alone(
    prompt: str, seed: int, options: dict[str, Any], kind: dict[str, Any]
) -> list[RequestOutput]:
    engine = make_engine(**kind)
    key = add(engine, prompt, seed=seed, **options)
    return run(engine)[key]


class TightBackend(FaultyMockBackend):
    """No decode step fits, however few its sequences are."""

    def decode(self, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("not even one")


@KINDS
def test_a_sequence_that_cannot_even_decode_alone_fails_and_ends(kind: dict[str, Any]) -> None:
    engine = Engine(TightBackend(MockSettings(), **kind), ByteTokenizer(), EngineConfig())
    keys = [add(engine, "a", max_new_tokens=5) for _ in range(3)]
    outputs = run(engine)
    for key in keys:
        (error,) = errors_of(outputs[key])
        assert isinstance(error, OutOfMemoryError)


@KINDS
def test_tokens_are_the_same_whatever_step_runs_out_of_memory(kind: dict[str, Any]) -> None:
    """Out of memory at random: after admission nobody fails who fits alone, and nothing leaks."""
    rng = random.Random(8)
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.2, "ignore_eos": True}

    class Unlucky(FaultyMockBackend):
        def decode(self, batch: Any) -> torch.Tensor:
            if len(batch.sequences) > 1 and rng.random() < 0.3:
                raise torch.OutOfMemoryError("unlucky")
            return super().decode(batch)

        def prefill(self, batch: Any) -> Any:
            if len(batch.sequences) > 1 and rng.random() < 0.3:
                raise torch.OutOfMemoryError("unlucky")
            return super().prefill(batch)

    prompts = ["".join(rng.choices("abcXYZ ", k=rng.randint(1, 30))) for _ in range(24)]
    alone = [text_of(run_alone(p, seed, options, kind)) for seed, p in enumerate(prompts)]
    # So few blocks that the scheduler preempts, too.
    blocks = {"num_kv_blocks": 40} if kind else {}
    engine = Engine(Unlucky(MockSettings(), **kind | blocks), ByteTokenizer(), EngineConfig())
    keys = [add(engine, prompt, seed=seed, **options) for seed, prompt in enumerate(prompts)]
    outputs = run(engine)
    assert [text_of(outputs[key]) for key in keys] == alone


def test_memory_that_ends_while_sampling_fails_what_has_moved_on_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(**PAGED)
    first = add(engine, "a", max_new_tokens=30)
    for _ in range(3):
        engine.step()
    second = add(engine, "a", max_new_tokens=3)
    sample, calls = engine.sampler.sample, []

    def short_of_memory(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("the sampler's own")
        return sample(*arguments)

    monkeypatch.setattr(engine.sampler, "sample", short_of_memory)
    outputs = run(engine)
    assert isinstance(errors_of(outputs[second])[0], OutOfMemoryError)
    assert not errors_of(outputs[first])


# --- other errors ---


def test_a_failed_step_ends_its_own_sequences_with_an_id_and_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Steps: prefill 1, decode 2, prefill 3 of the second request fails.
    engine = make_engine(MockSettings(fail_at_step=3))
    first = add(engine, "a", max_new_tokens=4)
    second = add(engine, "a", max_new_tokens=4)
    outputs = run(engine)
    assert text_of(outputs[first]) == "bcde"
    (error,) = errors_of(outputs[second])
    assert isinstance(error, EngineStepError)
    assert not isinstance(error, OutOfMemoryError)
    assert error.error_id in caplog.text
    assert "step 3 fails" in caplog.text
    assert "step 3" not in str(error)  # a foreign exception's words stay in the log
    assert engine.guard.num_failed_steps == 0  # one went well since


def test_steps_that_fail_in_a_row_are_counted() -> None:
    # Prefill 1 and decode 2 go well; then each step ends the only sequence that it has.
    engine = make_engine(MockSettings(fail_from_step=3), max_sequences=1)
    for _ in range(4):
        add(engine, "a", max_new_tokens=9)
    run(engine)
    assert engine.guard.num_failed_steps == 4


def test_nan_in_one_row_fails_that_request_and_names_it() -> None:
    engine = make_engine(MockSettings(nan_at_step=5))
    first, second = add(engine, "a", max_new_tokens=9), add(engine, "a", max_new_tokens=9)
    outputs = run(engine)
    bad, good = sorted((first, second), key=lambda key: not errors_of(outputs[key]))
    (error,) = errors_of(outputs[bad])
    assert isinstance(error, EngineStepError)
    assert "not finite" in str(error)
    assert text_of(outputs[good]) == "bcdefghij"


class Driver:
    class OutOfMemoryError(RuntimeError):
        pass


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (Driver.OutOfMemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (KeyError("x"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_sequence_that_ended_in_the_step_that_ran_out_of_memory_stays_ended() -> None:
    """As a step that was launched early may hold one."""
    engine = make_engine(**PAGED)
    keys = [add(engine, "a", max_new_tokens=9) for _ in range(3)]
    while len(engine.scheduler.running) < 3:
        engine.step()
    batch = ScheduledBatch(Phase.DECODE, tuple(engine.scheduler.running))
    ended = engine.cancel(keys[0])

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("none")

    outputs: list[tuple[int, RequestOutput]] = []
    engine.guard.run(batch, no_memory, outputs)
    assert [output.finish_reason for _, output in ended] == [FinishReason.CANCELLED]
    assert outputs == []
    rest = run(engine)
    assert set(rest) == set(keys[1:])
