"""Figures of decisions beside the truth: accuracy, F1, confusion, calibration, abstention."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

_BINS = 10
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Figures:
    """`confusion[i][j]` counts rows of true label i that were decided as label j; shares in [0, 1].

    A label that is neither true nor decided anywhere counts as F1 0 in `macro_f1`.
    """

    rows: int
    accuracy: float
    macro_f1: float
    f1: dict[str, float]
    confusion: list[list[int]]


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows whose confidence lies in (low, high]."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Expected calibration error: |accuracy - confidence|, averaged over rows by their bin.

    Guo et al. 2017, equation 3, with ten bins of equal width; confidence is the probability of the
    decided label. A bin without rows is not listed.
    """

    expected_error: float
    bins: list[Bin]


@dataclass(frozen=True, slots=True)
class Advantage:
    """How much higher a macro-F1 is, with a 95% interval from a paired bootstrap over rows."""

    difference: float
    low: float
    high: float
    resamples: int


def figures_for(labels: Sequence[str], truth: Sequence[str], decided: Sequence[str]) -> Figures:
    """Of one row or more. Raises ValueError for a label that is not in `labels`."""
    index_of = {label: index for index, label in enumerate(labels)}
    confusion = [[0] * len(labels) for _ in labels]
    try:
        for true, guess in zip(truth, decided, strict=True):
            confusion[index_of[true]][index_of[guess]] += 1
    except KeyError as error:
        raise ValueError(f"label {error} is not one of {', '.join(labels)}") from None
    f1 = dict(zip(labels, _f1(confusion), strict=True))
    right = sum(confusion[index][index] for index in range(len(labels)))
    return Figures(
        rows=len(truth),
        accuracy=right / len(truth),
        macro_f1=sum(f1.values()) / len(labels),
        f1=f1,
        confusion=confusion,
    )


def calibration_of(confidences: Sequence[float], right: Sequence[bool]) -> Calibration:
    """Of the decisions with these confidences, in [0, 1], each right or wrong."""
    grouped: list[list[tuple[float, bool]]] = [[] for _ in range(_BINS)]
    for confidence, is_right in zip(confidences, right, strict=True):
        # (low, high]: 0.1 belongs to the first bin. Rounded, for 0.3 * 10 is 3.0000000000000004.
        place = -int(-round(confidence * _BINS, 9) // 1) - 1
        grouped[min(max(place, 0), _BINS - 1)].append((confidence, is_right))
    bins = [
        Bin(
            low=index / _BINS,
            high=(index + 1) / _BINS,
            rows=len(rows),
            confidence=sum(confidence for confidence, _ in rows) / len(rows),
            accuracy=sum(is_right for _, is_right in rows) / len(rows),
        )
        for index, rows in enumerate(grouped)
        if rows
    ]
    total = sum(one.rows for one in bins)
    error = sum(one.rows * abs(one.accuracy - one.confidence) for one in bins) / total
    return Calibration(error, bins)


def advantage(
    labels: Sequence[str],
    truth: Sequence[str],
    decided: Sequence[str],
    other: Sequence[str],
    *,
    seed: int = 0,
) -> Advantage:
    """The macro-F1 of `decided` less that of `other` (Efron 1979, percentile interval)."""
    index_of = {label: index for index, label in enumerate(labels)}
    rows = [
        (index_of[true], index_of[one], index_of[two])
        for true, one, two in zip(truth, decided, other, strict=True)
    ]
    draw = random.Random(seed)
    differences = sorted(
        _difference(draw.choices(rows, k=len(rows)), len(labels)) for _ in range(_RESAMPLES)
    )
    edge = round(0.025 * _RESAMPLES)
    return Advantage(
        difference=_difference(rows, len(labels)),
        low=differences[edge],
        high=differences[-1 - edge],
        resamples=_RESAMPLES,
    )


def _difference(rows: Sequence[tuple[int, int, int]], size: int) -> float:
    first = [[0] * size for _ in range(size)]
    second = [[0] * size for _ in range(size)]
    for true, one, two in rows:
        first[true][one] += 1
        second[true][two] += 1
    return (sum(_f1(first)) - sum(_f1(second))) / size


def _f1(confusion: Sequence[Sequence[int]]) -> list[float]:
    scores = []
    for index in range(len(confusion)):
        actual = sum(confusion[index])
        claimed = sum(row[index] for row in confusion)
        hits = confusion[index][index]
        scores.append(2 * hits / (actual + claimed) if actual + claimed else 0.0)
    return scores
