"""Splits a long text: by sentences, a long sentence by words, a long word anywhere."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

CountTokens = Callable[[str], Awaitable[int]]

# A sentence ends after . ! ? or their kin, with closing quotes and brackets, before white space;
# the full-width ones (Chinese, Japanese) need none. A blank line ends one whatever stands before.
# No match begins within a run and none is tried again shorter: the time is linear in the text.
_END = re.compile(
    r"(?<![.!?\u2026])[.!?\u2026]++[\"'\u2019\u201d)\]\u00bb]*+(?=\s)"
    r"|[\u3002\uff01\uff1f]++|\n\s*\n"
)
_SPACE = re.compile(r"\s*+")
# Of a sentence's end, more than any abbreviation with its brackets.
_LOOK_BACK_CHARS = 40
_ABBREVIATION_LIST = """
mr mrs ms dr prof st jr sr vs etc e.g i.e a.m p.m u.s u.k no vol fig inc ltd co dept est approx
bzw z.b d.h u.a usw ca nr"""
_ABBREVIATIONS = frozenset(_ABBREVIATION_LIST.split())


def split_sentences(text: str) -> list[str]:
    """The sentences of `text` without the white space around them; joined they are all of it.

    A full stop after an abbreviation or an initial, or before a small letter, ends none.
    """
    sentences: list[str] = []
    start = 0
    for match in _END.finditer(text):
        if match[0] == "." and _goes_on(text, start, match.end()):
            continue
        sentence = text[start : match.end()].strip()
        if sentence:
            sentences.append(sentence)
        start = match.end()
    if text[start:].strip():
        sentences.append(text[start:].strip())
    return sentences


def _goes_on(text: str, start: int, end: int) -> bool:
    """Whether the full stop before `end` ends no sentence; the sentence begins at `start`."""
    tail = text[max(start, end - _LOOK_BACK_CHARS) : end]
    last_word = tail.split()[-1].rstrip(".").lstrip("(\"'").casefold()
    if last_word in _ABBREVIATIONS or (len(last_word) == 1 and tail[-2].isupper()):
        return True
    space = _SPACE.match(text, end)
    assert space is not None  # it matches nothing, too
    return text[space.end() : space.end() + 1].islower() and "\n" not in space[0]


async def split_to_fit(text: str, room: int, count_tokens: CountTokens) -> list[str]:
    """Parts of at most `room` tokens, as few as whole sentences allow, in the text's order."""
    if await count_tokens(text) <= room:
        return [text]
    pieces: list[tuple[str, int]] = []
    for sentence in split_sentences(text):
        pieces += await _halve_to_fit(sentence, room, count_tokens)
    return await _pack(pieces, room, count_tokens)


async def _halve_to_fit(piece: str, room: int, count_tokens: CountTokens) -> list[tuple[str, int]]:
    """(piece, tokens) pairs: `piece` itself where it fits, else its halves, by words if it can."""
    tokens = await count_tokens(piece)
    if tokens <= room or len(piece) < 2:
        return [(piece, tokens)]
    words = piece.split()
    if len(words) > 1:
        middle = len(words) // 2
        halves = (" ".join(words[:middle]), " ".join(words[middle:]))
    else:
        middle = len(piece) // 2
        halves = (piece[:middle], piece[middle:])
    return [part for half in halves for part in await _halve_to_fit(half, room, count_tokens)]


async def _pack(
    pieces: Sequence[tuple[str, int]], room: int, count_tokens: CountTokens
) -> list[str]:
    """Neighbours joined while they fit; counted again, as tokens may differ when joined."""
    parts: list[str] = []
    current, current_tokens = "", 0
    for piece, tokens in pieces:
        joined = f"{current} {piece}" if current else piece
        if not current or current_tokens + tokens <= room:
            joined_tokens = tokens if not current else await count_tokens(joined)
            if joined_tokens <= room or not current:
                current, current_tokens = joined, joined_tokens
                continue
        parts.append(current)
        current, current_tokens = piece, tokens
    return [*parts, current] if current else parts
