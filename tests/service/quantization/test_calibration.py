"""The text a model writes for itself, and the activations taken from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.kernels import reference
from gptjet.kernels.batch import ForwardBatch
from gptjet.service.quantization import calibration
from gptjet.service.quantization.calibration import Activations, sample_sequences


def test_own_text_begins_as_asked_ends_at_an_end_and_is_the_same_every_time(
    make_gptj_checkpoint: Callable[..., Path], load_model: Any
) -> None:
    model = load_model(make_gptj_checkpoint(n_positions=64))
    counts: list[int] = []
    drawn = [
        sample_sequences(
            model,
            model.geometry,
            num_tokens=600,
            starts=[[10, 11, 12], []],
            end_ids=[256, 30],
            max_length=50,
            on_progress=counts.append,
        )
        for _ in range(2)
    ]
    sequences = drawn[0]
    assert sequences == drawn[1]
    assert sum(map(len, sequences)) >= 600
    assert sum(counts) == 2 * sum(map(len, sequences))
    assert sum(ids[:3] == [10, 11, 12] for ids in sequences) == len(sequences) // 2
    assert len({tuple(ids) for ids in sequences}) == len(sequences)
    ends = [ids[-1] in (256, 30) for ids in sequences]
    assert any(ends)
    for ids, ended in zip(sequences, ends, strict=True):
        assert ended or len(ids) == 50
        assert not {256, 30} & set(ids[3:-1])


def test_own_text_stays_within_the_context(
    make_gptj_checkpoint: Callable[..., Path], load_model: Any
) -> None:
    model = load_model(make_gptj_checkpoint(n_positions=20))
    sequences = sample_sequences(
        model, model.geometry, num_tokens=1, starts=[[]], end_ids=[], max_length=1000
    )
    assert {len(ids) for ids in sequences} == {20}


@pytest.mark.parametrize("tokens_at_once", [30, 2048])
def test_activations_after_all_layers_are_those_of_the_forward_pass(
    tokens_at_once: int,
    make_gptj_checkpoint: Callable[..., Path],
    load_weights: Any,
    load_model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "_TOKENS_AT_ONCE", tokens_at_once)
    folder = make_gptj_checkpoint(n_positions=64)
    sequences = [[3, 1, 4, 1, 5], list(range(40)), [9], list(range(100, 125))]
    weights = load_weights(folder)
    activations = Activations(weights.geometry, weights.head, sequences)
    for layer in weights.layers():
        norm = (layer.norm_weight, layer.norm_bias)
        inputs = torch.cat(list(activations.second_inputs(*norm, layer.w_in)))
        assert inputs.shape == (71, layer.w_out.shape[1])
        activations.advance(*norm, layer.w_in, layer.w_out)
    head = weights.head
    normed = torch.cat(list(activations.normed(head.norm_weight, head.norm_bias)))
    got = reference.linear(normed, head.lm_head)

    model = load_model(folder)
    start = 0
    for ids in sequences:
        positions = torch.arange(len(ids), dtype=torch.int32)
        batch = ForwardBatch(
            torch.tensor(ids, dtype=torch.int32),
            positions,
            torch.zeros_like(positions),
            torch.arange(4, dtype=torch.int32)[None],
            positions,
        )
        layers, *rest = model.geometry.kv_block_shape
        expected = model.forward(batch, torch.zeros(layers, rest[0], 4, *rest[1:]))
        assert torch.allclose(got[start : start + len(ids)], expected, atol=2e-3)
        start += len(ids)
