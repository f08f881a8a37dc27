"""The reference of one block at a time is transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptjet.service.backends import layerwise
from gptjet.service.models.architecture import build_config
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused.weights import load_fused_weights

CPU = torch.device("cpu")
SEQUENCES = [(5,), tuple(range(40)), tuple(range(100, 109))]
WANTED = [1, 17, 9]


def expected_logits(folder: Path, sequences: list[tuple[int, ...]]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0] for ids in sequences]


def check(folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int = 16) -> None:
    monkeypatch.setattr(layerwise, "_CHUNK", chunk)
    monkeypatch.setattr(layerwise, "_HEAD_ROWS", 100)
    checkpoint = resolve_checkpoint(str(folder))
    stored = layerwise.StoredWeights(checkpoint, build_config(checkpoint))
    fused = layerwise.FusedValues(load_fused_weights(checkpoint, "fp32", progress=False))
    expected = expected_logits(folder, SEQUENCES)
    for source in (stored, fused):
        found = layerwise.last_logits(source, SEQUENCES, WANTED, CPU)
        for rows, all_rows, count in zip(found, expected, WANTED, strict=True):
            torch.testing.assert_close(rows, all_rows[-count:].clone(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gptj_in_chunks_equals_the_whole_model(
    dtype: str, make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(make_gptj_checkpoint(n_layer=3, dtype=dtype), monkeypatch)


def test_sequences_that_are_computed_together_do_not_see_each_other(
    make_gptj_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layerwise._groups([1, 40, 9]) == [[0, 2, 1]]
    check(make_gptj_checkpoint(), monkeypatch, chunk=256)
    monkeypatch.setattr(layerwise, "_CHUNK", 20)
    assert layerwise._groups([1, 40, 9]) == [[0, 2], [1]]


def test_codegen_equals_the_whole_model(
    make_causal_lm_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_causal_lm_checkpoint(
        "codegen", n_embd=128, n_head=4, n_layer=2, rotary_dim=16, n_positions=64, vocab_size=263
    )
    check(folder, monkeypatch)


def test_quantized_values_are_those_that_the_weights_stand_for(
    make_gptj_checkpoint: Callable[..., Path],
) -> None:
    """Near the float ones, and not them."""
    folder = make_gptj_checkpoint()
    weights = load_fused_weights(resolve_checkpoint(str(folder)), "int8", progress=False)
    (found,) = layerwise.last_logits(layerwise.FusedValues(weights), SEQUENCES[1:2], [17], CPU)
    expected = expected_logits(folder, SEQUENCES[1:2])[0][-17:]
    error = (found - expected).abs().max() / expected.abs().max()
    assert 1e-3 < error < 0.1
