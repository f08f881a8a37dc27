"""Requests as bytes, for workers that talk to a server without our client.

Field numbers are those of proto/v1/text_generation.proto, which do not change.
"""

from __future__ import annotations

from collections.abc import Iterable

_VARINT, _LENGTH_DELIMITED = 0, 2
_TOKEN_IDS, _SAMPLING_PARAMS = 2, 4
_PARAMS = {"max_new_tokens": 1, "min_new_tokens": 2, "n": 13, "ignore_eos": 16, "logprobs": 17}


def stream_request(prompt: Iterable[int], **params: int) -> bytes:
    """A GenerateStreamRequest (or a GenerateRequest: they have the same fields)."""
    ids = b"".join(_varint(token) for token in prompt)
    fields = {"ignore_eos": 1, "min_new_tokens": params.get("max_new_tokens", 1), **params}
    sampling = b"".join(
        _varint(_PARAMS[name] << 3 | _VARINT) + _varint(value) for name, value in fields.items()
    )
    return _message(_TOKEN_IDS, _message(1, ids)) + _message(_SAMPLING_PARAMS, sampling)


def _message(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
