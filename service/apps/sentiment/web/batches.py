"""Classifies the rows of a table: a few at a time, answered in the table's order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from gptjet.service.apps.sentiment.pipeline import (
    ROW_ERRORS,
    SERVER_ERRORS,
    in_order,
    while_server_works,
)
from gptjet.service.apps.sentiment.result import SentimentResult, TextError
from gptjet.service.apps.sentiment.web.bodies import check_text
from gptjet.service.apps.sentiment.web.errors import PageError
from gptjet.service.apps.sentiment.web.events import problem_of
from gptjet.service.apps.sentiment.web.source import Classifier
from gptjet.service.apps.sentiment.web.tables import Row
from gptjet.service.client import QueueFullError, QuotaExceededError

# A full queue empties; a row waits for that this often, as long as the server says each time.
_MAX_QUEUE_WAITS = 60


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """One row's result, or what is wrong with that row.

    `server_failed`: whether that is the server's fault; None where it was not asked.
    """

    index: int
    row: Row
    result: SentimentResult | None
    error: str | None
    server_failed: bool | None = None

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

    A row that cannot be classified has an error of its own and the others go on; a server that
    fails at many of them one after the other ends it with ServerGoneError, and the rows before
    those are given. Closing it cancels what runs.
    """

    async def answer(index: int) -> RowAnswer:
        return await _answer(classifier, index, rows[index], column, seed=seed, max_chars=max_chars)

    answers = while_server_works(
        in_order(range(first, len(rows)), answer, in_flight),
        lambda one: one.server_failed,
        lambda one: f"line {one.row.line}: {one.error}",
    )
    async with contextlib.aclosing(answers):
        async for one in answers:
            yield one


async def _answer(
    classifier: Classifier, index: int, row: Row, column: int, *, seed: int, max_chars: int
) -> RowAnswer:
    text = row.cells[column] if column < len(row.cells) else ""
    try:
        check_text(text, max_chars, "text")
        return RowAnswer(index, row, await _patiently(classifier, text, seed), None, False)
    except (PageError, TextError) as error:
        return RowAnswer(index, row, None, problem_of(error).message)
    except (QueueFullError, QuotaExceededError):
        raise
    except ROW_ERRORS as error:
        failed = isinstance(error, SERVER_ERRORS)
        return RowAnswer(index, row, None, problem_of(error).message, failed)


async def _patiently(classifier: Classifier, text: str, seed: int) -> SentimentResult:
    for _ in range(_MAX_QUEUE_WAITS):
        try:
            return await classifier.classify(text, seed=seed)
        except QueueFullError as error:
            await asyncio.sleep(error.retry_after_s or 1.0)
    return await classifier.classify(text, seed=seed)
