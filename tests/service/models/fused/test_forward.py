"""Tokens and logits of the fused layout against transformers on the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused.forward import TorchModel
from gptjet.service.models.fused.weights import load_fused_weights

# Logits are of order 10 here; FP32 keeps 7 digits, and sums of a thousand terms lose one or two.
TOLERANCE = 2e-3

GPTJ = [
    {"head_dim": 32, "n_head": 2, "rotary_dim": 16},
    {"head_dim": 32, "n_head": 4, "rotary_dim": 32},
    {"head_dim": 48, "n_head": 2, "rotary_dim": 2},
    {"head_dim": 64, "n_head": 2, "rotary_dim": 32},
    {"head_dim": 64, "n_head": 3, "rotary_dim": 64, "n_layer": 3},
    {"head_dim": 64, "n_head": 1, "rotary_dim": None},
    {"head_dim": 80, "n_head": 2, "rotary_dim": 32},
    {"head_dim": 96, "n_head": 2, "rotary_dim": 24, "n_layer": 1},
    {"head_dim": 128, "n_head": 1, "rotary_dim": 64},
    {"head_dim": 128, "n_head": 2, "rotary_dim": 128},
    {"head_dim": 256, "n_head": 1, "rotary_dim": 64},
    {"head_dim": 256, "n_head": 2, "rotary_dim": 256, "vocab_size": 300},
]
CODEGEN = [
    {"n_embd": 128, "n_head": 4, "rotary_dim": 16},
    {"n_embd": 256, "n_head": 8, "rotary_dim": 32},
    {"n_embd": 256, "n_head": 4, "rotary_dim": 64, "tie_word_embeddings": True},
    {"n_embd": 128, "n_head": 4, "rotary_dim": 8, "n_inner": 200},
]


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


@pytest.mark.parametrize("length", [1, 19])
@pytest.mark.parametrize("sizes", GPTJ, ids=str)
def test_greedy_tokens_and_logits_equal_transformers_to_the_end_of_the_context(
    sizes: dict[str, Any],
    length: int,
    make_gptj_checkpoint: Callable[..., Path],
    run_fused: Callable[..., Any],
    run_transformers: Callable[..., Any],
) -> None:
    folder = make_gptj_checkpoint(n_positions=40, **sizes)
    steps = 40 - length + 1  # the last token fills the context, and its logits are one more
    expected, expected_logits = run_transformers(folder, prompt_ids(length), steps)
    tokens, logits = run_fused(folder).greedy(prompt_ids(length), steps)
    assert tokens == expected
    assert (logits - expected_logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("length", [1, 19])
@pytest.mark.parametrize("sizes", CODEGEN, ids=str)
def test_codegen_equals_transformers_codegen(
    sizes: dict[str, Any],
    length: int,
    make_causal_lm_checkpoint: Callable[..., Path],
    run_fused: Callable[..., Any],
    run_transformers: Callable[..., Any],
) -> None:
    folder = make_causal_lm_checkpoint(
        "codegen", n_layer=2, n_positions=40, n_ctx=40, vocab_size=263, **sizes
    )
    steps = 40 - length + 1
    expected, expected_logits = run_transformers(folder, prompt_ids(length), steps)
    tokens, logits = run_fused(folder).greedy(prompt_ids(length), steps)
    assert tokens == expected
    assert (logits - expected_logits).abs().max() < TOLERANCE


def test_sequences_in_one_pass_are_what_they_are_alone(
    make_gptj_checkpoint: Callable[..., Path], run_fused: Callable[..., Any]
) -> None:
    """A prompt, a decode step and a later chunk of a third prompt together."""
    folder = make_gptj_checkpoint(n_positions=64)
    a, b, c = prompt_ids(17, 1), prompt_ids(33, 2), prompt_ids(40, 3)
    alone = run_fused(folder)
    expected = [alone.step((row, ids, 0)) for row, ids in enumerate((a, b, c))]
    together = run_fused(folder)
    together.step((1, b[:-1], 0), (2, c[:25], 0))
    logits = together.step((0, a, 0), (1, b[-1:], 32), (2, c[25:], 25))
    assert torch.allclose(logits[:17], expected[0], atol=TOLERANCE)
    assert torch.allclose(logits[17:18], expected[1][-1:], atol=TOLERANCE)
    assert torch.allclose(logits[18:], expected[2][25:], atol=TOLERANCE)


# Largest error of a logit, of logits whose standard deviation is 8.
BOUNDS = {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.3, "int8": 1.0, "int4": 12.0}


@pytest.mark.parametrize("weight_type", BOUNDS)
def test_weight_types_differ_from_fp32_by_their_rounding_only(
    weight_type: str,
    make_gptj_checkpoint: Callable[..., Path],
    run_fused: Callable[..., Any],
) -> None:
    folder = make_gptj_checkpoint(head_dim=64, n_head=4)
    ids = prompt_ids(20)
    exact = run_fused(folder).step((0, ids, 0))
    error = (run_fused(folder, weight_type).step((0, ids, 0)) - exact).abs().max()
    assert error <= BOUNDS[weight_type]
    assert weight_type == "fp32" or error > 0


def test_closed_model_has_no_bytes_and_refuses_to_compute(
    make_gptj_checkpoint: Callable[..., Path], run_fused: Callable[..., Any]
) -> None:
    runner = run_fused(make_gptj_checkpoint())
    parameters = 2 * (128 * 128 * 12 + 4 * 128 + 3 * 128 + 128 + 3 * 128)
    assert runner.model.nbytes > 4 * parameters
    runner.model.close()
    runner.model.close()
    assert runner.model.nbytes == 0
    with pytest.raises(ValueError, match="closed"):
        runner.step((0, [1], 0))


def test_tied_weights_count_once_in_nbytes(make_causal_lm_checkpoint: Callable[..., Path]) -> None:
    fields = {"n_layer": 1, "n_embd": 128, "n_head": 4, "rotary_dim": 16, "vocab_size": 4000}
    sizes = []
    for is_tied in (True, False):
        folder = make_causal_lm_checkpoint("codegen", tie_word_embeddings=is_tied, **fields)
        weights = load_fused_weights(resolve_checkpoint(str(folder)), "fp32")
        sizes.append(TorchModel(weights.geometry, weights.head, weights.layers()).nbytes)
    assert sizes[1] - sizes[0] == 4000 * 128 * 4


def test_wrong_number_of_layers_is_refused(make_gptj_checkpoint: Callable[..., Path]) -> None:
    weights = load_fused_weights(resolve_checkpoint(str(make_gptj_checkpoint())), "fp32")
    with pytest.raises(ValueError, match="1 layers given, 2 expected"):
        TorchModel(weights.geometry, weights.head, [next(weights.layers())])
