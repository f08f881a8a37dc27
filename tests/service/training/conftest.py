"""A made-up corpus, small enough to train on within a test."""

from __future__ import annotations

import pytest

from gptjet.service.training.corpus import Corpus, Row, label_for
from gptjet.service.training.explain import ToneLexicon

LEXICON = {"wonderful": 2.7, "great": 3.1, "good": 1.9, "awful": -2.0, "boring": -1.3, "bad": -2.5}


def make_row(number: int, text: str, rating: float, document: str = "") -> Row:
    return Row(
        id=f"made-{number}",
        source="made",
        document=document or f"made-{number}",
        text=text,
        mean_rating=rating,
        label=label_for(rating),
    )


@pytest.fixture(scope="session")
def tones() -> ToneLexicon:
    return ToneLexicon(LEXICON)


@pytest.fixture(scope="session")
def tiny_corpus() -> Corpus:
    nouns = ["film", "phone", "soup", "speech", "game", "hotel"]
    words = [*LEXICON.items(), ("on the table", 0.0)]
    rows = [
        make_row(10 * index + place, f"The {noun} was {word}.", rating, document=f"made-{noun}")
        for index, noun in enumerate(nouns)
        for place, (word, rating) in enumerate(words)
    ]
    return Corpus(
        train=tuple(rows[:28]),
        validation=tuple(rows[28:35]),
        test=tuple(rows[35:]),
        lexicon=dict(LEXICON) | {":)": 2.0},
    )
