"""Classifies the rows of a table: a few at a time, answered in the table's order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from gptjet.service.apps.sentiment.result import SentimentResult, TextError
from gptjet.service.apps.sentiment.web.bodies import check_text
from gptjet.service.apps.sentiment.web.errors import PageError
from gptjet.service.apps.sentiment.web.events import problem_of
from gptjet.service.apps.sentiment.web.source import Classifier
from gptjet.service.apps.sentiment.web.tables import Row
from gptjet.service.client import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    QueueFullError,
    ResourceExhaustedError,
)

# A full queue empties; a row waits for that this often, as long as the server says each time.
_MAX_QUEUE_WAITS = 60
_ROW_ERRORS = (InvalidRequestError, InternalError, DeadlineExceededError)


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """One row's result, or what is wrong with that row."""

    index: int
    row: Row
    result: SentimentResult | None
    error: str | None

    def fields(self) -> dict[str, Any]:
        """As the page reads it. The cells come back: the page shows and downloads them."""
        fields: dict[str, Any] = {
            "index": self.index,
            "line": self.row.line,
            "cells": list(self.row.cells),
            "error": self.error,
        }
        if self.result is not None:
            fields |= {
                "label": self.result.label,
                "scored_label": self.result.scored_label,
                "probabilities": self.result.probabilities,
                "uncertain_reason": self.result.uncertain_reason,
                "explanation": self.result.explanation,
                "num_parts": self.result.num_parts,
            }
        return fields


async def classify_rows(
    classifier: Classifier,
    rows: Sequence[Row],
    column: int,
    *,
    first: int,
    seed: int,
    max_chars: int,
    in_flight: int,
) -> AsyncGenerator[RowAnswer]:
    """Answers from row `first` on, in order. Raises GptjetError where no row can be answered.

    A row that cannot be classified has an error of its own and the others go on. Closing it
    cancels what runs.
    """
    waiting: deque[asyncio.Task[RowAnswer]] = deque()
    try:
        for index in range(first, len(rows)):
            waiting.append(
                asyncio.create_task(
                    _answer(classifier, index, rows[index], column, seed=seed, max_chars=max_chars)
                )
            )
            if len(waiting) == in_flight:
                yield await waiting[0]
                waiting.popleft()
        while waiting:
            yield await waiting[0]
            waiting.popleft()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _answer(
    classifier: Classifier, index: int, row: Row, column: int, *, seed: int, max_chars: int
) -> RowAnswer:
    text = row.cells[column] if column < len(row.cells) else ""
    try:
        check_text(text, max_chars, "text")
        return RowAnswer(index, row, await _patiently(classifier, text, seed), None)
    except (PageError, TextError, *_ROW_ERRORS) as error:
        return RowAnswer(index, row, None, problem_of(error).message)
    except ResourceExhaustedError as error:
        if isinstance(error, QueueFullError):
            raise
        return RowAnswer(index, row, None, problem_of(error).message)


async def _patiently(classifier: Classifier, text: str, seed: int) -> SentimentResult:
    for _ in range(_MAX_QUEUE_WAITS):
        try:
            return await classifier.classify(text, seed=seed)
        except QueueFullError as error:
            await asyncio.sleep(error.retry_after_s or 1.0)
    return await classifier.classify(text, seed=seed)
