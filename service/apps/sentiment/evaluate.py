"""Measures the app on rows whose label is known, VADER beside it on the same rows."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptjet.service.apps.sentiment.classify import SentimentClassifier
from gptjet.service.apps.sentiment.measures import advantage, calibration_of, figures_for
from gptjet.service.apps.sentiment.pipeline import (
    ROW_ERRORS,
    SERVER_ERRORS,
    classify_patiently,
    in_order,
    while_server_works,
)
from gptjet.service.apps.sentiment.result import SentimentResult
from gptjet.service.apps.sentiment.table import TableError, format_of, read_table
from gptjet.service.apps.sentiment.template import UNCERTAIN, PromptTemplate

SCHEMA_VERSION = 1


class EvaluationError(Exception):
    """Nothing can be measured; the message says why."""


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A text and the label that people gave it."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A row and what the app said; the error where it said nothing, and whose fault that is."""

    row: LabelledRow
    result: SentimentResult | None
    error: str | None = None
    server_failed: bool = False


# VADER's function, or None: no comparison.
Decide = Callable[[Sequence[str]], list[str]]


def load_rows(
    path: Path, column: str, label_column: str, template: PromptTemplate
) -> list[LabelledRow]:
    """Rows of a user's own file. Raises TableError naming the line of the first that is not usable.

    Labels count whatever their case, and must be the template's.
    """
    names = {label.name.casefold(): label.name for label in template.labels}
    rows: list[LabelledRow] = []
    with path.open("rb") as file:
        table = read_table(file, column, format_of(path.name), str(path))
        if label_column not in table.columns:
            raise TableError(
                f"{path}: has no column {label_column!r}; it has {', '.join(table.columns)}"
            )
        for row in table.rows:
            if row.error is not None:
                raise TableError(f"{path}: line {row.line}: {row.error}")
            label = str(row.values.get(label_column, ""))
            if label.strip().casefold() not in names:
                raise TableError(
                    f"{path}: line {row.line}: {label_column}: must be one of "
                    f"{', '.join(names.values())}, got {label!r}"
                )
            rows.append(LabelledRow(row.text, names[label.strip().casefold()]))
    return rows


def sample_rows(rows: Sequence[LabelledRow], limit: int | None, seed: int) -> list[LabelledRow]:
    """`limit` of the rows, drawn by `seed`, in their order; all of them without a limit."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[index] for index in chosen]


async def evaluate(
    classifier: SentimentClassifier,
    rows: Sequence[LabelledRow],
    *,
    seed: int = 0,
    concurrency: int = 16,
    decide: Decide | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Every figure of the result file, as plain values; `figures_of` says what they are.

    Raises EvaluationError where no row can be measured, ServerGoneError and GptjetError.
    """
    if not rows:
        raise EvaluationError("there are no rows to measure")
    unknown = {row.label for row in rows} - {label.name for label in classifier.template.labels}
    if unknown:
        raise EvaluationError(
            f"template {classifier.template.name!r} has no label {', '.join(sorted(unknown))}"
        )

    async def one(row: LabelledRow) -> Evaluated:
        try:
            return Evaluated(row, await classify_patiently(classifier, row.text, seed=seed))
        except ROW_ERRORS as error:
            return Evaluated(row, None, str(error), isinstance(error, SERVER_ERRORS))

    await classifier.model()
    started = time.monotonic()
    done: list[Evaluated] = []
    results = while_server_works(
        in_order(rows, one, concurrency),
        lambda evaluated: evaluated.server_failed,
        lambda evaluated: f"{evaluated.row.text[:40]!r}: {evaluated.error}",
    )
    async with contextlib.aclosing(results):
        async for evaluated in results:
            done.append(evaluated)
            on_progress(len(done))
    seconds = time.monotonic() - started
    return figures_of(classifier.template, done, seconds, decide) | {
        "options": {
            "template": classifier.template.name,
            "template_version": classifier.template.version,
            "explain": classifier.options.explain,
            "seed": seed,
            "concurrency": concurrency,
        },
        "model": asdict(await classifier.model()),
    }


def figures_of(
    template: PromptTemplate,
    evaluated: Sequence[Evaluated],
    seconds: float,
    decide: Decide | None = None,
) -> dict[str, Any]:
    """The figures of a finished run.

    figures      of the scored label, for every row: nothing is left out as uncertain
    calibration  of its probability
    abstaining   the same figures over the rows that are not "uncertain"; `coverage` is their share
    explanations shares of rows: with one, that contradict the label, that name a missing word
    vader        VADER's figures on the same rows, and by how much macro-F1 is higher than its
    """
    labels = [label.name for label in template.labels]
    pairs = [(one.row, one.result) for one in evaluated if one.result is not None]
    failed = [one.error for one in evaluated if one.error is not None]
    if not pairs:
        raise EvaluationError(f"every row has an error; the first: {failed[0]}")
    truth = [row.label for row, _ in pairs]
    decided = [result.scored_label for _, result in pairs]
    right = [one == two for one, two in zip(truth, decided, strict=True)]
    kept = [(row, result) for row, result in pairs if result.label != UNCERTAIN]
    report: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "labels": labels,
        "rows": len(evaluated),
        "errors": len(failed),
        "first_error": failed[0] if failed else None,
        "figures": asdict(figures_for(labels, truth, decided)),
        "calibration": asdict(
            calibration_of(
                [result.probabilities[result.scored_label] for _, result in pairs], right
            )
        ),
        "abstaining": _abstaining(labels, kept, len(pairs)),
        "explanations": _explanations([result for _, result in pairs]),
        "throughput": {"seconds": seconds, "rows_per_second": len(evaluated) / seconds},
        "vader": None,
    }
    if decide is not None:
        other = decide([row.text for row, _ in pairs])
        report["vader"] = {
            "figures": asdict(figures_for(labels, truth, other)),
            "macro_f1_advantage": asdict(advantage(labels, truth, decided, other)),
        }
    return report


def _abstaining(
    labels: Sequence[str], kept: Sequence[tuple[LabelledRow, SentimentResult]], rows: int
) -> dict[str, Any]:
    if not kept:
        return {"coverage": 0.0, "figures": None}
    truth, decided = [row.label for row, _ in kept], [result.label for _, result in kept]
    return {"coverage": len(kept) / rows, "figures": asdict(figures_for(labels, truth, decided))}


def _explanations(results: Sequence[SentimentResult]) -> dict[str, float]:
    rows = len(results)
    contradicts = sum(
        result.explained_label not in (None, result.scored_label) for result in results
    )
    return {
        "given": sum(bool(result.explanation) for result in results) / rows,
        "contradict_label": contradicts / rows,
        "name_missing_words": sum(bool(result.missing_words) for result in results) / rows,
    }
