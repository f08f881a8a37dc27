"""Characters as patterns see them: one character at a time, so that a split of a text is no matter.

Folding takes out what a reader does not see or does not mind: case, width and presentation forms
(compatibility decomposition, Unicode Standard Annex 15), the combining marks of Latin, Greek and
Cyrillic, characters without a glyph (category Cf: zero-width spaces, soft hyphens, direction marks;
variation selectors), and how much white space there is. Marks that make another letter (Devanagari
vowels, kana voicing) stay, and so do letters of other scripts that merely look alike.
"""

from __future__ import annotations

import unicodedata

SPACE = " "
# Far more than the characters of any one text; past it the table starts anew.
_MOST_ENTRIES = 65_536


# The blocks of combining diacritical marks, and the variation selectors.
_IGNORED_MARKS = (
    ("\u0300", "\u036f"),
    ("\u1ab0", "\u1aff"),
    ("\u1dc0", "\u1dff"),
    ("\u20d0", "\u20ff"),
    ("\ufe00", "\ufe0f"),
    ("\ufe20", "\ufe2f"),
    ("\U000e0100", "\U000e01ef"),
)


class FoldTable(dict[str, str]):
    """character -> what it folds to: one character, several for "ß", "" for what is ignored."""

    def __missing__(self, character: str) -> str:
        if len(self) >= _MOST_ENTRIES:
            self.clear()
        folded = self[character] = _fold(character)
        return folded


class ExactTable(dict[str, str]):
    """character -> itself."""

    def __missing__(self, character: str) -> str:
        return character


FOLDED = FoldTable()
EXACT = ExactTable()


def fold(text: str) -> str:
    """The text as folded patterns see it; of each run of white space, one space is left."""
    folded: list[str] = []
    for character in text:
        for part in FOLDED[character]:
            if part != SPACE or not folded or folded[-1] != SPACE:
                folded.append(part)
    return "".join(folded)


def is_word(character: str) -> bool:
    """Whether a boundary of words lies between this character and a space."""
    return (
        character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
    )


def _fold(character: str) -> str:
    if character.isspace():
        return SPACE
    decomposed = unicodedata.normalize("NFKD", character).casefold()
    decomposed = unicodedata.normalize("NFKD", decomposed)
    return "".join(SPACE if part.isspace() else part for part in decomposed if not _ignored(part))


def _ignored(character: str) -> bool:
    if unicodedata.category(character) == "Cf":
        return True
    return any(first <= character <= last for first, last in _IGNORED_MARKS)
