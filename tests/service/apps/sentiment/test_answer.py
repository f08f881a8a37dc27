"""Reading answers: what is explanation, which label it states, which of its words are true."""

from __future__ import annotations

import pytest

from gptjet.service.apps.sentiment.answer import Answer, check_named, read_answer
from gptjet.service.apps.sentiment.template import load_template

EMBEDDED = load_template("embedded")
GPT_J = load_template("gpt-j")


@pytest.mark.parametrize(
    ("generated", "explanation", "label"),
    [
        (
            " positive\nExplanation: the word good sounds positive.",
            "the word good sounds positive.",
            "positive",
        ),
        (
            " positive\nExplanation: the words bad and dull sound negative.",
            "the words bad and dull sound negative.",
            "negative",
        ),
        (
            " neutral\nExplanation: the word fun sounds positive but the word dry sounds negative.",
            "the word fun sounds positive but the word dry sounds negative.",
            "neutral",
        ),
        (
            " negative\nExplanation: only the word good sounds positive; the whole reads negative.",
            "only the word good sounds positive; the whole reads negative.",
            "negative",
        ),
        (
            " neutral\nExplanation: no word carries a clear tone.",
            "no word carries a clear tone.",
            "neutral",
        ),
        (
            " negative\nExplanation: no word carries a clear tone.",
            "no word carries a clear tone.",
            "negative",
        ),
        (" positive", "", "positive"),
        (" positively\nExplanation: who knows", "who knows", None),
        ("", "", None),
    ],
)
def test_the_label_is_what_the_explanation_states(
    generated: str, explanation: str, label: str | None
) -> None:
    assert read_answer(EMBEDDED, generated) == Answer(explanation, label)


def test_an_answer_that_explains_first_gives_the_label_it_ends_with() -> None:
    generated = ' The word "dull" says it.\nSentiment: negative'
    assert read_answer(GPT_J, generated) == Answer('The word "dull" says it.', "negative")
    assert read_answer(GPT_J, " It rambles on") == Answer("It rambles on", None)


@pytest.mark.parametrize(
    ("template", "generated"),
    [
        (EMBEDDED, " positive\nExplanation: the word good sounds positive."),
        (GPT_J, ' The word "dull"\nsays it: Sent.\nSentiment: negative'),
    ],
)
def test_an_explanation_that_comes_character_by_character_only_ever_grows(
    template: object, generated: str
) -> None:
    shown = ""
    whole = read_answer(template, generated).explanation  # type: ignore[arg-type]
    for length in range(len(generated) + 1):
        ready = read_answer(template, generated[:length], ended=False).explanation  # type: ignore[arg-type]
        assert ready.startswith(shown)
        shown = ready
        assert whole.startswith(shown)
    assert "Sentiment:" not in shown


def test_words_that_the_text_has_not_are_told_from_those_it_has() -> None:
    explanation = "the words not very good, Kind and died sound negative."
    text = "It is NOT\n very good, but kind. Undied."
    highlights, missing = check_named(EMBEDDED, explanation, text)
    assert [text[h.start : h.end] for h in highlights] == ["NOT\n very good", "kind"]
    assert [h.words for h in highlights] == ["NOT\n very good", "kind"]
    assert missing == ("died",)


def test_words_are_searched_as_they_stand_and_not_as_a_pattern() -> None:
    highlights, missing = check_named(
        GPT_J, 'He wrote "(.*)" and "C++" and "a.b".', "(.*) is C++, axb"
    )
    assert [h.words for h in highlights] == ["(.*)", "C++"]
    assert missing == ("a.b",)
