"""Reads what is posted: within its size and time, and of the kind it says it is."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from gptjet.service.apps.sentiment.web.errors import PageError

MAX_SEED = 2**63 - 1


async def read_body(
    request: Request, *, kinds: tuple[str, ...], limit: int, timeout_s: float
) -> bytes:
    """The body. Raises PageError 415, 413 or 408.

    A kind that a form of another site cannot have (application/json, text/csv) makes browsers ask
    first, so it is insisted on.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in kinds:
        raise PageError(
            415, "wrong_kind", f"Content-Type must be {' or '.join(kinds)}, got {kind!r}"
        )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise PageError(408, "slow", f"the body did not come within {timeout_s:g} s") from None
    except ClientDisconnect:
        raise PageError(400, "disconnected", "the body ended early") from None
    return bytes(body)


def _too_large(limit: int) -> PageError:
    size = f"{limit / 1024 / 1024:g} MiB" if limit >= 1024 * 1024 else f"{limit // 1024} KiB"
    return PageError(413, "too_large", f"the body is larger than {size}, which is the limit")


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises PageError 400."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise PageError(400, "not_json", "the body is not JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise PageError(400, "not_json", "the body must be a JSON object")
    return fields


def text_field(fields: dict[str, Any], max_chars: int) -> str:
    """The field `text`, as it was written. Raises PageError 400 or 413."""
    text = fields.get("text")
    if not isinstance(text, str):
        raise PageError(400, "invalid", "text: must be a string")
    check_text(text, max_chars, "text")
    return text


def check_text(text: str, max_chars: int, name: str) -> None:
    """Raises PageError where a text is empty, too long, or not Unicode."""
    if not text.strip():
        raise PageError(400, "empty", f"the {name} is empty")
    if len(text) > max_chars:
        raise PageError(
            413, "too_long", f"the {name} has {len(text):,} characters; the limit is {max_chars:,}"
        )
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PageError(
            400, "invalid", f"the {name} has half of a surrogate pair, which is no character"
        )


def seed_field(value: object) -> int:
    """A seed: an integer from 0 to 2**63 - 1, 0 where None. Raises PageError 400."""
    if value is None:
        return 0
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise PageError(400, "invalid", f"seed: must be a whole number from 0 to {MAX_SEED}")
    return value
