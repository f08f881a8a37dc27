"""A guard for what a model says: text, token ids and log-probabilities, none of which tells more.

Judged is the text of all tokens, also of those that a stop string cuts off: their ids would say it.
A token leaves when all of its text may, and never if part of its text is redacted. Where an id does
not determine its text (tokenizers that are not byte-level), ids are withheld altogether.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from gptjet.service.governance.guard import Finding, Guard, IsRejected
from gptjet.service.governance.policy import Chain

TokenBytes = Callable[[int], bytes | None]
_Logprob = TypeVar("_Logprob")


@dataclass(frozen=True, slots=True)
class Cleared(Generic[_Logprob]):
    """What may leave: text, and tokens with the log-probabilities that belong to them."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[_Logprob, ...]


class SequenceGuard(Generic[_Logprob]):
    """The output of one sequence under the output's chain.

    token_bytes  of the tokenizer; `token_bytes(0)` is None where it is not byte-level
    context      the prompt's text, "" where the prompt is echoed and so part of what leaves
    """

    def __init__(
        self, chain: Chain, is_rejected: IsRejected, token_bytes: TokenBytes, context: str = ""
    ) -> None:
        self._guard = Guard(chain, is_rejected, context)
        self._enforces = chain.enforces
        self._token_bytes = token_bytes if token_bytes(0) is not None else None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoded = 0
        self._delivered = 0
        self._unchecked = ""
        self._tokens: deque[tuple[int, int, int, _Logprob | None]] = deque()

    @property
    def blocked(self) -> Finding | None:
        """What ended the sequence."""
        return self._guard.blocked

    @property
    def findings(self) -> list[Finding]:
        """What was found so far."""
        return self._guard.findings

    def push(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[_Logprob],
        *,
        is_prompt: bool = False,
        final: bool = False,
    ) -> Cleared[_Logprob]:
        """Take one step's output and return what may leave now.

        text      what became certain, as the engine's Detokenizer gives it
        logprobs  none, or one a token
        """
        guard = self._guard
        self._delivered += len(text)
        if not self._enforces or self._token_bytes is None:
            guard.push(text)
            if final:
                guard.finish()
            cleared = guard.release()
            if self._enforces:
                return Cleared(cleared, (), ())
            return Cleared(text, tuple(token_ids), tuple(logprobs))
        if is_prompt:
            self._push_prompt(text, token_ids, logprobs)
        else:
            self._push_tokens(text, token_ids, logprobs, final=final)
        if final:
            guard.finish()
        return Cleared(guard.release(self._delivered), *self._release_tokens())

    def _push_prompt(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[_Logprob]
    ) -> None:
        """A text of its own, decoded as a whole; ids that do not add up to it are withheld."""
        start = self._decoded
        decoded, spans = self._decode(token_ids, final=True)
        self._decoder.reset()
        if decoded == text:
            self._note(token_ids, spans, logprobs)
        self._decoded = start + len(text)
        self._guard.push(text)

    def _push_tokens(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[_Logprob], *, final: bool
    ) -> None:
        decoded, spans = self._decode(token_ids, final=final)
        self._note(token_ids, spans, logprobs)
        self._unchecked += decoded
        if not self._unchecked.startswith(text):
            raise RuntimeError("the text of the tokens is not the text that is delivered")
        self._unchecked = self._unchecked[len(text) :]
        self._guard.push(decoded)

    def _decode(
        self, token_ids: Sequence[int], *, final: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Text of the ids, and where in the whole text each one's begins and ends."""
        assert self._token_bytes is not None
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        for token_id in token_ids:
            start = self._decoded
            part = self._decoder.decode(self._token_bytes(token_id) or b"")
            parts.append(part)
            self._decoded += len(part)
            # The bytes of an unfinished character belong to the character they will be part of.
            spans.append((start, self._decoded + bool(self._decoder.getstate()[0])))
        if final:
            part = self._decoder.decode(b"", final=True)
            parts.append(part)
            self._decoded += len(part)
        return "".join(parts), spans

    def _note(
        self,
        token_ids: Sequence[int],
        spans: Sequence[tuple[int, int]],
        logprobs: Sequence[_Logprob],
    ) -> None:
        padded: Sequence[_Logprob | None] = logprobs or (None,) * len(token_ids)
        for token_id, (start, end), logprob in zip(token_ids, spans, padded, strict=True):
            self._tokens.append((token_id, start, end, logprob))

    def _release_tokens(self) -> tuple[tuple[int, ...], tuple[_Logprob, ...]]:
        ids: list[int] = []
        logprobs: list[_Logprob] = []
        while self._tokens and self._tokens[0][2] <= self._guard.hold:
            token_id, start, end, logprob = self._tokens.popleft()
            if self._guard.covers(start, end):
                continue
            ids.append(token_id)
            if logprob is not None:
                logprobs.append(logprob)
        return tuple(ids), tuple(logprobs)
