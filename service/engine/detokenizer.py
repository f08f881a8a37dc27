"""Token ids to text, one id at a time: never half a character, never part of a stop string.

The concatenated deltas of `push` and `flush` equal `tokenizer.decode(all ids)` cut off before the
first stop string. The work per token does not depend on how many came before it.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gptjet.service.engine.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character is at most four bytes, so at most four byte tokens: text that still ends in U+FFFD
# after this many tokens is not an unfinished character.
_MAX_PENDING_TOKENS = 8


class Detokenizer:
    """The text of one sequence's output, as it becomes certain.

    Certain means: whole characters only (the bytes of an unfinished one are held back), and no end
    that could still grow into one of the `stop` strings (the longest suffix that is a proper prefix
    of one is held back, and nothing more).

    Which stop string matches: the text is read character by character, whatever the tokens are, and
    the first character that completes a stop string decides; where it completes several, the
    longest one (the one that starts earliest) is the match. Only text pushed here is looked at, so
    a stop string that begins in the prompt does not count.

    `stop_match` is the stop string that matched, None until one has; the text ends just before it
    and everything after it is dropped.
    """

    __slots__ = ("_flushed", "_matcher", "_text")

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        byte_level = tokenizer.token_bytes(0) is not None
        self._text: _TokenText = (
            _ByteLevelText(tokenizer) if byte_level else _WindowedText(tokenizer)
        )
        self._matcher = StopMatcher(stop) if stop else None
        self._flushed = False

    @property
    def stop_match(self) -> str | None:
        """The stop string that ended the text, if one has."""
        return self._matcher.match if self._matcher is not None else None

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that is now certain, often the text of earlier ids.

        Returns "" for every id after a stop string has matched.
        """
        if self._flushed:
            raise ValueError("push after flush: the text has already ended")
        return self._filter(self._text.push(token_id))

    def flush(self) -> str:
        """End the text and return what was held back; a second call returns "".

        The bytes of an unfinished character become U+FFFD, as in `tokenizer.decode`. That can
        complete a stop string (one that holds U+FFFD), so look at `stop_match` afterwards.
        """
        if self._flushed:
            return ""
        self._flushed = True
        text = self._filter(self._text.flush())
        return text if self._matcher is None else text + self._matcher.flush()

    def _filter(self, text: str) -> str:
        return text if self._matcher is None else self._matcher.push(text)


class StopMatcher:
    """Finds the first of several strings in a text that arrives in pieces.

    One Knuth-Morris-Pratt automaton a string. Its failure table is built only as deep as the text
    has ever matched, so a long stop string costs nothing until it is nearly there, and a character
    costs O(number of strings), amortised.
    """

    __slots__ = ("_held", "_patterns", "match")

    def __init__(self, stop: tuple[str, ...]) -> None:
        if not all(stop):
            raise ValueError("a stop string must not be empty")
        # Longest first: of several that end at one character the first to be seen matches.
        unique = sorted(set(stop), key=len, reverse=True)
        self._patterns = tuple(_PrefixAutomaton(text) for text in unique)
        self._held = ""
        self.match: str | None = None

    def push(self, text: str) -> str:
        """Take the next piece and return what is certain of all the text not yet returned."""
        if self.match is not None or not text:
            return ""
        patterns = self._patterns
        for position, character in enumerate(text):
            for pattern in patterns:
                starts = pattern.matched or character == pattern.text[0]
                if starts and pattern.advance(character):
                    self.match = pattern.text
                    whole = self._held + text[: position + 1]
                    self._held = ""
                    return whole[: len(whole) - len(pattern.text)]
        whole = self._held + text
        certain = len(whole) - max(pattern.matched for pattern in patterns)
        self._held = whole[certain:]
        return whole[:certain]

    def flush(self) -> str:
        """Return what is held back: no more text follows."""
        held, self._held = self._held, ""
        return held


class _PrefixAutomaton:
    """How many characters of `text` the end of the input matches (Knuth, Morris, Pratt 1977)."""

    __slots__ = ("_border", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # _border[i]: length of the longest proper border of text[: i + 1], grown on demand.
        self._border = [0]

    def advance(self, character: str) -> bool:
        """Take one character; True when it completes `text`, after which nothing may follow."""
        text, border, matched = self.text, self._border, self.matched
        while matched and text[matched] != character:
            matched = border[matched - 1]
        if text[matched] == character:
            matched += 1
            if matched > len(border):
                border.append(self._next_border(character))
        self.matched = matched
        return matched == len(text)

    def _next_border(self, character: str) -> int:
        text, border = self.text, self._border
        length = border[-1]
        while length and text[length] != character:
            length = border[length - 1]
        return length + (text[length] == character)


class _TokenText(Protocol):
    """Ids to text without stop strings: what `push` returns never changes afterwards."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class _ByteLevelText:
    """An id stands for bytes, whatever its neighbours: a decoder holds unfinished characters."""

    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id) or b"")

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowedText:
    """For tokenizers whose ids depend on their neighbours (sentencepiece, WordPiece).

    Decodes a window of the last few ids: those of the last text that was given out (the context
    that says, for instance, whether the next word has a space before it) and those since. The part
    of the window's text beyond the context's own is new.

    Text that ends in U+FFFD is held back, since it may be an unfinished character. Text once given
    out stands: a tokenizer that later reads the same ids differently (sentencepiece's byte fallback
    turns a whole run of byte tokens into U+FFFD when one of them is bad) only affects what follows.
    """

    __slots__ = ("_context_length", "_context_text", "_decode", "_window")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._window: list[int] = []
        self._context_length = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        pending = len(self._window) - self._context_length
        text = self._decode(self._window)
        if len(text) <= len(self._context_text):
            if pending > _MAX_PENDING_TOKENS:
                self._window.pop()  # a run of special tokens must not make the window grow
            return ""
        if text.endswith(_REPLACEMENT) and pending < _MAX_PENDING_TOKENS:
            return ""
        return self._give_out(text)

    def flush(self) -> str:
        return self._give_out(self._decode(self._window)) if self._window else ""

    def _give_out(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._window = self._window[self._context_length :]
        self._context_length = len(self._window)
        self._context_text = self._decode(self._window)
        return new
