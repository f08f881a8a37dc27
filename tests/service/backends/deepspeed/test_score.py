"""Scoring on the injected graph, against transformers' log-softmax."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch

from gptjet.service.backends.deepspeed.backend import DeepSpeedBackend
from gptjet.service.backends.deepspeed.injected_model import WorkspaceBusyError
from gptjet.service.backends.deepspeed.injection import inject
from gptjet.service.engine.backend import BackendSpec, Phase, ScheduledBatch, ScoreJob
from gptjet.service.engine.request import SamplingParams, new_request
from gptjet.service.engine.sequence import Sequence


def backend_of(model: torch.nn.Module) -> DeepSpeedBackend:
    injected = inject(copy.deepcopy(model), dtype=torch.float32, max_context=128)
    spec = BackendSpec(
        name="deepspeed",
        model_name="test",
        architecture="test",
        num_parameters=0,
        device="cpu",
        dtype="float32",
        vocab_size=97,
        max_context=128,
        max_sequences=1,
        max_batch_size=1,
        num_kv_blocks=8,
    )
    return DeepSpeedBackend(injected, spec)


def ids(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 97, (count,), generator=generator).tolist())


def job_of(prompt_tokens: int, lengths: tuple[int, ...]) -> ScoreJob:
    candidates = tuple(ids(n, 10 + i) for i, n in enumerate(lengths))
    return ScoreJob(job_id=3, prompt_token_ids=ids(prompt_tokens, 1), candidates=candidates)


def run(backend: DeepSpeedBackend, job: ScoreJob) -> tuple[tuple[torch.Tensor, ...], int]:
    """The result, and how many pieces it took."""
    pieces, count = backend.score(job), 1
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value, count
        count += 1


def assert_scores(scores: tuple[torch.Tensor, ...], model: Any, job: ScoreJob) -> None:
    assert len(scores) == len(job.candidates)
    first = len(job.prompt_token_ids)
    for score, candidate in zip(scores, job.candidates, strict=True):
        with torch.inference_mode():
            whole = torch.tensor([[*job.prompt_token_ids, *candidate]])
            rows = model(whole).logits[0].float().log_softmax(-1)
        expected = torch.stack([rows[first + i - 1, token] for i, token in enumerate(candidate)])
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-4)


def sequence_of(prompt: tuple[int, ...]) -> Sequence:
    request = new_request(prompt, SamplingParams(max_new_tokens=8))
    return Sequence(9, request, 0, detokenizer=cast(Any, None), sampling_state=cast(Any, None))


@pytest.mark.parametrize("family", ["gptj", "gpt2", "gpt_neo"])
@pytest.mark.parametrize(
    ("prompt_tokens", "lengths", "prompts_computed"),
    [
        (1, (1,), 1),
        (1, (1, 5, 2), 2),
        (20, (1,) * 64, 1),
        (20, (4, 1, 7, 1), 2),
        (90, (38, 3), 2),  # to the end of the context
    ],
)
def test_scores_equal_the_log_softmax_of_transformers(
    family: str,
    prompt_tokens: int,
    lengths: tuple[int, ...],
    prompts_computed: int,
    op: Any,
    make_model: Any,
) -> None:
    model, job = make_model(family), job_of(prompt_tokens, lengths)
    scores, pieces = run(backend_of(model), job)
    assert_scores(scores, model, job)
    assert pieces == prompts_computed
    assert op.decode_steps == (1 if prompt_tokens == 1 and lengths == (1,) else 0)


def test_scoring_while_a_sequence_holds_the_workspace_is_refused(op: Any, make_model: Any) -> None:
    """It would wait for the lock that its own thread holds: for ever."""
    model = make_model()
    backend, sequence = backend_of(model), sequence_of(ids(6, 2))
    backend.prefill(ScheduledBatch(Phase.PREFILL, (sequence,)))
    with pytest.raises(RuntimeError, match="sequence 9 holds DeepSpeed's one KV workspace"):
        next(backend.score(job_of(5, (1, 2))))
    backend.release(sequence)
    job = job_of(5, (1, 2))
    assert_scores(run(backend, job)[0], model, job)


def test_workspace_is_nobodys_between_the_pieces_and_after_an_early_close(
    op: Any, make_model: Any
) -> None:
    backend = backend_of(make_model())
    pieces = backend.score(job_of(5, (3, 2)))
    next(pieces)
    try:
        backend.model.begin(max_tokens=4, blocking=False).end()
    except WorkspaceBusyError:
        pytest.fail("the workspace is held between two pieces")
    pieces.close()
    sequence = sequence_of(ids(6, 2))
    logits = backend.prefill(ScheduledBatch(Phase.PREFILL, (sequence,))).logits
    assert logits.isfinite().all()
    backend.release(sequence)


def test_failed_forward_leaves_the_workspace_to_the_next_job(op: Any, make_model: Any) -> None:
    model = make_model()
    backend, job = backend_of(model), job_of(5, (3, 2))
    with pytest.raises(IndexError):
        run(backend, ScoreJob(job_id=1, prompt_token_ids=(5, 1000), candidates=((1,),)))
    assert_scores(run(backend, job)[0], model, job)
