"""Figures of a three-way decision and of held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from gptjet.service.embedded import LABELS, Label
from gptjet.service.training.scoring import LogitsFunction, pad_right

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Figures:
    """`confusion[i][j]` counts rows of true LABELS[i] decided as LABELS[j]; scores in [0, 1]."""

    rows: int
    accuracy: float
    macro_f1: float
    f1: dict[str, float]
    confusion: list[list[int]]


@dataclass(frozen=True)
class TextFigures:
    """How well the model predicts held-out texts, `<|endoftext|>` included."""

    tokens: int
    bytes: int
    perplexity_per_token: float
    bits_per_byte: float


def figures_for(truth: Sequence[Label], decided: Sequence[Label]) -> Figures:
    """Accuracy, F1 of each class and their mean (macro-F1), and the confusion matrix."""
    confusion = [[0] * len(LABELS) for _ in LABELS]
    for true, guess in zip(truth, decided, strict=True):
        confusion[LABELS.index(true)][LABELS.index(guess)] += 1
    f1: dict[str, float] = {}
    for index, label in enumerate(LABELS):
        hits = confusion[index][index]
        actual, claimed = sum(confusion[index]), sum(row[index] for row in confusion)
        f1[label] = 2 * hits / (actual + claimed) if actual + claimed else 0.0
    right = sum(confusion[index][index] for index in range(len(LABELS)))
    return Figures(
        rows=len(truth),
        accuracy=right / len(truth),
        macro_f1=sum(f1.values()) / len(LABELS),
        f1=f1,
        confusion=confusion,
    )


def text_figures(
    logits_of: LogitsFunction,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 32,
) -> TextFigures:
    """Perplexity of `text<|endoftext|>`, each text on its own.

    A text's first token has nothing before it and is not counted, nor are its bytes.
    """
    end = int(tokenizer.eos_token_id)
    encoded = [[*tokenizer.encode(text, add_special_tokens=False), end] for text in texts]
    encoded.sort(key=len)
    nats, tokens, size = 0.0, 0, 0
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        input_ids = pad_right(batch)
        lengths = torch.tensor([len(ids) for ids in batch])
        counted = torch.arange(1, input_ids.shape[1])[None] < lengths[:, None]
        with torch.no_grad():
            logits = logits_of(input_ids)[:, :-1][counted].float()
        nats += float(functional.cross_entropy(logits, input_ids[:, 1:][counted], reduction="sum"))
        tokens += int(counted.sum())
        for ids in batch:
            size += len(str(tokenizer.decode(ids[:-1])).encode())
            size -= len(str(tokenizer.decode(ids[:1])).encode())
    return TextFigures(
        tokens=tokens,
        bytes=size,
        perplexity_per_token=math.exp(nats / tokens),
        bits_per_byte=nats / math.log(2) / size,
    )
