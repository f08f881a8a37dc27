"""What the embedded checkpoint is compared with, on the same held-out rows.

VADER (Hutto & Gilbert 2014) as published: compound score against +-0.05. A TF-IDF logistic
regression fitted on the same train split; both class weightings are shown, because the plain one
wins on accuracy and the balanced one on macro-F1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from gptjet.service.embedded import LABELS, Label
from gptjet.service.training.corpus import Corpus, Row
from gptjet.service.training.measures import Figures, figures_for

# The thresholds VADER's documentation gives for its compound score.
VADER_COMPOUND = 0.05
# Mean-rating thresholds compared in `label_choice`.
CANDIDATE_THRESHOLDS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class LabelChoice:
    """How a neutral threshold behaves on a random tenth of all rows, documents ignored."""

    neutral_below: float
    neutral_share: float
    vader: Figures


def vader_decisions(texts: Sequence[str]) -> list[Label]:
    """VADER's class of each text."""
    analyzer = SentimentIntensityAnalyzer()
    decisions: list[Label] = []
    for text in texts:
        compound = float(analyzer.polarity_scores(text)["compound"])
        if compound >= VADER_COMPOUND:
            decisions.append("positive")
        else:
            decisions.append("negative" if compound <= -VADER_COMPOUND else "neutral")
    return decisions


def tfidf_decisions(train: Sequence[Row], texts: Sequence[str], *, balanced: bool) -> list[Label]:
    """Decisions of a logistic regression on TF-IDF of words and word pairs, fitted on `train`."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    features = vectorizer.fit_transform([row.text for row in train])
    model = LogisticRegression(
        C=2.0 if balanced else 4.0, max_iter=1000, class_weight="balanced" if balanced else None
    )
    model.fit(features, [row.label for row in train])
    known = {str(label): label for label in LABELS}
    return [known[str(name)] for name in model.predict(vectorizer.transform(list(texts)))]


def label_choice(corpus: Corpus) -> list[LabelChoice]:
    """VADER's figures on a random tenth of all rows under each candidate threshold."""
    rows = random_tenth(corpus)[1]
    decided = vader_decisions([row.text for row in rows])
    choices = []
    for threshold in CANDIDATE_THRESHOLDS:
        truth = [_label_under(row.mean_rating, threshold) for row in rows]
        share = sum(label == "neutral" for label in truth) / len(truth)
        choices.append(LabelChoice(threshold, share, figures_for(truth, decided)))
    return choices


def random_tenth(corpus: Corpus) -> tuple[list[Row], list[Row]]:
    """(the other rows, a tenth of all rows chosen by a hash of their id): a looser split.

    Snippets of one review or editorial fall on both sides here, which our own splits forbid.
    """
    rows = [*corpus.train, *corpus.validation, *corpus.test]
    rest: list[Row] = []
    tenth: list[Row] = []
    for row in rows:
        digest = hashlib.sha256(f"random tenth:{row.id}".encode()).digest()
        (tenth if digest[0] < 26 else rest).append(row)  # 26 / 256
    return rest, tenth


def _label_under(rating: float, threshold: float) -> Label:
    if rating >= threshold:
        return "positive"
    return "negative" if rating <= -threshold else "neutral"
