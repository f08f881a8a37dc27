"""Score on the fused backend: transformers' log-softmax, on shared blocks, in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.service.engine.backend import ScoreJob
from gptjet.service.engine.score import new_score_request

pytestmark = pytest.mark.usefixtures("computer")


def blocks_for(num_tokens: int) -> int:
    return math.ceil(num_tokens / 16)


def job_of(
    prompt: list[int], candidates: list[list[int]], *, first_block: int = 3, cached: int = 0
) -> ScoreJob:
    """A job on blocks that run downwards from a high one, so that none is where it would be
    without a table."""
    count = blocks_for(len(prompt))
    count += sum(blocks_for(len(prompt) % 16 + len(c)) for c in candidates)
    return ScoreJob(
        1,
        tuple(prompt),
        tuple(tuple(c) for c in candidates),
        tuple(range(first_block + count - 1, first_block - 1, -1)),
        cached,
    )


def finish(work: Any) -> tuple[int, tuple[torch.Tensor, ...]]:
    """How often it yielded, and its result."""
    pauses = 0
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return pauses, stop.value
        pauses += 1


def random_tokens(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, 256, (length,), generator=generator).tolist()
    return tokens


def test_a_backend_of_one_token_a_pass_scores_too(
    computer: str,
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
) -> None:
    folder = make_gptj_checkpoint(n_positions=96)
    backend = load_fused(folder, deterministic=computer == "torch").backend
    prompt, candidates = random_tokens(20, 1), [random_tokens(n, 2) for n in (1, 2, 20)]
    _, scores = finish(backend.score(job_of(prompt, candidates)))
    for found, candidate in zip(scores, candidates, strict=True):
        expected = reference_of(folder).logprobs(prompt, candidate)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 45])
def test_candidates_have_the_logprobs_of_transformers(
    length: int,
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
) -> None:
    """Candidates of one token, of a block and more, equal ones, and two that begin alike."""
    folder = make_gptj_checkpoint(n_positions=96)
    backend = load_fused(folder).backend
    backend.runner.kv_cache.fill_(float("nan"))
    prompt = random_tokens(length, 1)
    candidates = [random_tokens(n, 2) for n in (1, 2, 16, 17, 40)] + [[5], [5], [7, 5]]
    _, scores = finish(backend.score(job_of(prompt, candidates)))
    for found, candidate in zip(scores, candidates, strict=True):
        assert found.dtype is torch.float32
        expected = reference_of(folder).logprobs(prompt, candidate)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_codegen_candidates_have_the_logprobs_of_transformers(
    make_codegen_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
) -> None:
    folder = make_codegen_checkpoint()
    prompt, candidates = random_tokens(21, 1), [random_tokens(n, 2) for n in (1, 9)]
    _, scores = finish(load_fused(folder).backend.score(job_of(prompt, candidates)))
    for found, candidate in zip(scores, candidates, strict=True):
        expected = reference_of(folder).logprobs(prompt, candidate)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_cached_prompt_is_not_computed_again_and_its_blocks_are_only_read(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any]
) -> None:
    backend = load_fused(make_gptj_checkpoint(n_positions=96)).backend
    prompt, candidates = random_tokens(43, 1), [random_tokens(n, 2) for n in (3, 20)]
    _, scores = finish(backend.score(job_of(prompt, candidates)))
    job = job_of(prompt, candidates, cached=32)
    shared = list(job.block_table[:2])
    before = backend.runner.kv_cache[:, :, shared].clone()
    backend.runner.kv_cache[:, :, [b for b in job.block_table if b not in shared]] = float("nan")
    _, again = finish(backend.score(job))
    assert torch.equal(backend.runner.kv_cache[:, :, shared], before)
    for found, expected in zip(again, scores, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_long_jobs_pause_between_prefill_steps_and_other_work_may_come_between(
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = load_fused(make_gptj_checkpoint(n_positions=96)).backend
    prompt, candidates = random_tokens(40, 1), [random_tokens(n, 2) for n in (30, 5, 6, 1)]
    whole_pauses, whole = finish(backend.score(job_of(prompt, candidates)))
    assert whole_pauses == 1  # the prompt, then every candidate
    sizes: list[int] = []
    run_pass = backend.runner.run_pass

    def recorded(segments: Any) -> Any:
        sizes.append(sum(len(segment.token_ids) for segment in segments))
        return run_pass(segments)

    monkeypatch.setattr(backend.runner, "run_pass", recorded)
    object.__setattr__(backend.spec, "max_prefill_tokens", 16)
    first, second = (
        backend.score(job_of(prompt, candidates, first_block=block)) for block in (2, 40)
    )
    pauses = 0
    while next(first, "done") != "done":  # in turns: the second writes between the first's passes
        next(second, None)
        pauses += 1
    _, scores = finish(backend.score(job_of(prompt, candidates)))
    assert max(sizes) == 16
    # 40 tokens are three chunks; 29 + 4 + 5 are three more
    assert pauses == 5
    for found, expected in zip(scores, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_fully_cached_prompt_is_refused(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any]
) -> None:
    backend = load_fused(make_gptj_checkpoint()).backend
    with pytest.raises(ValueError, match="16 of a prompt of 16 tokens are cached"):
        next(backend.score(job_of(random_tokens(16, 1), [[1]], cached=16)))


def test_block_table_of_another_length_is_refused(
    make_gptj_checkpoint: Callable[..., Path], load_fused: Callable[..., Any]
) -> None:
    backend = load_fused(make_gptj_checkpoint()).backend
    job = job_of(random_tokens(20, 1), [[1, 2], [3]])
    short = ScoreJob(1, job.prompt_token_ids, job.candidates, job.block_table[:-1])
    with pytest.raises(ValueError, match=r"needs 4 KV blocks, its block table has 3"):
        next(backend.score(short))


def test_engine_scores_beside_running_streams_with_cached_prefixes(
    make_gptj_checkpoint: Callable[..., Path],
    load_fused: Callable[..., Any],
    reference_of: Callable[..., Any],
    drive: Callable[..., Any],
) -> None:
    folder = make_gptj_checkpoint(n_positions=96)
    driver = drive(load_fused(folder, max_sequences=8), max_prefill_tokens=16)
    texts = [random_tokens(n, n) for n in (3, 20, 44)]
    keys = [driver.add(prompt, max_new_tokens=30) for prompt in texts]
    driver.run(steps=8)
    candidates = tuple(tuple(random_tokens(n, 2)) for n in (1, 6, 25))
    outcomes: list[Any] = []
    for prompt in (texts[2], texts[1], texts[2]):
        driver.engine.add_score(new_score_request(tuple(prompt), candidates), outcomes.append)
        driver.run(steps=5)
    driver.run()
    reference = reference_of(folder)
    for prompt, outcome in zip((texts[2], texts[1], texts[2]), outcomes, strict=True):
        assert outcome.error is None
        for score, candidate in zip(outcome.result.scores, candidates, strict=True):
            found = torch.tensor([token.logprob for token in score.tokens])
            expected = reference.logprobs(prompt, candidate)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for key, prompt in zip(keys, texts, strict=True):
        assert driver.tokens[key, 0] == reference.generate(prompt, 30)
    driver.check_nothing_is_held()
