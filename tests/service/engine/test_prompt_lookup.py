"""Guesses by prompt lookup, one letter a token."""

from __future__ import annotations

import random

import pytest

from gptjet.service.engine.prompt_lookup import MAX_NGRAM, PromptLookup


def draft(text: str, max_tokens: int = 4) -> str:
    lookup = PromptLookup(map(ord, text))
    return "".join(map(chr, lookup.draft(max_tokens)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("a", ""),
        ("abc", ""),  # "c" has not occurred before
        ("abcdeXab", "cdeX"),
        ("abcdXbcYabc", "dXbc"),  # "abc" was followed by "d", the later "bc" by "Y"
        ("aXbYaZa", "Zaaa"[:1] + "aZa"),  # the latest "a", then on with the guess itself
        ("abab", "abab"),
        ("aaaa", "aaaa"),
    ],
)
def test_the_longest_run_decides_by_its_latest_occurrence(text: str, expected: str) -> None:
    assert draft(text) == expected


def test_as_many_are_guessed_as_may_be() -> None:
    assert [draft("abcdeXab", n) for n in (0, 1, 3)] == ["", "c", "cde"]


def test_token_by_token_is_the_same_as_a_search_of_the_whole() -> None:
    rng = random.Random(2)
    tokens: list[int] = []
    lookup = PromptLookup(())
    for _ in range(600):
        tokens.append(rng.randint(0, 3))
        lookup.add(tokens[-1])
        assert lookup.draft(5) == searched(tokens, 5)


def searched(tokens: list[int], max_tokens: int) -> tuple[int, ...]:
    for n in range(min(MAX_NGRAM, len(tokens)), 0, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                known, guess = list(tokens), []
                for position in range(start + n, start + n + max_tokens):
                    guess.append(known[position])
                    known.append(known[position])
                return tuple(guess)
    return ()
