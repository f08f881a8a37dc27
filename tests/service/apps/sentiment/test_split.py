"""Splitting: sentences, packing into parts that fit, and what has no sentences."""

from __future__ import annotations

from typing import SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjet.service.apps.sentiment.split import split_sentences, split_to_fit


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Dr. Lee came at 5 p.m. sharp. She left.", ["Dr. Lee came at 5 p.m. sharp.", "She left."]),
        ("J. R. R. Tolkien wrote it. Good.", ["J. R. R. Tolkien wrote it.", "Good."]),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        ("It costs 3.50 today. Fine...", ["It costs 3.50 today.", "Fine..."]),
        ("A title\n\nA paragraph.", ["A title", "A paragraph."]),
        ("Das ist gut, z.B. hier. Ja!", ["Das ist gut, z.B. hier.", "Ja!"]),
        ("\u597d\u3002\u4e0d\u597d\uff01", ["\u597d\u3002", "\u4e0d\u597d\uff01"]),
        ("no end", ["no end"]),
        (" \n ", []),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


async def words(text: str) -> int:
    return len(text.split())


async def characters(text: str) -> int:
    return len(text)


async def test_a_text_that_fits_is_not_touched() -> None:
    text = "One.  Two.\nThree."
    assert await split_to_fit(text, 3, words) == [text]


async def test_parts_are_whole_sentences_as_many_as_fit() -> None:
    text = "a b c. D e. F g h. I."
    assert await split_to_fit(text, 5, words) == ["a b c. D e.", "F g h. I."]


async def test_a_sentence_that_is_too_long_is_split_by_words() -> None:
    text = "Hi. " + " ".join(f"w{i}" for i in range(20)) + ". Bye."
    parts = await split_to_fit(text, 6, words)
    assert " ".join(parts) == text
    assert all(len(part.split()) <= 6 for part in parts)


@given(st.text(alphabet="ab.! \n\u00e9", min_size=1), st.integers(1, 12))
async def test_nothing_is_lost_and_every_part_fits(text: str, room: int) -> None:
    parts = await split_to_fit(text, room, characters)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(len(part) <= room for part in parts)


class CountedText(str):
    """Counts the characters that are copied out of it."""

    copied = 0

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        part = super().__getitem__(key)
        CountedText.copied += len(part)
        return part


@pytest.mark.parametrize("piece", ["x. ", "no. ", "A. ", "Yes. "])
def test_splitting_copies_a_bounded_number_of_characters_a_full_stop(piece: str) -> None:
    CountedText.copied = 0
    text = CountedText(piece * 5000)
    sentences = split_sentences(text)
    assert "".join(sentences).replace(" ", "") == text.replace(" ", "")
    assert CountedText.copied <= 50 * 5000 + len(text)


@pytest.mark.parametrize("run", [".", ".!?", "\u2026", '."', ".)))"])
def test_runs_of_full_stops_are_passed_once(run: str) -> None:
    """Quadratic, a million of them would take hours."""
    text = run * 300_000
    assert split_sentences(text) == [text]


def test_a_long_word_before_a_full_stop_is_no_abbreviation() -> None:
    assert split_sentences("a" * 100 + "no. Good.") == ["a" * 100 + "no.", "Good."]
