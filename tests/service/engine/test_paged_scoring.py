"""Score jobs in the blocks of a paged backend: the mock checks every slot that it reads."""

from __future__ import annotations

import math
import random
from collections.abc import Generator
from typing import Any

import pytest
import torch

from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import ScoreJob
from gptjet.service.engine.config import EngineConfig
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.errors import InvalidRequestError
from gptjet.service.engine.request import FinishReason, SamplingParams, new_request
from gptjet.service.engine.score import ScoreOutcome, new_score_request
from gptjet.service.engine.tokenizer import ByteTokenizer

BEST = math.log(1 - 1 / math.e)


class Jobs(MockBackend):
    """A paged mock of blocks of 4 tokens that keeps the jobs it was given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(paged=True, block_size=4, **{"num_kv_blocks": 64, **options})
        self.jobs: list[ScoreJob] = []
        self.fails = False

    def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        self.jobs.append(job)
        result = yield from super().score(job)
        if self.fails:
            raise ZeroDivisionError("the kernel broke")
        return result


def make_engine(backend: Jobs | None = None, **config: Any) -> Engine:
    return Engine(backend or Jobs(), ByteTokenizer(), EngineConfig(**config))


def add(engine: Engine, prompt: str, *candidates: str, **options: Any) -> list[ScoreOutcome]:
    outcomes: list[ScoreOutcome] = []
    request = new_score_request(
        tuple(prompt.encode()), tuple(tuple(c.encode()) for c in candidates), **options
    )
    engine.add_score(request, outcomes.append)
    return outcomes


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.scheduler.block_manager.check_invariants()
    manager = engine.scheduler.block_manager
    assert manager.num_free_blocks == manager.num_blocks


def jobs_of(engine: Engine) -> list[ScoreJob]:
    assert isinstance(engine.backend, Jobs)
    return engine.backend.jobs


def test_blocks_of_a_job_are_the_prompts_and_then_each_candidates_own() -> None:
    # 9 tokens: three blocks. One token of the third is copied before each candidate: 1 + 2, 1 + 4
    # and 1 + 3 tokens take one, two and one block.
    engine = make_engine()
    outcomes = add(engine, "abcdefghi", "jk", "jklm", "jkl")
    run(engine)
    (job,) = jobs_of(engine)
    assert len(job.block_table) == len(set(job.block_table)) == 3 + 1 + 2 + 1
    assert job.num_cached_tokens == 0
    result = outcomes[0].result
    assert result is not None
    assert [s.logprob for s in result.scores] == pytest.approx(
        [2 * BEST, 4 * BEST, 3 * BEST], abs=1e-4
    )


def test_prompt_is_found_in_the_prefix_cache_by_scores_and_by_streams() -> None:
    # Of 9 tokens two whole blocks; of 8 only one, since the last token must be computed.
    engine = make_engine()
    add(engine, "abcdefghi", "j")
    run(engine)
    add(engine, "abcdefghi", "j", "k")
    add(engine, "abcdefgh", "j")
    add(engine, "abcdXYZ", "j")
    run(engine)
    assert [job.num_cached_tokens for job in jobs_of(engine)] == [0, 8, 4, 4]
    key = engine.add(new_request(tuple(b"abcdefghi"), SamplingParams(max_new_tokens=2)))
    outputs = []
    while engine.has_work:
        outputs += [output for k, output in engine.step() if k == key]
    assert "".join(o.text for o in outputs) == "jk"
    assert outputs[-1].summary is not None
    assert outputs[-1].summary.cached_prompt_tokens == 8


def test_job_that_failed_or_was_left_shares_nothing() -> None:
    backend = Jobs()
    engine = make_engine(backend)
    backend.fails = True
    failed = add(engine, "abcdefghi", "j")
    run(engine)
    assert failed[0].finish_reason is FinishReason.ERROR
    backend.fails = False
    key = engine.add_score(
        new_score_request(tuple(b"abcdefghi"), ((1,), (2,))), lambda _outcome: None
    )
    engine.step()
    engine.cancel(key)
    outcomes = add(engine, "abcdefghi", "j")
    run(engine)
    assert [job.num_cached_tokens for job in backend.jobs] == [0, 0, 0]
    assert outcomes[0].result is not None


def test_without_the_prefix_cache_nothing_is_shared() -> None:
    engine = make_engine(prefix_cache=False)
    for _ in range(2):
        add(engine, "abcdefghi", "j")
    run(engine)
    assert [job.num_cached_tokens for job in jobs_of(engine)] == [0, 0]


def test_candidates_whose_blocks_can_never_fit_are_refused_with_the_number() -> None:
    # 9 tokens: 3 blocks; each candidate 1 + 4 tokens: 2 blocks.
    engine = make_engine(Jobs(num_kv_blocks=8))
    add(engine, "abcdefghi", "jklm", "jklm")
    run(engine)
    with pytest.raises(InvalidRequestError, match="need 36 tokens of KV cache at once and can nev"):
        add(engine, "abcdefghi", "jklm", "jklm", "jklm")


def test_slots_are_not_what_a_paged_job_waits_for() -> None:
    engine = make_engine(Jobs(max_sequences=1))
    engine.add(new_request((97,), SamplingParams(max_new_tokens=40)))
    engine.step()
    outcomes = add(engine, "ab", "c")
    for _ in range(8):
        engine.step()
    assert outcomes[0].result is not None
    assert engine.scheduler.running
    run(engine)


@pytest.mark.parametrize("seed", range(4))
def test_random_scores_and_streams_under_tight_memory_are_all_right(seed: int) -> None:
    """Chunked prompts, preemption and jobs on 24 blocks; every slot read is checked by the mock."""
    rng = random.Random(seed)
    backend = Jobs(
        num_kv_blocks=24, max_sequences=8, max_prefill_tokens=8, max_prefill_batch_size=3
    )
    engine = make_engine(backend)
    expected: dict[int, str] = {}
    texts: dict[int, str] = {}
    scores: list[tuple[list[ScoreOutcome], str]] = []
    cancelled: list[list[ScoreOutcome]] = []
    alphabet = "abcdefghijklmnopqrstuvwxyz" * 5
    for step in range(400):
        if step < 250 and rng.random() < 0.2:
            start, length = rng.randrange(4), rng.randrange(1, 30)
            prompt, tokens = alphabet[start : start + length], rng.randrange(1, 30)
            key = engine.add(
                new_request(tuple(prompt.encode()), SamplingParams(max_new_tokens=tokens))
            )
            expected[key] = alphabet[start + length : start + length + tokens]
        if step < 250 and rng.random() < 0.2:
            start, length = rng.randrange(4), rng.randrange(1, 30)
            prompt, after = alphabet[start : start + length], alphabet[start + length :]
            # Each candidate is the likeliest continuation of its length.
            candidates = [after[: rng.randrange(1, 8)] for _ in range(rng.randrange(1, 4))]
            outcomes: list[ScoreOutcome] = []
            request = new_score_request(
                tuple(prompt.encode()), tuple(tuple(c.encode()) for c in candidates)
            )
            key = engine.add_score(request, outcomes.append)
            scores.append((outcomes, ",".join(candidates)))
            if rng.random() < 0.2:
                for other, output in engine.step():
                    texts[other] = texts.get(other, "") + output.text
                engine.cancel(key)
                cancelled.append(outcomes)
        for key, output in engine.step():
            texts[key] = texts.get(key, "") + output.text
        engine.scheduler.block_manager.check_invariants()
    while engine.has_work:
        for key, output in engine.step():
            assert output.error is None
            texts[key] = texts.get(key, "") + output.text
        engine.scheduler.block_manager.check_invariants()
    assert texts == expected
    assert len(scores) > 20
    for outcomes, candidates in scores:
        (outcome,) = outcomes
        if outcome.result is None:
            assert outcomes in cancelled
            assert outcome.finish_reason is FinishReason.CANCELLED
            continue
        assert [s.logprob for s in outcome.result.scores] == pytest.approx(
            [len(candidate) * BEST for candidate in candidates.split(",")], abs=1e-4
        )
    manager = engine.scheduler.block_manager
    assert manager.num_free_blocks == manager.num_blocks


def test_a_score_that_waits_and_is_cancelled_leaves_nothing_behind() -> None:
    engine = make_engine(Jobs(num_kv_blocks=8))
    stream = new_request(tuple(b"a" * 20), SamplingParams(max_new_tokens=8))
    engine.add(stream)
    engine.step()
    outcomes: list[ScoreOutcome] = []
    request = new_score_request(tuple(b"p" * 16), ((99,),))
    key = engine.add_score(request, outcomes.append)
    engine.step()
    engine.cancel(key)
    assert len(outcomes) == 1
    run(engine)
    assert engine.scheduler.block_manager._keys == {}
