"""Guesses for the next tokens: what followed the last few of them when they occurred before.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): text that
quotes its prompt, or repeats itself, is guessed right often and for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# The longest run of tokens that is looked up, and so on down to one token.
MAX_NGRAM = 3


class PromptLookup:
    """Where every run of 1 to MAX_NGRAM tokens occurred last. A token or a draft costs O(1)."""

    __slots__ = ("_followers", "_token_ids")

    def __init__(self, token_ids: Iterable[int]) -> None:
        """`token_ids`: the sequence so far."""
        self._token_ids: list[int] = []
        # [n - 1]: run of n tokens -> position of the token after its latest occurrence. The run at
        # the very end has nothing after it yet, so it is not in here.
        self._followers: tuple[dict[tuple[int, ...], int], ...] = tuple(
            {} for _ in range(MAX_NGRAM)
        )
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Take the next token of the sequence."""
        tokens = self._token_ids
        position = len(tokens)
        tail = tuple(tokens[-MAX_NGRAM:])
        for n in range(1, len(tail) + 1):
            self._followers[n - 1][tail[-n:]] = position
        tokens.append(token_id)

    def draft(self, max_tokens: int) -> tuple[int, ...]:
        """Up to `max_tokens` guesses: all of them, or none where the last token is new.

        The longest run that occurred before decides, by its latest occurrence. A guess that
        reaches the end of the sequence goes on with the guess itself, as a repetition would.
        """
        tokens = self._token_ids
        tail = tuple(tokens[-MAX_NGRAM:])
        for n in range(len(tail), 0, -1):
            start = self._followers[n - 1].get(tail[-n:])
            if start is not None:
                period = tokens[start : start + max_tokens]
                return tuple(period[i % len(period)] for i in range(max_tokens))
        return ()
