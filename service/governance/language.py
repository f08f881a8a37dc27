"""Which language a text is in, by py3langid: a naive Bayes model that ships with the package."""

from __future__ import annotations

import functools
from typing import Any

from gptjet.service.governance.automaton import Found
from gptjet.service.governance.libraries import load

# More text makes the answer no surer, and longer.
MOST_CHARACTERS = 4_096


@functools.cache
def _identifier() -> Any:
    module = load("py3langid.langid", "py3langid")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


def known_languages() -> frozenset[str]:
    """ISO 639-1 codes that can be told apart. Raises MissingLibraryError."""
    return frozenset(str(label) for label in _identifier().labels)


def identify(text: str) -> tuple[str, float]:
    """The likeliest language and its probability."""
    language, probability = _identifier().classify(text)
    return str(language), float(probability)


class LanguageMatcher:
    """One rule on the language of one text, which it judges once.

    Judged is the text's beginning, when `characters` of it are there; `whole` waits for its end. A
    shorter text is in no language that could be told.
    """

    __slots__ = (
        "_allowed",
        "_characters",
        "_judged",
        "_owner",
        "_position",
        "_probability",
        "_text",
        "_whole",
    )

    def __init__(
        self,
        owner: int,
        allowed: frozenset[str],
        characters: int,
        probability: float,
        *,
        whole: bool,
    ) -> None:
        self._owner = owner
        self._allowed = allowed
        self._characters = characters
        self._probability = probability
        self._whole = whole
        self._text = ""
        self._position = 0
        self._judged = False

    @property
    def hold(self) -> int:
        """All of the text until it is judged."""
        return self._position if self._judged else 0

    def push(self, text: str) -> list[Found]:
        """Take the next piece; the finding, once."""
        self._position += len(text)
        if self._judged:
            return []
        most = MOST_CHARACTERS if self._whole else self._characters
        self._text += text[: max(0, most - len(self._text))]
        if self._whole or len(self._text) < self._characters:
            return []
        return self._judge(self._characters)

    def finish(self) -> list[Found]:
        """The text has ended."""
        if self._judged or len(self._text) < self._characters:
            self._judged = True
            return []
        return self._judge(self._position)

    def copy(self) -> LanguageMatcher:
        """The same place of the same text, to go on from twice."""
        twin = LanguageMatcher(
            self._owner,
            self._allowed,
            self._characters,
            self._probability,
            whole=self._whole,
        )
        twin._text, twin._position, twin._judged = self._text, self._position, self._judged
        return twin

    def _judge(self, seen: int) -> list[Found]:
        self._judged = True
        language, probability = identify(self._text)
        if language in self._allowed or probability < self._probability:
            return []
        return [Found(self._owner, 0, seen, seen)]


class LengthMatcher:
    """One rule on the length of one text: certain with the first character that is too many."""

    __slots__ = ("_most", "_owner", "_position")

    def __init__(self, owner: int, most: int) -> None:
        self._owner = owner
        self._most = most
        self._position = 0

    @property
    def hold(self) -> int:
        """Nothing is held back for it."""
        return self._position

    def push(self, text: str) -> list[Found]:
        """Take the next piece; the finding, once."""
        before, self._position = self._position, self._position + len(text)
        if before <= self._most < self._position:
            return [Found(self._owner, 0, self._most + 1, self._most + 1)]
        return []

    def finish(self) -> list[Found]:
        """Nothing more."""
        return []

    def copy(self) -> LengthMatcher:
        """The same place of the same text, to go on from twice."""
        twin = LengthMatcher(self._owner, self._most)
        twin._position = self._position
        return twin
