"""Perplexity of a model on texts: what quantisation is judged by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry, ForwardBatch
from gptjet.service.embedded import build_prompt, heldout_rows
from gptjet.service.engine.errors import BackendLoadError

# Logits of a pass: 128 MiB of float32, and no more tokens than a prefill step would have.
_LOGITS_ELEMENTS = 1 << 25
_TOKENS_AT_ONCE = 2048


class Model(Protocol):
    """The forward pass, with kernels or without."""

    def forward(self, batch: ForwardBatch, kv_cache: torch.Tensor) -> torch.Tensor:
        """[R, vocab] float32."""
        ...


@dataclass(frozen=True, slots=True)
class Text:
    """Documents that do not see each other. `sha256` is of their bytes, a zero byte between them.

    name  what to call it in a report: the file's, or of a shipped text
    """

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the documents as UTF-8, hexadecimal."""
        return hashlib.sha256(b"\0".join(text.encode() for text in self.documents)).hexdigest()


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood in nats, and over how many tokens that mean is."""

    value: float
    num_tokens: int


def heldout_text() -> Text:
    """The embedded checkpoint's held-out rows, each a prompt with its right answer."""
    return Text(
        "held-out rows",
        tuple(f"{build_prompt(row.text)} {row.label}" for row in heldout_rows()),
    )


def read_text(path: Path) -> Text:
    """A file as one document. Raises BackendLoadError where it is no UTF-8 text or empty."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BackendLoadError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BackendLoadError(f"{path} is not UTF-8 text: {error}") from error
    if not content.strip():
        raise BackendLoadError(f"{path} is empty")
    return Text(path.name, (content,))


def split_windows(
    documents: Sequence[Sequence[int]], width: int, *, least: int = 2
) -> list[list[int]]:
    """Cut token sequences into windows of at most `width`, without overlap.

    Those of fewer than `least` tokens are left out: nothing in one of a single token is predicted.
    """
    windows = [
        list(ids[start : start + width]) for ids in documents for start in range(0, len(ids), width)
    ]
    return [window for window in windows if len(window) >= least]


@torch.inference_mode()
def measure_perplexity(
    model: Model,
    geometry: BlockGeometry,
    documents: Sequence[Sequence[int]],
    *,
    kv_dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Perplexity:
    """Of the documents' tokens, each window's first excluded, given those before it in its window.

    Windows are of the model's context. `on_progress` is told of each pass's tokens. Raises
    BackendLoadError where no document has two tokens, or a token is not in the vocabulary.
    """
    windows = split_windows(documents, geometry.max_context)
    if not windows:
        raise BackendLoadError("the text has fewer than two tokens: there is nothing to predict")
    largest = max(max(window) for window in windows)
    if largest >= geometry.vocab_size:
        raise BackendLoadError(
            f"the tokenizer gives id {largest} and the model has {geometry.vocab_size}: they do "
            f"not belong together"
        )
    windows.sort(key=len)
    most = max(geometry.max_context, min(_TOKENS_AT_ONCE, _LOGITS_ELEMENTS // geometry.vocab_size))
    loss, count = 0.0, 0
    cache = torch.empty(0)
    for group in _groups(windows, most):
        tables, blocks = _block_tables(group)
        if cache.shape[2:3] != (blocks,):
            cache = torch.empty(geometry.kv_cache_shape(blocks, kv_dtype), dtype=kv_dtype)
        batch, targets = _batch(group, tables)
        logits = model.forward(batch, cache)
        loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
        on_progress(sum(len(window) for window in group))
    return Perplexity(math.exp(loss / count), count)


def _groups(windows: Sequence[list[int]], most: int) -> Iterator[list[list[int]]]:
    group: list[list[int]] = []
    for window in windows:
        if group and sum(map(len, group)) + len(window) > most:
            yield group
            group = []
        group.append(window)
    yield group


def _block_tables(group: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
    """Blocks in order, and how many there are."""
    needed = [-(-len(window) // BLOCK_SIZE) for window in group]
    tables = torch.zeros(len(group), max(needed), dtype=torch.int32)
    first = 0
    for row, count in enumerate(needed):
        tables[row, :count] = torch.arange(first, first + count)
        first += count
    return tables, first


def _batch(
    group: Sequence[Sequence[int]], tables: torch.Tensor
) -> tuple[ForwardBatch, torch.Tensor]:
    """The pass, with logits of all tokens but each window's last, and the ids those predict."""
    lengths = [len(window) for window in group]
    rows = torch.arange(sum(lengths), dtype=torch.int32)
    lasts = torch.tensor(lengths).cumsum(0) - 1
    predicts = torch.ones(len(rows), dtype=torch.bool)
    predicts[lasts] = False
    ids = torch.tensor([i for window in group for i in window], dtype=torch.int32)
    batch = ForwardBatch(
        token_ids=ids,
        positions=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        sequence_index=torch.repeat_interleave(
            torch.arange(len(group), dtype=torch.int32), torch.tensor(lengths)
        ),
        block_tables=tables,
        logits_rows=rows[predicts],
    )
    return batch, ids.long().roll(-1)[predicts]
