"""What the engine needs of a tokenizer, and the byte tokenizer that the mock backend speaks."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol


class Tokenizer(Protocol):
    """Text to ids and back. Implementations must be safe to call from several threads."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id `encode` can return."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-text id, None where the model has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens the model expects at its start, if any."""
        ...

    def decode(self, token_ids: Seq[int]) -> str:
        """Text of all the ids at once, special tokens left out, bad UTF-8 as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes this id stands for, b"" for a special token or an id with no text.

        None where the tokenizer is not byte-level, so that an id alone does not determine its text.
        """
        ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8 text, 256 is end-of-text."""

    vocab_size = 257
    eos_token_id = 256

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(text.encode())

    def decode(self, token_ids: Seq[int]) -> str:
        """Bad UTF-8 becomes U+FFFD; end-of-text becomes nothing."""
        return bytes(t for t in token_ids if t < 256).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """One byte, or none for end-of-text."""
        return bytes((token_id,)) if token_id < 256 else b""
