"""Tone words, negation and the explanations built from them."""

from __future__ import annotations

import random

import pytest

from gptjet.service.training.answers import (
    answer_figures,
    named_words,
    occurs,
    parse_answer,
)
from gptjet.service.training.augment import Augmenter
from gptjet.service.training.corpus import Corpus
from gptjet.service.training.explain import (
    NO_TONE,
    ToneLexicon,
    build_tone_lexicon,
    explanation_for,
)


def test_a_negator_turns_the_tone_and_is_named_with_the_word(tones: ToneLexicon) -> None:
    text = "The plot is not very good, but the cast is great."
    first, second = tones.spans(text)
    assert text[first.start : first.end] == "not very good"
    assert first.tone == pytest.approx(1.9 * -0.74)
    assert text[second.start : second.end] == "great"
    assert second.tone == 3.1


def test_punctuation_and_distance_end_a_negation(tones: ToneLexicon) -> None:
    assert [span.tone for span in tones.spans("No, good film.")] == [1.9]
    assert [span.tone for span in tones.spans("not in any way that good")] == [1.9]


@pytest.mark.parametrize(
    ("text", "label", "explanation"),
    [
        ("Good food.", "positive", " the word Good sounds positive."),
        ("Not good.", "negative", " the words Not good sound negative."),
        (
            "A great, good and wonderful film",
            "positive",
            " the words great, good and wonderful sound positive.",
        ),
        (
            "good but boring",
            "neutral",
            " the word good sounds positive but the word boring sounds negative.",
        ),
        ("bad", "positive", " only the word bad sounds negative; the whole reads positive."),
        ("It opens at nine.", "neutral", NO_TONE),
    ],
)
def test_explanations_by_label(tones: ToneLexicon, text: str, label: str, explanation: str) -> None:
    assert label in {"negative", "neutral", "positive"}
    made = explanation_for(text, label, tones)  # type: ignore[arg-type]
    assert made == explanation


def test_every_named_word_occurs_in_its_text(tiny_corpus: Corpus, tones: ToneLexicon) -> None:
    augmenter = Augmenter(tiny_corpus.lexicon, tones)
    rng = random.Random(3)
    texts = [augmenter.made_text(rng).text for _ in range(300)]
    texts += [augmenter.exchange_tones(row.text, rng) for row in tiny_corpus.train]
    named = 0
    for text in texts:
        for label in ("negative", "neutral", "positive"):
            for words, _ in named_words(explanation_for(text, label, tones)):
                named += 1
                assert occurs(words, text), (words, text)
    assert named > 300


def test_exchanged_words_keep_their_tone(tones: ToneLexicon, tiny_corpus: Corpus) -> None:
    lexicon = {"good": 1.9, "nice": 1.8, "bad": -2.5, "poor": -2.1}
    augmenter = Augmenter(lexicon, ToneLexicon(lexicon))
    rng = random.Random(0)
    seen = {augmenter.exchange_tones("Good soup, bad bread", rng) for _ in range(200)}
    assert seen == {
        f"{first} soup, {second} bread" for first in ("Good", "Nice") for second in ("bad", "poor")
    }


def test_words_the_ratings_contradict_are_not_tone_words(tiny_corpus: Corpus) -> None:
    rows = [row for row in tiny_corpus.train for _ in range(6)]
    built = build_tone_lexicon({"good": 1.9, "awful": 2.0, "mild": 0.4}, rows)
    assert built.tone("good") == 1.9
    assert built.tone("awful") < 0  # rated positive here, but its train rows say otherwise
    assert built.tone("mild") == 0.0
    assert built.tone("boring") < 0  # learnt from the train rows alone


def test_malformed_answers_are_not_parsed() -> None:
    assert parse_answer(" positive\nExplanation: the word fun sounds positive.") is not None
    assert parse_answer(" good\nExplanation: the word fun sounds positive.") is None
    assert parse_answer(" positive\nExplanation: because I say so.") is None
    assert parse_answer(" positive") is None


def test_answer_figures_count_invented_words_against_the_model() -> None:
    texts = ["fun film", "dull film"]
    answers = [
        " positive\nExplanation: the word fun sounds positive.",
        " negative\nExplanation: the words dull and awful sound negative.",
    ]
    references = [" the word fun sounds positive.", " the word dull sounds negative."]
    figures = answer_figures(texts, answers, references)
    assert figures.well_formed == 1.0
    assert figures.named_words_all_occur == 0.5
    assert figures.same_words_as_reference == 0.5
    assert not occurs("un", "fun film")
