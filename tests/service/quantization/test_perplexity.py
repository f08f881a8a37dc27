"""Perplexity against transformers' own, and what cannot be measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptjet.kernels.batch import ForwardBatch
from gptjet.service.embedded import heldout_rows
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused.forward import TorchModel
from gptjet.service.models.fused.weights import load_fused_weights
from gptjet.service.models.tokenizer import load_tokenizer
from gptjet.service.quantization import perplexity
from gptjet.service.quantization.perplexity import (
    Text,
    heldout_text,
    measure_perplexity,
    read_text,
    split_windows,
)

DOCUMENTS = [list(range(40, 90)), [7], list(range(100, 103)), list(range(5, 150)), [200, 201]]


def test_perplexity_is_transformers_cross_entropy_over_the_same_windows(
    make_gptj_checkpoint: Callable[..., Path],
    load_model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_gptj_checkpoint(n_positions=64)
    reference: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    loss, count = 0.0, 0
    for window in split_windows(DOCUMENTS, 64):
        ids = torch.tensor([window])
        with torch.inference_mode():
            loss += float(reference(ids, labels=ids).loss) * (len(window) - 1)
        count += len(window) - 1
    model = load_model(folder)
    seen: list[int] = []
    for most in (64, 200, 2048):  # however the windows share passes
        monkeypatch.setattr(perplexity, "_TOKENS_AT_ONCE", most)
        got = measure_perplexity(model, model.geometry, DOCUMENTS, on_progress=seen.append)
        assert got.value == pytest.approx(math.exp(loss / count), rel=1e-4)
        assert got.num_tokens == count == 49 + 2 + 63 + 63 + 16 + 1
    assert sum(seen) == 3 * (50 + 3 + 145 + 2)


class Uniform:
    """Every token is as likely as any other."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def forward(self, batch: ForwardBatch, kv_cache: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(batch.logits_rows), self.vocab)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(
    make_gptj_checkpoint: Callable[..., Path], load_weights: Any
) -> None:
    geometry = load_weights(make_gptj_checkpoint()).geometry
    got = measure_perplexity(Uniform(geometry.vocab_size), geometry, DOCUMENTS)
    assert got.value == pytest.approx(geometry.vocab_size, rel=1e-5)


def test_windows_cover_a_document_without_overlap_and_leave_single_tokens_out() -> None:
    assert split_windows([[1, 2, 3, 4, 5], [6], []], 2) == [[1, 2], [3, 4]]


def test_text_of_one_token_is_refused(
    make_gptj_checkpoint: Callable[..., Path], load_model: Any
) -> None:
    model = load_model(make_gptj_checkpoint())
    with pytest.raises(BackendLoadError, match="fewer than two tokens"):
        measure_perplexity(model, model.geometry, [[1], []])


def test_tokens_beyond_the_vocabulary_are_refused(
    make_gptj_checkpoint: Callable[..., Path], load_model: Any
) -> None:
    model = load_model(make_gptj_checkpoint())
    with pytest.raises(BackendLoadError, match="id 263 and the model has 263"):
        measure_perplexity(model, model.geometry, [[1, 263]])


def test_shipped_text_is_every_heldout_row_with_its_label() -> None:
    text = heldout_text()
    rows = heldout_rows()
    assert len(text.documents) == len(rows)
    assert text.documents[0] == f"Text: {rows[0].text}\nSentiment: {rows[0].label}"


def test_files_that_hold_no_text_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with pytest.raises(BackendLoadError, match=r"text\.txt cannot be read: No such file"):
        read_text(path)
    path.write_text(" \n")
    with pytest.raises(BackendLoadError, match=r"text\.txt is empty"):
        read_text(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BackendLoadError, match=r"text\.txt is not UTF-8"):
        read_text(path)
    path.write_text("fine")
    assert read_text(path) == Text("text.txt", ("fine",))


def test_hash_of_a_text_depends_on_where_its_documents_end() -> None:
    assert Text("a", ("bc", "d")).sha256 != Text("a", ("b", "cd")).sha256
    assert Text("a", ("bc",)).sha256 == Text("other name", ("bc",)).sha256


def test_an_int8_kv_cache_costs_the_embedded_model_next_to_nothing() -> None:
    """Of 6 bits it would be 0.009 %, of 4 bits 0.06 %."""
    checkpoint = resolve_checkpoint("embedded")
    tokenizer = load_tokenizer(checkpoint.path, local_files_only=True)
    documents = [tokenizer.encode(text) for text in heldout_text().documents[:40]]
    weights = load_fused_weights(checkpoint, "fp32")
    model = TorchModel(weights.geometry, weights.head, weights.layers())
    floats, int8 = (
        measure_perplexity(model, weights.geometry, documents, kv_dtype=dtype).value
        for dtype in (torch.float32, torch.int8)
    )
    assert int8 == pytest.approx(floats, rel=5e-5)
    assert int8 != floats
