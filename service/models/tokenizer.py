"""A transformers tokenizer as the engine's `Tokenizer`, safe to call from several threads."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjet.service.engine.errors import BackendLoadError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    import tokenizers
    from transformers import PreTrainedTokenizerBase

# A folder that has one of these can be read without the network.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True, slots=True)
class FastParts:
    """All there is to a fast tokenizer: what TransformersTokenizer.from_parts makes it of again.

    content  as in tokenizer.json, with the added tokens of the other files
    """

    content: str
    vocab_size: int
    eos_token_id: int | None


class TransformersTokenizer:
    """Adapter of a tokenizer that `AutoTokenizer` loads.

    A fast tokenizer is asked through its Rust object, of which this adapter keeps its own copy with
    truncation and padding off: transformers' own `__call__` changes that object's settings on every
    call, which two threads cannot do at once. A slow tokenizer (Python) is asked under a lock.

    For byte-level BPE (GPT-2, GPT-J, GPT-NeoX, CodeGen) the bytes of every id are tabulated once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        fast: tokenizers.Tokenizer | None = copy.deepcopy(
            getattr(tokenizer, "backend_tokenizer", None)
        )
        eos = tokenizer.eos_token_id
        self._set(
            fast,
            None if fast is not None else tokenizer,
            1 + max(tokenizer.get_vocab().values(), default=-1),
            eos if isinstance(eos, int) else None,
        )

    @classmethod
    def from_parts(cls, parts: FastParts) -> TransformersTokenizer:
        """What `parts` was taken of, without transformers."""
        from tokenizers import Tokenizer

        made = cls.__new__(cls)
        made._set(Tokenizer.from_str(parts.content), None, parts.vocab_size, parts.eos_token_id)
        return made

    def parts(self) -> FastParts | None:
        """All there is to a fast tokenizer; None of one in Python."""
        if self._fast is None:
            return None
        return FastParts(self._fast.to_str(), self._vocab_size, self._eos_token_id)

    def _set(
        self,
        fast: tokenizers.Tokenizer | None,
        slow: PreTrainedTokenizerBase | None,
        vocab_size: int,
        eos_token_id: int | None,
    ) -> None:
        self._fast, self._slow = fast, slow
        self._lock = threading.Lock()
        if fast is not None:
            fast.no_truncation()
            fast.no_padding()
        self._vocab_size = vocab_size
        self._eos_token_id = eos_token_id
        is_bytes = fast is not None and is_byte_level(fast)
        self._bytes = _byte_table(fast) if is_bytes and fast is not None else None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id `encode` can return, added tokens included."""
        return self._vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-text id, None where the tokenizer names none."""
        return self._eos_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens the tokenizer puts around it, if any."""
        if self._fast is not None:
            return list(self._fast.encode(text).ids)
        assert self._slow is not None
        with self._lock:
            ids: list[int] = self._slow.encode(text)
            return ids

    def decode(self, token_ids: Seq[int]) -> str:
        """Text of the ids: special tokens left out, spaces as they are, bad UTF-8 as U+FFFD."""
        if self._fast is not None:
            return str(self._fast.decode(list(token_ids), skip_special_tokens=True))
        assert self._slow is not None
        with self._lock:
            return str(
                self._slow.decode(
                    list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
            )

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of an id, b"" for a special or unknown one; None if this is not byte-level."""
        if self._bytes is None:
            return None
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""


def load_tokenizer(
    path: str | Path, *, local_files_only: bool = False, revision: str | None = None
) -> TransformersTokenizer:
    """Load the tokenizer of a checkpoint folder, or of a model on the hub where it is reachable.

    Raises BackendLoadError, one line, when there is none or it cannot be read. Code that comes with
    a checkpoint is never run.
    """
    folder = Path(path)
    is_folder = folder.is_dir()
    if is_folder and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise BackendLoadError(
            f"no tokenizer in {folder}: it has none of {', '.join(_TOKENIZER_FILES)}"
        )
    # Here and not at the top: the import takes seconds, and the mock backend never needs it.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path),
            local_files_only=local_files_only or is_folder,
            revision=revision,
            trust_remote_code=False,
        )
    # The tokenizers library raises bare Exception for a file that it cannot parse.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise BackendLoadError(f"the tokenizer of {path} cannot be loaded: {reason}") from error
    return TransformersTokenizer(tokenizer)


def is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the decoder maps every token to bytes by itself (GPT-2's ByteLevel)."""
    decoder: Mapping[str, Any] | None = json.loads(tokenizer.to_str())["decoder"]
    return decoder is not None and decoder["type"] == "ByteLevel"


def _byte_table(tokenizer: tokenizers.Tokenizer) -> tuple[bytes, ...]:
    """The bytes of every id, b"" for special tokens and for ids that do not exist."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    table = [b""] * (1 + max(vocabulary.values(), default=-1))
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    for token, token_id in vocabulary.items():
        if token_id not in special:
            table[token_id] = _bytes_of(token, byte_of)
    return tuple(table)


def _bytes_of(token: str, byte_of: Mapping[str, int]) -> bytes:
    """As the ByteLevel decoder does it: a token with any other character stands for its UTF-8.

    (Added tokens are plain text; those of the vocabulary are made of byte characters.)
    """
    if all(character in byte_of for character in token):
        return bytes(byte_of[character] for character in token)
    return token.encode()


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes (Radford et al. 2019).

    Bytes that print in Latin-1 stand for themselves; the others, in order, take U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
