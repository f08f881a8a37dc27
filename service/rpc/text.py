"""Text to ids and back for RPCs: bounded, and outside the event loop where it takes a while."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gptjet.service.engine.errors import FieldViolation, InvalidRequestError, QueueFullError
from gptjet.service.engine.tokenizer import Tokenizer

# Most UTF-8 bytes of one Tokenize call and most ids of one Detokenize call: documents are
# tokenized to be cut into prompts, so this is not bound to the context.
MAX_TOKENIZE_BYTES = 1024 * 1024
MAX_DETOKENIZE_IDS = 1024 * 1024
# Shorter ones take less time than handing them to a thread and back.
_INLINE_LENGTH = 2048
# For a tokenizer that cannot say which bytes an id stands for; GPT-2's longest token has 128.
_LONGEST_TOKEN_FALLBACK_BYTES = 256
_RETRY_AFTER_S = 1.0
_THREADS = 2

_Result = TypeVar("_Result")


class TextCodec:
    """A tokenizer for one model, used from the event loop.

    At most `max_pending` calls wait for its threads; one more raises QueueFullError.
    """

    def __init__(self, tokenizer: Tokenizer, max_context: int, max_pending: int) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context
        self._max_pending = max_pending
        self._slots = threading.BoundedSemaphore(max_pending)
        self._longest_token_bytes = _longest_token_bytes(tokenizer)
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="gptjet-tokenizer")

    @property
    def max_prompt_bytes(self) -> int:
        """No longer text can be `max_context` tokens."""
        return self._max_context * self._longest_token_bytes

    async def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Ids of a prompt; none for an empty one, even where the model has a start token.

        Raises InvalidRequestError, without tokenizing, if the text cannot fit the context.
        """
        (ids,) = await self.encode_prompts({"prompt": text})
        return ids

    async def encode_prompts(self, texts: Mapping[str, str]) -> list[tuple[int, ...]]:
        """Ids of several texts by `encode_prompt`'s rules, each tokenized by itself.

        The keys are what an InvalidRequestError calls them; it names every one that is too long.
        """
        limit = self.max_prompt_bytes
        violations = [
            FieldViolation(
                field,
                f"must be at most {limit} bytes of text, the context of {self._max_context} "
                f"tokens of {self._longest_token_bytes} bytes, got {size}",
            )
            for field, text in texts.items()
            if (size := _utf8_length(text, limit)) > limit
        ]
        if violations:
            raise InvalidRequestError(*violations)

        def run() -> list[tuple[int, ...]]:
            return [tuple(self._tokenizer.encode(text)) if text else () for text in texts.values()]

        return await self._run(sum(map(len, texts.values())), run)

    async def tokenize(self, text: str) -> tuple[list[int], list[str]]:
        """Ids of a text of any meaning, and the piece of text of each."""
        if (size := _utf8_length(text, MAX_TOKENIZE_BYTES)) > MAX_TOKENIZE_BYTES:
            raise InvalidRequestError(
                FieldViolation("text", f"must be at most {MAX_TOKENIZE_BYTES} bytes, got {size}")
            )

        def run() -> tuple[list[int], list[str]]:
            ids = self._tokenizer.encode(text)
            return ids, [self._piece(token_id) for token_id in ids]

        return await self._run(len(text), run)

    async def detokenize(self, ids: Sequence[int], vocab_size: int) -> str:
        """Text of the ids, all at once."""
        if len(ids) > MAX_DETOKENIZE_IDS:
            raise InvalidRequestError(
                FieldViolation("ids", f"must be at most {MAX_DETOKENIZE_IDS} ids, got {len(ids)}")
            )

        def run() -> str:
            for position, token_id in enumerate(ids):
                if token_id >= vocab_size:
                    raise InvalidRequestError(
                        FieldViolation(
                            f"ids[{position}]",
                            f"must be below the vocabulary of {vocab_size}, got {token_id}",
                        )
                    )
            return self._tokenizer.decode(ids)

        return await self._run(len(ids), run)

    def close(self) -> None:
        """Let the threads end; calls that run are finished, waiting ones are dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, length: int, function: Callable[[], _Result]) -> _Result:
        if length <= _INLINE_LENGTH:
            return function()
        if not self._slots.acquire(blocking=False):
            raise QueueFullError(self._max_pending, _RETRY_AFTER_S)
        future = self._executor.submit(function)
        # Not `finally` around the await: when that is cancelled, the thread still runs.
        future.add_done_callback(lambda _: self._slots.release())
        return await asyncio.wrap_future(future)

    def _piece(self, token_id: int) -> str:
        piece = self._tokenizer.token_bytes(token_id)
        if piece is None:
            return self._tokenizer.decode([token_id])
        return piece.decode(errors="replace")


def _longest_token_bytes(tokenizer: Tokenizer) -> int:
    longest = 1
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token_id)
        if piece is None:
            return _LONGEST_TOKEN_FALLBACK_BYTES
        longest = max(longest, len(piece))
    return longest


def _utf8_length(text: str, limit: int) -> int:
    """Bytes of `text` in UTF-8, or its characters where those alone are over the limit."""
    return len(text) if len(text) > limit else len(text.encode())
