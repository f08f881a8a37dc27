"""Scoring on the huggingface backend against the log-softmax of transformers, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptjet.service.backends.factory import load_backend
from gptjet.service.backends.huggingface import HuggingFaceBackend
from gptjet.service.engine.backend import Phase, ScheduledBatch, ScoreJob
from gptjet.service.engine.request import SamplingParams, new_request
from gptjet.service.engine.sequence import Sequence
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.transformers_loader import load_causal_lm

Pieces = Generator[None, None, tuple[torch.Tensor, ...]]


def ids(count: int, seed: int, vocab_size: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, vocab_size, (count,), generator=generator).tolist())


def job_of(prompt_tokens: int, lengths: tuple[int, ...], vocab_size: int = 263) -> ScoreJob:
    return ScoreJob(
        job_id=7,
        prompt_token_ids=ids(prompt_tokens, 1, vocab_size),
        candidates=tuple(ids(n, 10 + i, vocab_size) for i, n in enumerate(lengths)),
    )


def run(pieces: Pieces) -> tuple[tuple[torch.Tensor, ...], int]:
    """The result, and how many pieces it took."""
    count = 1
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value, count
        count += 1


def reference(folder: Path, job: ScoreJob) -> list[torch.Tensor]:
    """transformers' log-softmax over prompt and candidate in one forward, without a cache."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for candidate in job.candidates:
        whole = [*job.prompt_token_ids, *candidate]
        with torch.inference_mode():
            rows = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        first = len(job.prompt_token_ids)
        expected.append(
            torch.stack([rows[first + i - 1, token] for i, token in enumerate(candidate)])
        )
    return expected


def assert_scores(scores: tuple[torch.Tensor, ...], expected: list[torch.Tensor]) -> None:
    assert len(scores) == len(expected)
    for score, wanted in zip(scores, expected, strict=True):
        assert score.dtype is torch.float32
        assert score.shape == wanted.shape
        torch.testing.assert_close(score, wanted, rtol=0, atol=1e-4)


def load(folder: Path) -> HuggingFaceBackend:
    return cast(HuggingFaceBackend, load_backend("huggingface", str(folder)).backend)


GEOMETRIES: list[dict[str, Any]] = [
    {"n_positions": 320},
    {"head_dim": 32, "n_head": 4, "n_layer": 3, "rotary_dim": 16, "n_positions": 320, "seed": 3},
    {"head_dim": 16, "n_head": 1, "n_layer": 1, "rotary_dim": 8, "n_positions": 320, "seed": 5},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    ("prompt_tokens", "lengths"),
    [
        (1, (1,)),
        (1, (1, 4, 1, 2)),
        (17, (1, 1, 1)),
        (17, (2, 5, 1, 9)),
        (40, (257, 130, 129, 3)),  # one chunk and a token, and several chunks
    ],
)
def test_scores_equal_the_log_softmax_of_transformers(
    make_gptj_checkpoint: Callable[..., Path],
    geometry: dict[str, Any],
    prompt_tokens: int,
    lengths: tuple[int, ...],
) -> None:
    folder = make_gptj_checkpoint(**geometry)
    job = job_of(prompt_tokens, lengths)
    scores, _ = run(load(folder).score(job))
    assert_scores(scores, reference(folder, job))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64}),
        (
            # Prompt and candidates outgrow the window, so its cache cannot be cut back.
            "mistral",
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_hidden_layers": 2,
                "max_position_embeddings": 64,
                "sliding_window": 8,
            },
        ),
    ],
)
def test_other_causal_models_score_as_transformers_does(
    make_causal_lm_checkpoint: Callable[..., Path], family: str, config: dict[str, Any]
) -> None:
    folder = make_causal_lm_checkpoint(family, vocab_size=96, **config)
    model = load_causal_lm(
        resolve_checkpoint(str(folder)), device=torch.device("cpu"), dtype=torch.float32
    )
    job = job_of(11, (6, 1, 9, 6), vocab_size=96)
    scores, _ = run(HuggingFaceBackend(model, model_name=family).score(job))
    assert_scores(scores, reference(folder, job))


def test_the_prompt_is_computed_once(make_gptj_checkpoint: Callable[..., Path]) -> None:
    backend = load(make_gptj_checkpoint())
    computed: list[int] = []
    backend._model.transformer.wte.register_forward_hook(
        lambda _module, _inputs, output: computed.append(output.shape[1])
    )
    _, pieces = run(backend.score(job_of(20, (1, 4, 1, 3))))
    assert computed == [20, 3, 2]  # a candidate's last token need not be computed
    assert pieces == 3
    computed.clear()
    _, pieces = run(backend.score(job_of(20, (1,) * 64)))
    assert (computed, pieces) == ([20], 1)


def test_streams_that_run_between_the_pieces_compute_what_they_compute_alone(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    folder = make_gptj_checkpoint()
    backend = load(folder)
    request = new_request((72, 101, 108), SamplingParams(max_new_tokens=32))

    def stream(sequence_id: int) -> Sequence:
        return Sequence(
            sequence_id, request, 0, detokenizer=cast(Any, None), sampling_state=cast(Any, None)
        )

    def steps(sequence: Sequence) -> Generator[torch.Tensor]:
        logits = backend.prefill(ScheduledBatch(Phase.PREFILL, (sequence,))).logits
        while True:
            yield logits
            sequence.output_token_ids.append(int(logits.argmax()))
            logits = backend.decode(ScheduledBatch(Phase.DECODE, (sequence,)))

    alone = [row for row, _ in zip(steps(stream(1)), range(6), strict=False)]
    job = job_of(9, (3, 2, 1, 5))
    pieces, between, rows = backend.score(job), steps(stream(2)), []
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            scores = stop.value
            break
        rows.append(next(between))
    assert len(rows) == 3
    assert all(torch.equal(row, expected) for row, expected in zip(rows, alone, strict=False))
    assert_scores(scores, reference(folder, job))


def test_job_closed_early_leaves_the_backend_usable(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    folder = make_gptj_checkpoint()
    backend, job = load(folder), job_of(9, (3, 2))
    pieces = backend.score(job)
    next(pieces)
    pieces.close()
    assert backend._caches == {}
    scores, _ = run(backend.score(job))
    assert_scores(scores, reference(folder, job))
