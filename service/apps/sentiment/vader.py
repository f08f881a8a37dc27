"""VADER (Hutto and Gilbert 2014), a lexicon and rules: what the app is compared with."""

from __future__ import annotations

from collections.abc import Sequence

VADER_LABELS = frozenset({"negative", "neutral", "positive"})
# The thresholds that VADER's documentation gives for its compound score.
_COMPOUND = 0.05


class VaderMissingError(Exception):
    """vaderSentiment is not installed; the message says how to get it or do without."""


def vader_decisions(texts: Sequence[str]) -> list[str]:
    """VADER's label of each text. Raises VaderMissingError."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise VaderMissingError(
            "the comparison needs vaderSentiment: pip install 'gptjet[sentiment]', or give "
            "--no-vader"
        ) from None
    analyzer = SentimentIntensityAnalyzer()
    return [_label(float(analyzer.polarity_scores(text)["compound"])) for text in texts]


def _label(compound: float) -> str:
    if compound >= _COMPOUND:
        return "positive"
    return "negative" if compound <= -_COMPOUND else "neutral"
