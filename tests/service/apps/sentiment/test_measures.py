"""Figures, worked out by hand and beside scikit-learn's."""

from __future__ import annotations

import random

import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from gptjet.service.apps.sentiment.measures import advantage, calibration_of, figures_for

LABELS = ("a", "b", "c")


def test_figures_are_scikit_learns() -> None:
    draw = random.Random(5)
    truth = draw.choices(LABELS, k=200)
    decided = draw.choices(LABELS, weights=[3, 1, 1], k=200)
    figures = figures_for(LABELS, truth, decided)
    assert figures.accuracy == pytest.approx(accuracy_score(truth, decided))
    assert figures.macro_f1 == pytest.approx(f1_score(truth, decided, average="macro"))
    assert figures.confusion == confusion_matrix(truth, decided, labels=LABELS).tolist()
    assert figures.rows == 200


def test_a_label_that_never_occurs_has_f1_0() -> None:
    assert figures_for(LABELS, ["a", "b"], ["a", "b"]).f1 == {"a": 1.0, "b": 1.0, "c": 0.0}


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(ValueError, match="label 'd' is not one of a, b, c"):
        figures_for(LABELS, ["a"], ["d"])


def test_calibration_error_is_the_gap_of_each_bin_weighted_by_its_rows() -> None:
    """Four rows at 0.9, three right: gap 0.15. One at 0.55, wrong: gap 0.55. Two at 0.5 and 0.3
    fall in bins of their own: right, gaps 0.5 and 0.7."""
    calibration = calibration_of(
        [0.9, 0.9, 0.9, 0.9, 0.55, 0.5, 0.3], [True, True, True, False, False, True, True]
    )
    assert [(one.low, one.rows) for one in calibration.bins] == [
        (0.2, 1),
        (0.4, 1),
        (0.5, 1),
        (0.8, 4),
    ]
    expected = (4 * 0.15 + 0.55 + 0.5 + 0.7) / 7
    assert calibration.expected_error == pytest.approx(expected)


def test_confidence_1_and_0_have_a_bin() -> None:
    bins = calibration_of([0.0, 1.0], [False, True]).bins
    assert [(one.low, one.high) for one in bins] == [(0.0, 0.1), (0.9, 1.0)]


def test_the_advantage_over_oneself_is_nothing_and_over_chance_is_clear() -> None:
    draw = random.Random(7)
    truth = draw.choices(LABELS, k=300)
    chance = draw.choices(LABELS, k=300)
    none = advantage(LABELS, truth, chance, chance)
    assert (none.difference, none.low, none.high) == (0, 0, 0)
    much = advantage(LABELS, truth, truth, chance)
    assert 0 < much.low < much.difference < much.high
    expected = 1 - f1_score(truth, chance, average="macro")
    assert much.difference == pytest.approx(expected)
